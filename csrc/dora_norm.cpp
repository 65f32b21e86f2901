#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "layout.h"

namespace fastpeft {

using at::Tensor;

// W is read once, tile by tile; the same tile of s B A is made in registers, added, squared and summed. A W whose rows
// lie in memory (nn.Linear) is summed along them; one whose columns do (Conv1D) is taken as Wᵀ and summed down its
// rows.
Tensor dora_norm(const Tensor& weight, const Tensor& A, const Tensor& B, double scaling, bool bfloat16) {
    const Tensor W = weight.stride(0) == 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
    const bool along = W.stride(1) == 1;
    const Tensor w = along ? W : W.t(), sB = B.to(at::kFloat) * scaling;
    const Tensor left = along ? sB : A.t().to(at::kFloat), right = along ? A : sB.t();
    const cpu::Kernels& kernels = cpu::kernels();
    const bool pairs = bfloat16 && kernels.pairs(dtype_of(w));
    const int64_t rows = w.size(0), columns = w.size(1), rank = A.size(0), ranks = padded(rank);
    const Tensor q = ranks == rank ? left.contiguous() : at::constant_pad_nd(left, {0, ranks - rank});  // [rows, ranks]
    const Tensor right_panel = panel(kernels, right, pairs);
    const Tensor norms = at::zeros({weight.size(0)}, at::dtype(at::kFloat));

    // Rows [m, m_end) and columns [begin, end).
    const auto sum = [&](int64_t m, int64_t m_end, int64_t begin, int64_t end) {
        const Tensor scratch = floats({cpu::kRows * ranks});
        float* q_tile = scratch.mutable_data_ptr<float>();
        for (; m < m_end; m += cpu::kRows) {
            const int64_t row_count = std::min(cpu::kRows, m_end - m);
            kernels.left(q.const_data_ptr<float>() + m * ranks, ranks, row_count, ranks, pairs, q_tile);
            for (int64_t c = begin; c < end; c += cpu::kColumns) {
                const auto* p = static_cast<const char*>(right_panel.const_data_ptr()) + c * ranks * (pairs ? 2 : 4);
                const auto* data =
                    static_cast<const char*>(w.const_data_ptr()) + (m * w.stride(0) + c) * w.element_size();
                float* sums = norms.mutable_data_ptr<float>();
                kernels.squares(q_tile, pairs, row_count, std::min(cpu::kColumns, end - c), ranks, p,
                                ranks * cpu::kLanes, {data, dtype_of(w), w.stride(0)}, along ? sums + m : nullptr,
                                along ? nullptr : sums + c);
            }
        }
    };
    const int64_t unit = along ? cpu::kRows : cpu::kColumns, length = along ? rows : columns;
    at::parallel_for(0, (length + unit - 1) / unit, 1, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * unit, last = std::min(end * unit, length);
        along ? sum(first, last, 0, columns) : sum(0, rows, first, last);
    });
    return norms.sqrt_();
}

}  // namespace fastpeft

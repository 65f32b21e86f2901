// DoRA's norm on the CPU: the norm of each row of W + s B A, with W read once.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "layout.h"
#include "lora_linear.h"

namespace fastpeft::cpu {

using at::Tensor;

// W is read once, tile by tile; the same tile of s B A is made in registers, added, squared and summed. A W whose rows
// lie in memory (nn.Linear) is summed along them; one whose columns do (Conv1D) is taken as Wᵀ and summed down its
// rows. Tiles of a 4-bit W are decoded into scratch.
Tensor dora_norm(const Weight& weight, const Tensor& A, const Tensor& B, double scaling, at::ScalarType dtype,
                 int64_t first) {
    const bool packed = weight.four_bit();
    const bool strided = !packed && weight.data.stride(0) != 1 && weight.data.stride(1) != 1;
    const Tensor W = strided ? weight.data.contiguous() : weight.data;
    const bool along = packed ? !weight.lies_transposed() : W.stride(1) == 1;
    const Tensor w = along ? W : W.t(), sB = B.to(at::kFloat) * scaling;
    const Tensor left = along ? sB : A.t().to(at::kFloat), right = along ? A : sB.t();
    const FourBit codes = packed ? four_bit(weight) : FourBit{};
    const Kernels& kernels = cpu::kernels();
    const bool wants_pairs = dtype == at::kBFloat16 && kernels.pairs(DType::bf16);
    const Tensor like = packed ? at::empty({0}, at::dtype(dtype)) : w;
    const DType tile_dtype = dtype_of(like);
    const bool pairs = wants_pairs && kernels.pairs(tile_dtype);
    const int64_t rows = along ? weight.N : weight.K, columns = along ? weight.K : weight.N, rank = A.size(0),
                  ranks = padded(rank);
    const Tensor q = ranks == rank ? left.contiguous() : at::constant_pad_nd(left, {0, ranks - rank});  // [rows, ranks]
    const Tensor right_panel = panel(kernels, right, pairs);
    const int64_t step = along && pairs && !packed ? columns : kColumns;
    const Tensor norms = at::zeros({weight.N}, at::dtype(at::kFloat));

    // Rows [m, m_end) and columns [begin, end).
    const auto sum = [&](int64_t m, int64_t m_end, int64_t begin, int64_t end) {
        const Tensor scratch = floats({kRows * ranks});
        float* q_tile = scratch.mutable_data_ptr<float>();
        const Tensor decoded = at::empty({packed ? kRows * kColumns : 0}, like.options());
        const auto w_tile = [&](int64_t row, int64_t row_count, int64_t c, int64_t count) -> Tile {
            if (!packed) {
                const int64_t at = (row * w.stride(0) + c) * w.element_size();
                return {static_cast<const char*>(w.const_data_ptr()) + at, tile_dtype, w.stride(0)};
            }
            char* out = static_cast<char*>(decoded.mutable_data_ptr());
            kernels.decode(codes, first + row * columns + c, columns, row_count, count, tile_dtype, out, tile_dtype,
                           kColumns);
            return {out, tile_dtype, kColumns};
        };
        for (; m < m_end; m += kRows) {
            const int64_t row_count = std::min(kRows, m_end - m);
            kernels.left(q.const_data_ptr<float>() + m * ranks, ranks, row_count, ranks, pairs, q_tile);
            for (int64_t c = begin; c < end; c += step) {
                const auto* p = static_cast<const char*>(right_panel.const_data_ptr()) + c * ranks * (pairs ? 2 : 4);
                const int64_t count = std::min(step, end - c);
                float* sums = norms.mutable_data_ptr<float>();
                kernels.squares(q_tile, pairs, row_count, count, ranks, p, ranks * kLanes,
                                w_tile(m, row_count, c, count), along ? sums + m : nullptr, along ? nullptr : sums + c);
            }
        }
    };
    const int64_t unit = along ? kRows : kColumns, length = along ? rows : columns;
    at::parallel_for(0, (length + unit - 1) / unit, 1, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * unit, last = std::min(end * unit, length);
        along ? sum(first, last, 0, columns) : sum(0, rows, first, last);
    });
    return norms.sqrt_();
}

}  // namespace fastpeft::cpu

// Plan::dots: u and y as dot products with the rows of A and of W, every row read once.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "layout.h"

namespace fastpeft {

using at::Tensor;

void few_tokens_product(const Tensor& x, const Tensor& weight, const Tensor& bias, const Adapters& adapters,
                        const Tensor& u, const Tensor& y) {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t tokens = x.size(0), columns = x.size(1);
    const bool fits = x.scalar_type() == at::kFloat && columns == padded(columns);
    Tensor wide = fits ? x : Tensor();  // x in float32, zero-padded
    const auto widened = [&]() -> const Tensor& {
        if (!wide.defined()) {
            wide = at::zeros({tokens, padded(columns)}, at::dtype(at::kFloat));
            wide.narrow(1, 0, columns).copy_(x);
        }
        return wide;
    };
    const auto dot = [&](const Tensor& input, const Tensor& w, const Tensor& q, const Tensor& b, const Tensor& out) {
        constexpr int64_t kGrainElements = 1 << 15;  // of w a thread should have, at least
        at::parallel_for(0, w.size(0), std::max<int64_t>(1, kGrainElements / columns), [&](int64_t begin, int64_t end) {
            kernels.dot(input.const_data_ptr(), input.stride(0), tokens, matrix(w),
                        q.defined() ? q.const_data_ptr<float>() : nullptr, q.defined() ? matrix(b) : cpu::Matrix{},
                        q.defined() && bias.defined() ? bias.const_data_ptr<float>() : nullptr, out.mutable_data_ptr(),
                        dtype_of(out), out.stride(0), begin, end);
        });
    };
    const auto pairs = [&](const Tensor& w) {
        return kernels.pairs(dtype_of(w)) && w.scalar_type() == x.scalar_type();
    };
    const Tensor q = at::empty_like(u);
    int64_t offset = 0;
    for (size_t i = 0; i < adapters.A.size(); ++i) {
        const Tensor& A = adapters.A[i];
        const int64_t rank = A.size(0);
        Tensor input = pairs(A) ? x : widened();
        if (adapters.thresholds[i]) {
            const Tensor dropped =
                dropout_keep(static_cast<int64_t>(seed_of(adapters, i)), tokens, columns, adapters.thresholds[i])
                    .logical_not_();
            input = input.clone();
            input.narrow(1, 0, columns).masked_fill_(dropped, 0);
        }
        const Tensor part = adapters.A.size() == 1 ? u : u.narrow(1, offset, rank);
        dot(input, A, {}, {}, part);
        if (adapters.index) part.masked_fill_(adapters.index->reshape({-1, 1}).ne(static_cast<int64_t>(i)), 0);
        const float scaling = static_cast<float>(adapters.scaling[i]);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t r = offset; r < offset + rank; ++r)
                q.mutable_data_ptr<float>()[t * u.size(1) + r] = scaling * u.const_data_ptr<float>()[t * u.size(1) + r];
        offset += rank;
    }
    dot(pairs(weight) ? x : widened(), weight, q, adapters.B.size() == 1 ? adapters.B[0] : at::cat(adapters.B, 1), y);
}

}  // namespace fastpeft

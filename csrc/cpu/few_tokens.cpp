// A layer for a few tokens (Plan::dots): u and y as dot products with the rows of A and of W, every row read once.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "layout.h"
#include "lora_linear.h"

namespace fastpeft::cpu {

using at::Tensor;

namespace {

constexpr int64_t kGroup = 64;

// x [tokens, columns] as [columns / 64][tokens][64], each 64 in another order.
template <typename T>
Tensor arranged(const Tensor& x, const Order64& order) {
    const int64_t tokens = x.size(0), groups = x.size(1) / kGroup;
    const Tensor out = at::empty({groups, tokens, kGroup}, x.options());
    T* to = out.mutable_data_ptr<T>();
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t t = 0; t < tokens; ++t, to += kGroup) {
            const T* from = x.const_data_ptr<T>() + t * x.stride(0) + g * kGroup;
            for (int64_t i = 0; i < kGroup; ++i) to[i] = from[order.at[i]];
        }
    return out;
}

}  // namespace

void few_tokens_product(const Tensor& x, const Weight& weight, const Tensor& bias, const Adapters& adapters,
                        const Tensor& u, const Tensor& y) {
    const Kernels& kernels = cpu::kernels();
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
    // Parts of the rows of a matrix with as many columns as x.
    const auto each_part = [&](int64_t rows, auto run) {
        constexpr int64_t kGrainElements = 1 << 15;
        at::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / columns), run);
    };
    const auto dot = [&](const Tensor& input, const Tensor& w, const Tensor& q, const Tensor& b, const Tensor& out) {
        each_part(w.size(0), [&](int64_t begin, int64_t end) {
            kernels.dot(input.const_data_ptr(), input.stride(0), tokens, matrix(w),
                        q.defined() ? q.const_data_ptr<float>() : nullptr, q.defined() ? matrix(b) : Matrix{},
                        q.defined() && bias.defined() ? bias.const_data_ptr<float>() : nullptr, out.mutable_data_ptr(),
                        dtype_of(out), out.stride(0), begin, end);
        });
    };
    // The same for a 4-bit weight: decoded in registers, or a few rows at a time in the dtype of x.
    const auto dot_four_bit = [&](const Tensor& q, const Tensor& b, bool pairs) {
        const FourBit w = four_bit(weight);
        const float* bias32 = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
        if (columns % kGroup == 0 && w.block_bits >= 6) {
            const Tensor rows = pairs ? arranged<at::BFloat16>(x, kEvenThenOdd)
                                      : arranged<float>(x.to(at::kFloat), *kernels.float_order);
            each_part(weight.N, [&](int64_t begin, int64_t end) {
                kernels.dot_four_bit(rows.const_data_ptr(), dtype_of(x), tokens, columns, w, q.const_data_ptr<float>(),
                                     matrix(b), bias32, y.mutable_data_ptr(), dtype_of(y), y.stride(0), begin, end);
            });
            return;
        }
        constexpr int64_t kRowsAtOnce = 16;
        const Tensor& input = pairs ? x : widened();
        at::parallel_for(0, ceil_div(weight.N, kRowsAtOnce), 1, [&](int64_t begin, int64_t end) {
            const Tensor tile = at::empty({kRowsAtOnce, columns}, x.options());
            for (int64_t n = begin * kRowsAtOnce; n < std::min(end * kRowsAtOnce, weight.N); n += kRowsAtOnce) {
                const int64_t rows = std::min(kRowsAtOnce, weight.N - n);
                kernels.decode(w, n * columns, columns, rows, columns, dtype_of(x), tile.mutable_data_ptr(),
                               dtype_of(tile), columns);
                kernels.dot(input.const_data_ptr(), input.stride(0), tokens, matrix(tile), q.const_data_ptr<float>(),
                            matrix(b.narrow(0, n, rows)), bias32 ? bias32 + n : nullptr,
                            static_cast<char*>(y.mutable_data_ptr()) + n * y.element_size(), dtype_of(y), y.stride(0),
                            0, rows);
            }
        });
    };
    const auto pairs = [&](at::ScalarType dtype) {
        return dtype == at::kBFloat16 && dtype == x.scalar_type() && kernels.pairs(DType::bf16);
    };
    const Tensor q = at::empty_like(u);
    int64_t offset = 0;
    for (size_t i = 0; i < adapters.A.size(); ++i) {
        const bool in_pairs = pairs(adapters.A[i].scalar_type());
        // Where the kernels multiply pairs they take x in bfloat16 with an A in bfloat16: another x wants A wider.
        const bool too_narrow = !in_pairs && kernels.pairs(dtype_of(adapters.A[i]));
        const Tensor A = too_narrow ? adapters.A[i].to(at::kFloat) : adapters.A[i];
        const int64_t rank = A.size(0);
        Tensor input = in_pairs ? x : widened();
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
    const Tensor B = adapters.B.size() == 1 ? adapters.B[0] : at::cat(adapters.B, 1);
    if (weight.four_bit())
        dot_four_bit(q, B, pairs(x.scalar_type()));
    else
        dot(pairs(weight.data.scalar_type()) ? x : widened(), weight.data, q, B, y);
}

}  // namespace fastpeft::cpu

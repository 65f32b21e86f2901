#include "launch.h"

#include <ATen/ATen.h>

namespace fastpeft::gpu {

using at::Tensor;

namespace {

constexpr uintptr_t kAligned = 16;  // bytes, for kernels that load so many at once

bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAligned == 0; }

Tensor aligned(const Tensor& t) { return is_aligned(t) ? t : t.clone(); }

// Whether the copy engine can move tiles of a matrix of two-byte elements.
bool is_movable(const Tensor& t) {
    return t.stride(1) == 1 && t.stride(0) >= t.size(1) && t.stride(0) * 2 % cuda::kRowBytes == 0 && is_aligned(t);
}

// Columns of a buffer of two-byte elements whose rows the copy engine can move.
int64_t padded_row(int64_t columns) {
    constexpr int64_t kStep = cuda::kRowBytes / 2;
    return (columns + kStep - 1) / kStep * kStep;
}

cuda::Tail pointers(const Tail& tail, const float* q) {
    const Matrix bias = tail.bias.defined() ? matrix(tail.bias.unsqueeze(0)) : Matrix{};
    return {.q = q,
            .q_stride = tail.q.stride(0),
            .rank = tail.q.size(1),
            .right = matrix(tail.right),
            .scale = static_cast<float>(tail.scale),
            .threshold = tail.mask.threshold,
            .seed = tail.mask.seed,
            .c = tail.c.defined() ? tail.c.const_data_ptr<float>() : nullptr,
            .z = tail.z.defined() ? tail.z.mutable_data_ptr() : nullptr,
            .z_is_float = tail.z.defined() && tail.z.scalar_type() == at::kFloat,
            .bias = bias};
}

}  // namespace

void Kernels::check(const char* kernel, cuda::Error error) const {
    TORCH_CHECK(error == 0, kernel, " on GPU ", place_.device, ": ", launchers_.error_string(error));
}

Tensor Kernels::dropout(const Tensor& x, const Mask& mask, double factor) const {
    const Tensor out = at::empty(x.sizes(), x.options());
    check("dropout", launchers_.dropout(matrix(x), out.mutable_data_ptr(), x.size(0), x.size(1), mask.threshold,
                                        static_cast<float>(factor), mask.seed, place_));
    return out;
}

void Kernels::finish_(const Tensor& product, const Tensor& second, const Tail& tail) const {
    void* y = product.mutable_data_ptr();
    check("lora_up",
          launchers_.lora_up(y, product.stride(0), second.defined() ? second.const_data_ptr() : nullptr, y,
                             product.stride(0), product.size(0), product.size(1),
                             pointers(tail, tail.q.const_data_ptr<float>()), dtype_of(product.scalar_type()), place_));
}

Tensor Kernels::decode(const Weight& weight, at::ScalarType dtype) const {
    const Tensor out = at::empty({weight.N, weight.K}, weight.data.options().dtype(dtype));
    check("four_bit_decode", launchers_.four_bit_decode(four_bit(weight), weight.N * weight.K, out.mutable_data_ptr(),
                                                        dtype_of(dtype), place_));
    return out;
}

bool Kernels::decodes_in_loop(int64_t M, const Weight& weight) {
    return weight.four_bit() && M <= cuda::kFewTokens && weight.K % cuda::kGroup == 0 &&
           weight.blocksize >= cuda::kGroup;
}

Tensor Kernels::few_tokens_four_bit(const Tensor& x, const Weight& weight, const Tail& tail) const {
    const Tensor tokens = aligned(x.contiguous());
    const Weight whole{aligned(weight.data), weight.quant, weight.blocksize, weight.N, weight.K};
    const Tensor y = at::empty({x.size(0), weight.N}, x.options());
    check("four_bit_linear",
          launchers_.four_bit_linear(tokens.const_data_ptr(), four_bit(whole), y.mutable_data_ptr(), x.size(0),
                                     weight.N, weight.K, pointers(tail, tail.q.const_data_ptr<float>()),
                                     dtype_of(x.scalar_type()), place_));
    return y;
}

bool Kernels::fuses(const Tensor& x, const Tensor& weight, int64_t ranks, bool masked) const {
    if (x.scalar_type() == at::kFloat || x.size(0) < cuda::kFewestTokens || weight.scalar_type() != x.scalar_type() ||
        !launchers_.has_lora_linear(place_.device))
        return false;
    const int64_t N = weight.size(0);
    const bool transposed = weight.stride(1) != 1;
    return is_movable(x) && is_movable(transposed ? weight.t() : weight) && N % (cuda::kRowBytes / 2) == 0 &&
           (!masked || ranks <= cuda::kMostRanksMasked);
}

Tensor Kernels::fused(const Tensor& x, const Tensor& weight, const Tail& tail) const {
    const Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
    cuda::Tail ending = pointers(tail, nullptr);
    check("lora_linear",
          launchers_.lora_linear({x.const_data_ptr(), x.stride(0), matrix(weight), tail.q.const_data_ptr(),
                                  tail.q.stride(0), y.mutable_data_ptr(), y.stride(0), y.size(0), y.size(1), x.size(1)},
                                 ending, dtype_of(x.scalar_type()), place_));
    return y;
}

Tensor Kernels::dora_norm(const Weight& weight, const Tensor& A, const Tensor& B, double scaling,
                          at::ScalarType dtype) const {
    const Tensor dense = weight.four_bit() ? decode(weight, dtype) : weight.data;
    const Tensor norm = at::empty({weight.N}, A.options().dtype(at::kFloat)), left = B.to(at::kFloat).contiguous();
    check("dora_norm", launchers_.dora_norm(matrix(dense), matrix(A), left.const_data_ptr<float>(), left.stride(0),
                                            static_cast<float>(scaling), norm.mutable_data_ptr<float>(), weight.N,
                                            weight.K, A.size(0), dtype_of(dtype), place_));
    return norm;
}

Tensor right_of(const Tensor& weight, int64_t ranks) {
    const int64_t N = weight.size(0);
    if (weight.stride(1) == 1) return at::empty({N, padded_row(ranks)}, weight.options()).narrow(1, 0, ranks);
    return at::empty({ranks, N}, weight.options()).t();
}

Tensor left_of(const Tensor& x, int64_t ranks) {
    return at::empty({x.size(0), padded_row(ranks)}, x.options()).narrow(1, 0, ranks);
}

}  // namespace fastpeft::gpu

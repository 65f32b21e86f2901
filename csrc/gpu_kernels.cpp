#include "gpu_kernels.h"

#include <ATen/ATen.h>

#include <bit>

namespace fastpeft::gpu {

using at::Tensor;

namespace {

constexpr uintptr_t kAligned = 16;  // bytes, for kernels that load so many at once

cuda::DType dtype_of(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat:
            return cuda::DType::f32;
        case at::kBFloat16:
            return cuda::DType::bf16;
        case at::kHalf:
            return cuda::DType::f16;
        default:
            TORCH_CHECK(false, "the GPU's kernels compute in float32, bfloat16 or float16, not in ", dtype);
    }
}

cuda::Matrix matrix(const Tensor& t) {
    return {t.const_data_ptr(), dtype_of(t.scalar_type()), t.stride(0), t.stride(1)};
}

Tensor aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAligned ? t.clone() : t; }

cuda::FourBit four_bit(const Weight& weight) {
    const auto floats = [&](size_t i) { return weight.quant[i].const_data_ptr<float>(); };
    const int bits = std::countr_zero(static_cast<uint64_t>(weight.blocksize));
    const uint8_t* packed = weight.data.const_data_ptr<uint8_t>();
    if (weight.quant.size() == 2) return {packed, floats(0), floats(1), nullptr, nullptr, nullptr, nullptr, bits};
    return {packed,    floats(0), nullptr,   weight.quant[1].const_data_ptr<uint8_t>(),
            floats(2), floats(3), floats(4), bits};
}

cuda::Tail pointers(const Tail& tail) {
    const cuda::Matrix bias = tail.bias.defined() ? matrix(tail.bias.unsqueeze(0)) : cuda::Matrix{};
    return {.q = tail.q.const_data_ptr<float>(),
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
    check("lora_up", launchers_.lora_up(y, product.stride(0), second.defined() ? second.const_data_ptr() : nullptr, y,
                                        product.stride(0), product.size(0), product.size(1), pointers(tail),
                                        dtype_of(product.scalar_type()), place_));
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
                                     weight.N, weight.K, pointers(tail), dtype_of(x.scalar_type()), place_));
    return y;
}

void Kernels::few_tokens_down(const Tensor& x, const Tensor& A, const Tensor& u, const Tensor& index,
                              size_t adapter) const {
    const Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
    check("lora_down", launchers_.lora_down(
                           rows.const_data_ptr(), rows.stride(0), matrix(A), u.mutable_data_ptr<float>(), u.stride(0),
                           index.defined() ? index.const_data_ptr<int32_t>() : nullptr, static_cast<int>(adapter),
                           x.size(0), x.size(1), A.size(0), dtype_of(x.scalar_type()), place_));
}

Tensor wide_product(const Tensor& a, const Tensor& b) {
    if (a.scalar_type() == at::kFloat) return at::mm(a, b);
    if (a.is_cuda()) return at::mm(a, b, at::kFloat);
    return at::mm(a.to(at::kFloat), b.to(at::kFloat));  // torch has the one above on GPUs alone
}

Tensor scaled_to(const Tensor& t, double factor, at::ScalarType dtype) {
    if (factor == 1.0) return t.to(dtype);
    Tensor out = at::empty_like(t, t.options().dtype(dtype), at::MemoryFormat::Contiguous);
    return at::mul_out(out, t, at::scalar_tensor(factor, at::dtype(t.scalar_type())));
}

Tensor scaled_to(const Tensor& t, const Tensor& factor, at::ScalarType dtype) {
    Tensor out = at::empty_like(t, t.options().dtype(dtype), at::MemoryFormat::Contiguous);
    return at::mul_out(out, t, factor);
}

}  // namespace fastpeft::gpu

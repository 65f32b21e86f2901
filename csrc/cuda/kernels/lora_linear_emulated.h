// A stand-in for lora_linear where the kernels are emulated: it computes what the kernel does, by plain loops, so that
// the step around the kernel can be tested without its GPU.
#pragma once
#include "elements.cuh"

namespace fastpeft::cuda {

template <typename T>
void lora_linear_emulated(const LinearOperands& o, const Tail& tail) {
    const auto dot = [](const void* left, int64_t m, int64_t stride, const Matrix& right, int64_t n, int64_t count) {
        float sum = 0;
        for (int64_t k = 0; k < count; ++k)
            sum += to_float(static_cast<const T*>(left)[m * stride + k]) *
                   to_float(static_cast<const T*>(right.data)[n * right.row_stride + k * right.column_stride]);
        return sum;
    };
    T *y = static_cast<T*>(o.y), *z = static_cast<T*>(tail.z);
    for (int64_t m = 0; m < o.M; ++m)
        for (int64_t n = 0; n < o.N; ++n) {
            float sum = dot(o.x, m, o.x_stride, o.weight, n, o.K);
            const bool kept =
                tail.threshold == 0 || philox_keep(static_cast<uint64_t>(*tail.seed), tail.threshold,
                                                   static_cast<uint32_t>(m), static_cast<uint32_t>(n / 8)) >>
                                               (n % 8) &
                                           1;
            if (kept) sum += dot(o.q, m, o.q_stride, tail.right, n, tail.rank);
            if (z != nullptr) z[m * o.N + n] = Convert<T>::from(sum);
            if (tail.c != nullptr) sum *= tail.c[n];
            if (tail.bias.data != nullptr) sum += element(tail.bias.data, tail.bias.dtype, n * tail.bias.column_stride);
            y[m * o.y_stride + n] = Convert<T>::from(sum);
        }
}

bool has_lora_linear(int) { return emulation::has_lora_linear; }

Error lora_linear(const LinearOperands& operands, const Tail& tail, DType dtype, const Place&) {
    ++emulation::launches;
    dtype == DType::bf16 ? lora_linear_emulated<__nv_bfloat16>(operands, tail)
                         : lora_linear_emulated<__half>(operands, tail);
    return cudaSuccess;
}

}  // namespace fastpeft::cuda

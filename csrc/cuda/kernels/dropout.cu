// factor * keep ∘ x, for products that are not ours to mask: one draw of Philox for eight elements.
#include "elements.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ __launch_bounds__(kThreads) void dropout_kernel(const T* x, int64_t row_stride, int64_t column_stride,
                                                           T* out, int64_t M, int64_t K, uint32_t threshold,
                                                           float factor, const int64_t* seed, bool reads_runs,
                                                           bool writes_runs) {
    const int64_t groups = (K + 7) / 8, at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t m = at / groups, k = at % groups * 8;
    if (m >= M) return;
    const int count = static_cast<int>(K - k < 8 ? K - k : 8);
    const T* from = x + m * row_stride + k * column_stride;
    float values[8];
    if (column_stride == 1) {
        load8(from, count, reads_runs, values);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = i < count ? to_float(from[i * column_stride]) : 0.0f;
    }
    const uint32_t kept =
        philox_keep(static_cast<uint64_t>(*seed), threshold, static_cast<uint32_t>(m), static_cast<uint32_t>(k / 8));
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = kept >> i & 1 ? values[i] * factor : 0.0f;
    store8(out + m * K + k, count, writes_runs, values);
}

}  // namespace

Error dropout(const Matrix& x, void* out, int64_t M, int64_t K, uint32_t threshold, float factor, const int64_t* seed,
              const Place& place) {
    return with_type(x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int64_t kPerLoad = 16 / sizeof(T);
        return FASTPEFT_LAUNCH(dropout_kernel<T>, blocks_of(M * ((K + 7) / 8), kThreads), kThreads, place,
                               static_cast<const T*>(x.data), x.row_stride, x.column_stride, static_cast<T*>(out), M, K,
                               threshold, factor, seed, x.row_stride % kPerLoad == 0 && is_aligned(x.data),
                               K % kPerLoad == 0 && is_aligned(out));
    });
}

}  // namespace fastpeft::cuda

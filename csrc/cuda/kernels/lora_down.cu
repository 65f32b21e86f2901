// u = x Aᵀ of a few tokens, by dot products: a block has one rank, and reads its row of A once for its tokens.
#include "elements.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kTokens = 8;

template <typename T>
__global__ __launch_bounds__(kThreads) void lora_down_kernel(const T* x, int64_t x_stride, Matrix A, float* u,
                                                             int64_t u_stride, const int32_t* index, int adapter, int M,
                                                             int64_t K, bool vector, bool A_vector) {
    __shared__ float partial[kWarps][kTokens];
    const int64_t r = blockIdx.x;
    const int first = static_cast<int>(blockIdx.y) * kTokens;
    M = M - first < kTokens ? M - first : kTokens;
    x += first * x_stride;
    float sums[kTokens] = {};
    for (int64_t k = threadIdx.x * 8; k < K; k += kThreads * 8) {
        const int count = static_cast<int>(K - k < 8 ? K - k : 8);
        float a[8];
        load8(A, r, k, count, A_vector, a);
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i] = rounded<T>(a[i]);
#pragma unroll
        for (int m = 0; m < kTokens; ++m) {
            if (m >= M) break;
            float values[8];
            load8(x + m * x_stride + k, count, vector, values);
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[m] += a[i] * values[i];
        }
    }
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
        if (m >= M) break;
#pragma unroll
        for (int other = kWarp / 2; other > 0; other /= 2) sums[m] += __shfl_xor_sync(kAllLanes, sums[m], other);
        if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp][m] = sums[m];
    }
    __syncthreads();
    const int m = threadIdx.x;
    if (m >= M) return;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp][m];
    u[(first + m) * u_stride + r] = index == nullptr || index[first + m] == adapter ? sum : 0.0f;
}

}  // namespace

Error lora_down(const void* x, int64_t x_stride, const Matrix& A, float* u, int64_t u_stride, const int32_t* index,
                int adapter, int64_t M, int64_t K, int64_t rank, DType dtype, const Place& place) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const bool vector = x_stride % static_cast<int64_t>(16 / sizeof(T)) == 0 && is_aligned(x);
        const dim3 grid(static_cast<unsigned>(rank), blocks_of(M, kTokens));
        return FASTPEFT_LAUNCH(lora_down_kernel<T>, grid, kThreads, place, static_cast<const T*>(x), x_stride, A, u,
                               u_stride, index, adapter, static_cast<int>(M), K, vector, rows_are_aligned(A));
    });
}

}  // namespace fastpeft::cuda

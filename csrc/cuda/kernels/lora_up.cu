// The low-rank part, mask, DoRA's factor and bias onto a finished product, in one pass over it: forward, and dx.
#include "low_rank.cuh"
#include "tail.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kBlockColumns = kThreads / kWarp * kTileColumns;

template <typename T>
__global__ __launch_bounds__(kThreads, 2) void lora_up_kernel(const T* base, int64_t base_stride, const T* second, T* y,
                                                              int64_t y_stride, int64_t M, int64_t N, Tail tail,
                                                              bool vector) {
    const Lane lane;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileRows;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kBlockColumns + threadIdx.x / kWarp * kTileColumns;
    if (column >= N) return;  // the whole warp
    const int64_t n = column + lane.column, left = N - n;
    const int count = static_cast<int>(left < 0 ? 0 : left < 8 ? left : 8);
    float first[kLaneRows][8], delta[kLaneRows][8] = {};
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {  // on its way while the low-rank part is made
        const int64_t m = row + lane.row + 8 * i;
        load8(base + m * base_stride + n, m < M ? count : 0, vector, first[i]);
    }
    add_low_rank<T>(tail.q, tail.q_stride, tail.scale, tail.right, tail.rank, row, M, column, N, delta);
    if (count == 0) return;
    const bool has_c = tail.c != nullptr, has_second = second != nullptr;
    float c[8], bias[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        c[j] = has_c && j < count ? tail.c[n + j] : 0.0f;
        bias[j] = j < count ? bias_of(tail, n + j) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
        const int64_t m = row + lane.row + 8 * i;
        if (m >= M) break;
        float other[8] = {}, out[8], z[8];
        if (has_second) load8(second + m * base_stride + n, count, vector, other);
        const uint32_t kept = tail.threshold == 0 ? 0xff
                                                  : philox_keep(static_cast<uint64_t>(*tail.seed), tail.threshold,
                                                                static_cast<uint32_t>(m), static_cast<uint32_t>(n / 8));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float added = kept >> j & 1 ? delta[i][j] : 0.0f;
            const Finished done = finish(first[i][j], other[j], added, has_second, has_c, c[j], bias[j]);
            out[j] = done.y;
            z[j] = done.z;
        }
        store8(y + m * y_stride + n, count, vector, out);
        if (tail.z == nullptr) continue;
        if (tail.z_is_float)
            store8(static_cast<float*>(tail.z) + m * N + n, count, vector, z);
        else
            store8(static_cast<T*>(tail.z) + m * N + n, count, vector, z);
    }
}

}  // namespace

Error lora_up(const void* base, int64_t base_stride, const void* second, void* y, int64_t y_stride, int64_t M,
              int64_t N, const Tail& tail, DType dtype, const Place& place) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int64_t kPerLoad = 16 / sizeof(T);
        const bool vector = N % kPerLoad == 0 && base_stride % kPerLoad == 0 && y_stride % kPerLoad == 0 &&
                            is_aligned(base) && is_aligned(second) && is_aligned(y) && is_aligned(tail.z);
        const dim3 grid(blocks_of(M, kTileRows), blocks_of(N, kBlockColumns));
        return FASTPEFT_LAUNCH(lora_up_kernel<T>, grid, kThreads, place, static_cast<const T*>(base), base_stride,
                               static_cast<const T*>(second), static_cast<T*>(y), y_stride, M, N, tail, vector);
    });
}

}  // namespace fastpeft::cuda

// ‖W + scale B A‖ of each row: W, dense or in 4 bits, read once, B A made tile by tile. A block has 32 rows; its warps,
// and the blocks of a cluster, take turns along K.
#include "cluster.cuh"
#include "four_bit.cuh"
#include "low_rank.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

constexpr int kColumns = 64, kRowHalves = kTileRows / 8;

// In a low precision: 64 columns a warp, of which product j of the matrix units has the columns 8 n + j, so that lane
// 4 g + t ends with 16 neighbours, 16 t …, of the rows g + 8 i.
template <typename T, bool FOUR_BIT>
__global__ __launch_bounds__(kThreads, 1) void dora_norm_kernel(Matrix weight, FourBit packed, Matrix A, const float* B,
                                                                int64_t B_stride, float scale, float* norm, int64_t N,
                                                                int64_t K, int64_t rank, bool vector, bool A_vector) {
    __shared__ float slots[kWarps / 2 * kTileRows];
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const unsigned blocks = cluster_blocks();
    const int64_t row = static_cast<int64_t>(blockIdx.x / blocks) * kTileRows;
    float entry = 0;
    if constexpr (FOUR_BIT) entry = table_entry(packed);
    const auto count_of = [&](int64_t k) { return static_cast<int>(K - k < 8 ? (K > k ? K - k : 0) : 8); };
    const auto left_at = [&](int64_t n, int64_t r) { return n < N && r < rank ? B[n * B_stride + r] * scale : 0.0f; };
    float squares[kRowHalves] = {};
    const int64_t stride = static_cast<int64_t>(blocks) * kWarps * kColumns;
    for (int64_t column = (static_cast<int64_t>(cluster_rank()) * kWarps + warp) * kColumns; column < K;
         column += stride) {
        float sums[kRowHalves / 2][8][4] = {};
        for (int64_t r = 0; r < rank; r += 16) {
            uint32_t right[8][2];  // ranks 2 t, 2 t + 1 and 2 t + 8, 2 t + 9
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t of = r + 2 * t + 8 * half, k = column + 8 * g;
                float low[8], high[8];
                load8(A, of, k, of < rank ? count_of(k) : 0, A_vector, low);
                load8(A, of + 1, k, of + 1 < rank ? count_of(k) : 0, A_vector, high);
#pragma unroll
                for (int j = 0; j < 8; ++j) right[j][half] = pair<T>(low[j], high[j]);
            }
            uint32_t left[kRowHalves / 2][4];
#pragma unroll
            for (int m = 0; m < kRowHalves / 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int64_t n = row + 16 * m + 8 * (i % 2) + g, of = r + 8 * (i / 2) + 2 * t;
                    left[m][i] = pair<T>(left_at(n, of), left_at(n, of + 1));
                }
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int m = 0; m < kRowHalves / 2; ++m) mma_16x8x16<T>(sums[m][j], left[m], right[j]);
        }
#pragma unroll
        for (int i = 0; i < kRowHalves; ++i)
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int64_t n = row + 8 * i + g, k = column + 16 * t + 8 * next;
                const int count = n < N ? count_of(k) : 0;
                float values[8] = {};
                if constexpr (FOUR_BIT) {
                    const int64_t at = n * K + k;
                    const uint32_t bytes = count ? *reinterpret_cast<const uint32_t*>(packed.packed + at / 2) : 0;
                    decode8(bytes, entry, count ? block_scale(packed, at) : 0.0f, values);
                } else {
                    load8(weight, n, k, count, vector, values);
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float value =
                        (FOUR_BIT ? rounded<T>(values[j]) : values[j]) + sums[i / 2][j][i % 2 * 2 + next];
                    squares[i] += value * value;
                }
            }
    }
#pragma unroll
    for (int i = 0; i < kRowHalves; ++i) {
        squares[i] += __shfl_xor_sync(kAllLanes, squares[i], 1);
        squares[i] += __shfl_xor_sync(kAllLanes, squares[i], 2);
    }
    const auto place = [&](int i) { return 8 * i + g; };  // the same numbers in four lanes
    sum_up<kWarps, kTileRows>(squares, slots, place, [&](int element, float sum) {
        if (row + element < N) norm[row + element] = __fsqrt_rn(sum);
    });
}

// In float32, without matrix units.
template <bool FOUR_BIT>
__global__ __launch_bounds__(kThreads, 2) void dora_norm_exact_kernel(Matrix weight, FourBit packed, Matrix right,
                                                                const float* B, int64_t B_stride, float scale,
                                                                float* norm, int64_t N, int64_t K, int64_t rank,
                                                                bool vector) {
    __shared__ float partial[kWarps][kTileRows];
    const Lane lane;
    const int warp = threadIdx.x / kWarp;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileRows;
    float entry = 0;
    if constexpr (FOUR_BIT) entry = table_entry(packed);
    float squares[kLaneRows] = {};
    for (int64_t column = warp * kTileColumns; column < K; column += kWarps * kTileColumns) {
        float sums[kLaneRows][8] = {};
        add_low_rank<float>(B, B_stride, scale, right, rank, row, N, column, K, sums);
        const int64_t k = column + lane.column;
        const int count = static_cast<int>(K - k < 0 ? 0 : K - k < 8 ? K - k : 8);
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            const int64_t n = row + lane.row + 8 * i;
            const bool inside = n < N && count > 0;
            float values[8] = {};
            if constexpr (FOUR_BIT) {
                const int64_t at = n * K + k;
                const uint32_t bytes = inside ? *reinterpret_cast<const uint32_t*>(packed.packed + at / 2) : 0;
                decode8(bytes, entry, inside ? block_scale(packed, at) : 0.0f, values);
            } else if (inside) {
                load8(weight, n, k, count, vector, values);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float value = values[j] + sums[i][j];
                squares[i] += value * value;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
        squares[i] += __shfl_xor_sync(kAllLanes, squares[i], 1);
        squares[i] += __shfl_xor_sync(kAllLanes, squares[i], 2);
        if (lane.column == 0) partial[warp][lane.row + 8 * i] = squares[i];
    }
    __syncthreads();
    if (threadIdx.x >= kTileRows || row + threadIdx.x >= N) return;
    float sum = 0;
    for (int other = 0; other < kWarps; ++other) sum += partial[other][threadIdx.x];
    norm[row + threadIdx.x] = __fsqrt_rn(sum);
}

}  // namespace

Error dora_norm(const Matrix& weight, const FourBit* four_bit, const Matrix& A, const float* B, int64_t B_stride,
                float scale, float* norm, int64_t N, int64_t K, int64_t rank, DType dtype, const Place& place) {
    const FourBit packed = four_bit == nullptr ? FourBit{} : *four_bit;
    const bool vector = rows_are_aligned(weight);
    const unsigned tiles = blocks_of(N, kTileRows);
    if (dtype == DType::f32) {
        const Matrix right = {A.data, A.dtype, A.column_stride, A.row_stride};
        const auto kernel = four_bit != nullptr ? &dora_norm_exact_kernel<true> : &dora_norm_exact_kernel<false>;
        return FASTPEFT_LAUNCH(kernel, tiles, kThreads, place, weight, packed, right, B, B_stride, scale, norm, N, K,
                               rank, vector);
    }
    const unsigned blocks = blocks_of_cluster(device_of(place.device), tiles, K / (kWarps * kColumns));
    const auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = four_bit != nullptr ? &dora_norm_kernel<T, true> : &dora_norm_kernel<T, false>;
        return FASTPEFT_LAUNCH_CLUSTERS(kernel, tiles * blocks, kThreads, blocks, place, weight, packed, A, B, B_stride,
                                        scale, norm, N, K, rank, vector, rows_are_aligned(A));
    };
    return dtype == DType::bf16 ? run(static_cast<__nv_bfloat16*>(nullptr)) : run(static_cast<__half*>(nullptr));
}

}  // namespace fastpeft::cuda

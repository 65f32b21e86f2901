// ‖W + scale B A‖ of each row: W, dense or in 4 bits, read once, B A made tile by tile. A block has 32 rows; its warps
// take turns along K.
#include "four_bit.cuh"
#include "low_rank.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <typename T, bool FOUR_BIT>
__global__ __launch_bounds__(kThreads, 2) void dora_norm_kernel(Matrix weight, FourBit packed, Matrix right,
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
        add_low_rank<T>(B, B_stride, scale, right, rank, row, N, column, K, sums);
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
                const float value = (FOUR_BIT ? rounded<T>(values[j]) : values[j]) + sums[i][j];
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
    const Matrix right = {A.data, A.dtype, A.column_stride, A.row_stride};
    const bool vector = rows_are_aligned(weight);
    const FourBit packed = four_bit == nullptr ? FourBit{} : *four_bit;
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const unsigned blocks = blocks_of(N, kTileRows);
        if (four_bit != nullptr)
            return FASTPEFT_LAUNCH((dora_norm_kernel<T, true>), blocks, kThreads, place, weight, packed, right, B,
                                   B_stride, scale, norm, N, K, rank, vector);
        return FASTPEFT_LAUNCH((dora_norm_kernel<T, false>), blocks, kThreads, place, weight, packed, right, B,
                               B_stride, scale, norm, N, K, rank, vector);
    });
}

}  // namespace fastpeft::cuda

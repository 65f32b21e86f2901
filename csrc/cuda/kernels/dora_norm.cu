// ‖W + scale B A‖ of each row, W [N, K] read once, B A made tile by tile.
#include "cluster.cuh"
#include "low_rank.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp, kRowsEach = 16, kColumns = 64;  // of a warp at once
constexpr int kAhead = 2;                                                            // steps in the registers

// In a low precision, up to 16 Steps ranks. A block has 128 rows, 16 a warp, which share their part of A, rounded, in
// shared memory; the blocks of a cluster share K. Product j of the matrix units has the columns 8 n + j, so that lane
// 4 g + t ends with 16 neighbours, 16 t …, of the rows g and g + 8.
template <typename T, int Steps>
struct Norm {
    static constexpr int kDepth = Steps == 1 ? 512 : 256, kWords = kDepth * Steps * 8;

    const Matrix &weight, &A;
    int64_t N, K, rank;
    uint32_t* part;  // by step and column 8 j + g of 64: the ranks 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of each t

    __device__ int count_of(int64_t k) const { return static_cast<int>(K > k ? (K - k < 8 ? K - k : 8) : 0); }

    __device__ void load_part(int64_t first, bool vector) const {
        constexpr int kRuns = kDepth / 8;
        for (int run = threadIdx.x; run < Steps * 8 * kRuns; run += kThreads) {  // two ranks, eight columns
            const int column = run % kRuns * 8, two = run / kRuns, step = two / 8, t = two % 4, high = two / 4 % 2;
            const int64_t r = 16 * step + 8 * high + 2 * t, k = first + column;
            float values[2][8];
            load8(A, r, k, r < rank ? count_of(k) : 0, vector, values[0]);
            load8(A, r + 1, k, r + 1 < rank ? count_of(k) : 0, vector, values[1]);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int of = (step * kDepth + column / 64 * 64 + 8 * j + column % 64 / 8) * 8 + 2 * t + high;
                part[of] = pair<T>(values[0][j], values[1][j]);
            }
        }
    }

    struct Loaded {
        uint32_t W[2][2][4];  // rows g and g + 8, columns 16 t … and 16 t + 8 …: pairs
    };
    __device__ Loaded load(int64_t row, int64_t column, int64_t end) const {
        const int t = threadIdx.x % 4;
        Loaded loaded;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int64_t n = row + 8 * i, k = column + 16 * t + 8 * next;
                load_pairs<true>(static_cast<const T*>(weight.data) + n * weight.row_stride + k,
                                 n < N && k < end ? count_of(k) : 0, loaded.W[i][next]);
            }
        return loaded;
    }
};

template <typename T, int Steps>
__global__ __launch_bounds__(kThreads, Steps == 1 ? 2 : 1) void dora_norm_kernel(Matrix weight, Matrix A,
                                                                                 const float* B, int64_t B_stride,
                                                                                 float scale, float* norm, int64_t N,
                                                                                 int64_t K, int64_t rank, int64_t depth,
                                                                                 bool A_vector) {
    using Of = Norm<T, Steps>;
    alignas(16) __shared__ uint32_t part[Of::kWords];
    __shared__ float slots[kWarps * kWarp];
    const Of of{weight, A, N, K, rank, part};
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x / cluster_blocks()) * kWarps * kRowsEach;
    const int64_t row = first_row + warp * kRowsEach + g;
    const int64_t begin = cluster_rank() * depth, end = K < begin + depth ? K : begin + depth;
    typename Of::Loaded ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = of.load(row, begin + i * kColumns, end);
    uint32_t left[Steps][4];
#pragma unroll
    for (int step = 0; step < Steps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t n = row + 8 * (i % 2), r = 16 * step + 8 * (i / 2) + 2 * t;
            const float low = n < N && r < rank ? B[n * B_stride + r] * scale : 0.0f;
            const float high = n < N && r + 1 < rank ? B[n * B_stride + r + 1] * scale : 0.0f;
            left[step][i] = pair<T>(low, high);
        }
    float squares[2] = {};
    const auto add = [&](const typename Of::Loaded& step, int at) {  // beyond K all is 0
        float sums[8][4] = {};
#pragma unroll
        for (int s = 0; s < Steps; ++s)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const uint2 right =
                    *reinterpret_cast<const uint2*>(part + (s * Of::kDepth + at + 8 * j + g) * 8 + 2 * t);
                mma_16x8x16<T>(sums[j], left[s], {right.x, right.y});
            }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int next = 0; next < 2; ++next)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float value = half_of_pair<T>(step.W[i][next][j / 2], j % 2) + sums[j][2 * i + next];
                    squares[i] += value * value;
                }
    };
    for (int64_t first = begin; first < end; first += Of::kDepth) {
        const int64_t last = end < first + Of::kDepth ? end : first + Of::kDepth;
        __syncthreads();
        of.load_part(first, A_vector);
        __syncthreads();
        for (int64_t column = first; column < last; column += kAhead * kColumns)
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {  // each step in registers of its own
                const int64_t now = column + i * kColumns;
                if (now >= last) continue;
                add(ahead[i], static_cast<int>(now - first));
                ahead[i] = of.load(row, now + kAhead * kColumns, end);
            }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        squares[i] += __shfl_xor_sync(kAllLanes, squares[i], 1);
        squares[i] += __shfl_xor_sync(kAllLanes, squares[i], 2);
        if (t == 0) slots[warp * kRowsEach + 8 * i + g] = squares[i];
    }
    sum_blocks(slots, kWarps * kRowsEach, [&](int element, float sum) {
        if (first_row + element < N) norm[first_row + element] = __fsqrt_rn(sum);
    });
}

// Any dtypes, strides and ranks: a block has 32 rows, its warps take turns along K.
template <typename T>
__global__ __launch_bounds__(kThreads, 2) void dora_norm_any_kernel(Matrix weight, Matrix right, const float* B,
                                                                    int64_t B_stride, float scale, float* norm,
                                                                    int64_t N, int64_t K, int64_t rank, bool vector) {
    __shared__ float partial[kWarps][kTileRows];
    const Lane lane;
    const int warp = threadIdx.x / kWarp;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileRows;
    float squares[kLaneRows] = {};
    for (int64_t column = warp * kTileColumns; column < K; column += kWarps * kTileColumns) {
        float sums[kLaneRows][8] = {};
        add_low_rank<T>(B, B_stride, scale, right, rank, row, N, column, K, sums);
        const int64_t k = column + lane.column;
        const int count = static_cast<int>(K - k < 0 ? 0 : K - k < 8 ? K - k : 8);
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            const int64_t n = row + lane.row + 8 * i;
            float values[8] = {};
            if (n < N && count > 0) load8(weight, n, k, count, vector, values);
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

Error dora_norm(const Matrix& weight, const Matrix& A, const float* B, int64_t B_stride, float scale, float* norm,
                int64_t N, int64_t K, int64_t rank, DType dtype, const Place& place) {
    const bool vector = rows_are_aligned(weight), A_vector = rows_are_aligned(A);
    const bool fast = dtype != DType::f32 && weight.dtype == dtype && weight.column_stride == 1 && vector && K % 8 == 0;
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<T, float>) {
            constexpr int kMostSteps = 4;
            if (fast && rank <= 16 * kMostSteps) {
                const unsigned tiles = blocks_of(N, kWarps * kRowsEach);
                const unsigned blocks = blocks_of_cluster(device_of(place.device), tiles, K / (2 * kColumns));
                const int64_t depth = static_cast<int64_t>(blocks_of(K, kColumns * blocks)) * kColumns;
                const auto kernel = rank <= 16 ? &dora_norm_kernel<T, 1> : &dora_norm_kernel<T, kMostSteps>;
                return FASTPEFT_LAUNCH_CLUSTERS(kernel, tiles * blocks, kThreads, blocks, place, weight, A, B, B_stride,
                                                scale, norm, N, K, rank, depth, A_vector);
            }
        }
        const Matrix right = {A.data, A.dtype, A.columns, A.rows, A.column_stride, A.row_stride};
        return FASTPEFT_LAUNCH((dora_norm_any_kernel<T>), blocks_of(N, kTileRows), kThreads, place, weight, right, B,
                               B_stride, scale, norm, N, K, rank, vector);
    });
}

}  // namespace fastpeft::cuda

// x Wᵀ of up to eight tokens with W decoded in the loop: generation. A block has 16 rows of W, its warps take turns
// along K in groups of 64 elements, which share a scale. In the low precisions eight tokens are the columns of one
// product of the matrix units, and a byte of W is a pair of its operand: looked up in a table of which each lane has a
// copy.
#include "four_bit.cuh"
#include "tail.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kRows = 16, kBytes = 256, kAhead = 4;

// Of lane 4 g + t: the eight bytes of row g of the block (and of row g + 8), 16 elements from 16 t on.
struct Codes {
    uint2 row[2];
    float scale[2];
};

__device__ __forceinline__ Codes load_codes(const FourBit& weight, int64_t first_row, int64_t N, int64_t K, int64_t k) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    Codes codes = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t n = first_row + g + 8 * i;
        if (n >= N || k >= K) break;
        codes.row[i] = reinterpret_cast<const uint2*>(weight.packed + (n * K + k) / 2)[t];
        codes.scale[i] = block_scale(weight, n * K + k);
    }
    return codes;
}

template <typename T>
struct Product {  // sums[i][j]: row g + 8 i, token 2 t + j
    static constexpr int kTable = kBytes * kWarp;
    uint32_t* table;
    float sums[2][2] = {};

    __device__ Product(uint32_t* table, const FourBit& weight) : table(table) {
        for (int i = threadIdx.x; i < kTable; i += kThreads)
            table[i] = pair<T>(weight.code[i / kWarp >> 4], weight.code[i / kWarp & 15]);
    }

    __device__ void add(const Codes& codes, const T* x, int64_t M, int64_t K, int64_t k) {
        const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
        uint4 tokens[2] = {};
        if (g < M) {
#pragma unroll
            for (int i = 0; i < 2; ++i) tokens[i] = reinterpret_cast<const uint4*>(x + g * K + k + 16 * t)[i];
        }
        const uint32_t b[4][2] = {{tokens[0].x, tokens[0].y},
                                  {tokens[0].z, tokens[0].w},
                                  {tokens[1].x, tokens[1].y},
                                  {tokens[1].z, tokens[1].w}};
        float d[4] = {};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t word = step < 2 ? codes.row[i % 2].x : codes.row[i % 2].y;
                a[i] = table[(word >> (16 * (step % 2) + 8 * (i / 2)) & 255) * kWarp + lane];
            }
            mma_16x8x16<T>(d, a, b[step]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] += d[i] * codes.scale[i / 2];
    }

    __device__ void store(float (&partial)[kRows][kFewTokens]) {
        const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[g + 8 * (i / 2)][2 * t + i % 2] = sums[i / 2][i % 2];
    }
};

template <>
struct Product<float> {  // sums[i][m]: row g + 8 i, token m, of the lane's own elements
    static constexpr int kTable = 16;
    uint32_t* table;
    float sums[2][kFewTokens] = {};

    __device__ Product(uint32_t* table, const FourBit& weight) : table(table) {
        if (threadIdx.x < kTable) reinterpret_cast<float*>(table)[threadIdx.x] = weight.code[threadIdx.x];
    }

    __device__ void add(const Codes& codes, const float* x, int64_t M, int64_t K, int64_t k) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            float w[2][8];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const uint32_t word = run ? codes.row[i].y : codes.row[i].x;
                    const int code = word >> (8 * (j / 2) + (j % 2 ? 0 : 4)) & 15;
                    w[i][j] = reinterpret_cast<const float*>(table)[code] * codes.scale[i];
                }
#pragma unroll
            for (int m = 0; m < kFewTokens; ++m) {
                if (m >= M) break;
                float values[8];
                load8(x + m * K + k + 16 * t + 8 * run, 8, true, values);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int j = 0; j < 8; ++j) sums[i][m] += w[i][j] * values[j];
            }
        }
    }

    __device__ void store(float (&partial)[kRows][kFewTokens]) {
        const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int m = 0; m < kFewTokens; ++m) {
                sums[i][m] += __shfl_xor_sync(kAllLanes, sums[i][m], 1);
                sums[i][m] += __shfl_xor_sync(kAllLanes, sums[i][m], 2);
                if (t == 0) partial[g + 8 * i][m] = sums[i][m];
            }
    }
};

template <typename T>
__global__ __launch_bounds__(kThreads) void four_bit_linear_kernel(const T* x, FourBit weight, T* y, int64_t M,
                                                                   int64_t N, int64_t K, Tail tail) {
    __shared__ uint32_t table[Product<T>::kTable];
    __shared__ float partial[kWarps][kRows][kFewTokens];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows;
    const int warp = threadIdx.x / kWarp;
    constexpr int64_t kStep = kWarps * kGroup;
    int64_t k = warp * kGroup;
    Codes ahead[kAhead];  // on their way, the first ones while the table is made
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = load_codes(weight, row, N, K, k + i * kStep);
    Product<T> product(table, weight);
    __syncthreads();
    while (k < K) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i, k += kStep) {
            const Codes codes = ahead[i];
            ahead[i] = load_codes(weight, row, N, K, k + kAhead * kStep);
            if (k < K) product.add(codes, x, M, K, k);
        }
    }
    product.store(partial[warp]);
    __syncthreads();
    const int64_t m = threadIdx.x / kRows, n = row + threadIdx.x % kRows;
    if (m >= M || n >= N) return;
    float base = 0, delta = 0;
    for (int other = 0; other < kWarps; ++other) base += partial[other][threadIdx.x % kRows][m];
    for (int64_t r = 0; r < tail.rank; ++r)
        delta += rounded<T>(tail.q[m * tail.q_stride + r] * tail.scale) *
                 rounded<T>(element(tail.right.data, tail.right.dtype,
                                    n * tail.right.row_stride + r * tail.right.column_stride));
    const bool has_c = tail.c != nullptr;
    const Finished done = finish(base, 0.0f, delta, false, has_c, has_c ? tail.c[n] : 0.0f, bias_of(tail, n));
    y[m * N + n] = Convert<T>::from(done.y);
    if (tail.z == nullptr) return;
    if (tail.z_is_float)
        static_cast<float*>(tail.z)[m * N + n] = done.z;
    else
        static_cast<T*>(tail.z)[m * N + n] = Convert<T>::from(done.z);
}

}  // namespace

Error four_bit_linear(const void* x, const FourBit& weight, void* y, int64_t M, int64_t N, int64_t K, const Tail& tail,
                      DType dtype, const Place& place) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return FASTPEFT_LAUNCH(four_bit_linear_kernel<T>, blocks_of(N, kRows), kThreads, place,
                               static_cast<const T*>(x), weight, static_cast<T*>(y), M, N, K, tail);
    });
}

}  // namespace fastpeft::cuda

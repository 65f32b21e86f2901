// u = D(x) Aᵀ of many tokens in a low precision. A lane reads 8 neighbours of a row, 16 bytes and one draw of the mask:
// two operands of the matrix units, whose sum does not mind in which order it takes its terms. Warps and the blocks of a
// cluster share K. Other blocks of the launch round the adapter's other factor for the product that comes next.
#include "cluster.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp, kStep = 32;
constexpr int kRunsEach = 4;  // of 8 elements that a thread rounds

// The tile of a block: Ranks ranks, as many rows as the registers hold beside each other.
template <int Ranks>
struct Tile {
    static constexpr int kRows = Ranks == 64 ? 32 : 64, kSize = kRows * Ranks;
    static constexpr int kRowTiles = kRows / 16, kRankTiles = Ranks / 8, kSums = kRowTiles * kRankTiles * 4;
};

// The eight neighbours k … of row r of A, times factor[k …].
__device__ __forceinline__ void load_factor(const Matrix& A, const float* factor, int64_t r, int64_t rank, int64_t k,
                                            int count, bool vector, float (&out)[8]) {
    if (r >= rank) count = 0;
    load8(A, r, k, count, vector, out);
    if (factor == nullptr) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i < count ? out[i] * factor[k + i] : 0.0f;
}

template <typename T>
__device__ void round_rows(const Cast& cast, int64_t block) {
    const int64_t runs = (cast.columns + 7) / 8, all = cast.rows * runs;
    for (int i = 0; i < kRunsEach; ++i) {
        const int64_t run = (block * kRunsEach + i) * kThreads + threadIdx.x;
        if (run >= all) return;
        const int64_t row = run / runs, column = run % runs * 8;
        const int count = static_cast<int>(cast.columns - column < 8 ? cast.columns - column : 8);
        float values[8];
        load8(cast.from, row, column, count, false, values);
        store8(static_cast<T*>(cast.to) + row * cast.to_stride + column, count, count == 8, values);
    }
}

template <typename T, int Ranks>
__global__ __launch_bounds__(kThreads) void lora_down_many_kernel(const T* x, int64_t x_stride, DownOperands o,
                                                                  DownOutputs out, Cast cast, unsigned down_blocks,
                                                                  bool vector, bool A_vector) {
    using Sums = Tile<Ranks>;
    __shared__ float slots[kWarps / 2 * Sums::kSize];
    if (blockIdx.x >= down_blocks) {
        if (blockIdx.y == 0) round_rows<T>(cast, blockIdx.x - down_blocks);
        return;  // the whole cluster
    }
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const unsigned blocks = cluster_blocks();
    const int64_t row = static_cast<int64_t>(blockIdx.x / blocks) * Sums::kRows;
    const int64_t first_rank = static_cast<int64_t>(blockIdx.y) * Ranks;
    float sums[Sums::kSums] = {};
    const uint64_t seed = o.threshold ? static_cast<uint64_t>(*o.seed) : 0;
    const int64_t stride = static_cast<int64_t>(blocks) * kWarps * kStep;
    for (int64_t k = (static_cast<int64_t>(cluster_rank()) * kWarps + warp) * kStep; k < o.K; k += stride) {
        const int64_t at = k + 8 * t;
        const int count = static_cast<int>(o.K - at < 8 ? (o.K > at ? o.K - at : 0) : 8);
        uint32_t left[Sums::kRowTiles][2][4];  // rows g and g + 8, pairs of neighbours
#pragma unroll
        for (int i = 0; i < Sums::kRowTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t m = row + 16 * i + 8 * half + g;
                load_pairs(x + m * x_stride + at, m < o.M ? count : 0, vector, left[i][half]);
            }
        float factors[Sums::kRankTiles][8];
#pragma unroll
        for (int j = 0; j < Sums::kRankTiles; ++j)
            load_factor(o.A, o.factor, first_rank + 8 * j + g, o.rank, at, count, A_vector, factors[j]);
        if (o.threshold) {
#pragma unroll
            for (int i = 0; i < Sums::kRowTiles; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    drop_pairs(keep8(seed, o.threshold, static_cast<uint32_t>(row + 16 * i + 8 * half + g),
                                     static_cast<uint32_t>(at / 8)),
                               left[i][half]);
        }
#pragma unroll
        for (int j = 0; j < Sums::kRankTiles; ++j) {
            uint32_t right[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) right[i] = pair<T>(factors[j][2 * i], factors[j][2 * i + 1]);
#pragma unroll
            for (int i = 0; i < Sums::kRowTiles; ++i) {
                float(&d)[4] = *reinterpret_cast<float(*)[4]>(&sums[(i * Sums::kRankTiles + j) * 4]);
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    const uint32_t a[4] = {left[i][0][2 * step], left[i][1][2 * step], left[i][0][2 * step + 1],
                                           left[i][1][2 * step + 1]};
                    const uint32_t b[2] = {right[2 * step], right[2 * step + 1]};
                    mma_16x8x16<T>(d, a, b);
                }
            }
        }
    }
    const auto place = [&](int i) {  // of sums[i] in the tile [rows, ranks]
        const int tile = i / 4, m = tile / Sums::kRankTiles * 16 + i % 4 / 2 * 8 + g;
        return m * Ranks + tile % Sums::kRankTiles * 8 + 2 * t + i % 2;
    };
    sum_up<kWarps, Sums::kSize>(sums, slots, place, [&](int element, float sum) {
        const int64_t m = row + element / Ranks, r = first_rank + element % Ranks;
        if (m >= o.M || r >= o.rank) return;
        if (o.index != nullptr && o.index[m] != o.adapter) sum = 0;
        if (out.u != nullptr) out.u[m * out.u_stride + r] = sum * out.u_scale;
        if (out.q != nullptr) static_cast<T*>(out.q)[m * out.q_stride + r] = Convert<T>::from(sum * out.q_scale);
    });
}

template <typename T, int Ranks>
Error launch(const DownOperands& o, const DownOutputs& out, const Cast& cast, const Place& place) {
    const unsigned rows = blocks_of(o.M, Tile<Ranks>::kRows), ranks = blocks_of(o.rank, Ranks);
    const Device device = device_of(place.device);
    const unsigned blocks = blocks_of_cluster(device, rows * ranks, o.K / (kWarps * kStep));
    const unsigned down = rows * blocks;
    const int64_t runs = cast.rows * ((cast.columns + 7) / 8);
    const unsigned rounding = (blocks_of(runs, kRunsEach * kThreads) + blocks - 1) / blocks * blocks;
    const bool vector = o.x_stride % 8 == 0 && is_aligned(o.x);
    return FASTPEFT_LAUNCH_CLUSTERS((lora_down_many_kernel<T, Ranks>), dim3(down + rounding, ranks), kThreads, blocks,
                                    place, static_cast<const T*>(o.x), o.x_stride, o, out, cast, down, vector,
                                    rows_are_aligned(o.A));
}

}  // namespace

Error lora_down_many(const DownOperands& o, const DownOutputs& out, const Cast& cast, DType dtype,
                     const Place& place) {
    const auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (o.rank <= 16) return launch<T, 16>(o, out, cast, place);
        if (o.rank <= 32) return launch<T, 32>(o, out, cast, place);
        return launch<T, 64>(o, out, cast, place);
    };
    return dtype == DType::bf16 ? run(static_cast<__nv_bfloat16*>(nullptr)) : run(static_cast<__half*>(nullptr));
}

}  // namespace fastpeft::cuda

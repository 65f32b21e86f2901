// u = D(x) Aᵀ of many tokens in a low precision. A lane reads 8 neighbours of a row, 16 bytes and one draw of the mask:
// two operands of the matrix units, whose sum does not mind in which order it takes its terms. A warp has 16 tokens;
// the block's warps share A, rounded, in shared memory; the blocks of a cluster share K. Other blocks of the launch
// round the adapter's other factor for the product that comes next.
#include "cluster.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kMostWarps = 8, kRowsEach = 16, kStep = 64;  // tokens of a warp, inputs that it takes at once
constexpr int kRunsEach = 4;                               // of 8 elements that a thread rounds, or loads at once

// A's part [Ranks, kDepth] in shared memory, its rows apart so that the lanes of a warp find it in different banks.
template <int Ranks>
struct Part {
    static constexpr int kDepth = Ranks == 64 ? 256 : 512, kRow = kDepth + 32, kRankTiles = Ranks / 8;
    static constexpr int kSums = kRankTiles * 4, kWords = Ranks * kRow / 2;
    static constexpr int kAhead = 2;  // steps in the registers; a whole number of times in kDepth
    static_assert(kDepth % (kAhead * kStep) == 0);
    static_assert(kMostWarps * kSums * kWarp <= kWords);  // the sums take its place
};

template <typename T, int Ranks>
__device__ __forceinline__ void load_part(const DownOperands& o, int64_t first_rank, int64_t first, int64_t last,
                                          bool vector, uint32_t* part) {
    using P = Part<Ranks>;
    constexpr int kRuns = P::kDepth / 8;
    // Neighbouring threads take neighbouring elements of A, along whichever dimension these are.
    const bool by_rank = o.A.column_stride != 1;
    const auto place = [&](int run, int& r, int& at) {
        r = by_rank ? run % Ranks : run / kRuns;
        at = (by_rank ? run / Ranks : run % kRuns) * 8;
    };
    for (int run = threadIdx.x; run < Ranks * kRuns; run += kRunsEach * blockDim.x) {
        float values[kRunsEach][8];
#pragma unroll
        for (int i = 0; i < kRunsEach; ++i) {
            int r, at;
            place(run + i * blockDim.x, r, at);
            const int64_t k = first + at;
            const int left = static_cast<int>(last > k ? (last - k < 8 ? last - k : 8) : 0);
            load8(o.A, first_rank + r, k, r < Ranks && first_rank + r < o.rank ? left : 0, vector, values[i]);
        }
#pragma unroll
        for (int i = 0; i < kRunsEach; ++i) {
            int r, at;
            place(run + i * blockDim.x, r, at);
            if (run + i * blockDim.x >= Ranks * kRuns) break;
            if (o.factor != nullptr) {
#pragma unroll
                for (int j = 0; j < 8; ++j) values[i][j] *= first + at + j < last ? o.factor[first + at + j] : 0.0f;
            }
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) words[j] = pair<T>(values[i][2 * j], values[i][2 * j + 1]);
            *reinterpret_cast<uint4*>(part + (r * P::kRow + at) / 2) = {words[0], words[1], words[2], words[3]};
        }
    }
}

template <typename T>
__device__ void round_rows(const Cast& cast, int64_t block, bool cast_vector) {
    const int64_t runs = (cast.columns + 7) / 8, all = cast.rows * runs;
    for (int i = 0; i < kRunsEach; ++i) {
        const int64_t run = (block * kRunsEach + i) * blockDim.x + threadIdx.x;
        if (run >= all) return;
        // As in load_part.
        const bool by_row = cast.from.column_stride != 1;
        const int64_t row = by_row ? run % cast.rows : run / runs, column = (by_row ? run / cast.rows : run % runs) * 8;
        const int count = static_cast<int>(cast.columns - column < 8 ? cast.columns - column : 8);
        float values[8];
        load8(cast.from, row, column, count, cast_vector, values);
        store8(static_cast<T*>(cast.to) + row * cast.to_stride + column, count, count == 8, values);
    }
}

// Of the rows g and g + 8 of a warp, inputs 8 t … and 32 + 8 t …: pairs of neighbours.
struct Loaded {
    uint32_t pairs[2][2][4];
};

template <bool Vector, typename T>
__device__ __forceinline__ Loaded load_tokens(const T* x, int64_t x_stride, const DownOperands& o, int64_t row,
                                              int64_t k, int64_t last) {
    const int t = threadIdx.x % 4;
    Loaded loaded;
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t at = k + 32 * part + 8 * t, m = row + 8 * half;
            const int left = static_cast<int>(last > at ? (last - at < 8 ? last - at : 8) : 0);
            load_pairs<Vector>(x + m * x_stride + at, m < o.M ? left : 0, loaded.pairs[part][half]);
        }
    return loaded;
}

template <typename T, int Ranks, bool Vector>
__global__ __launch_bounds__(kMostWarps* kWarp,
                             Ranks == 16 ? 2 : 1) void lora_down_many_kernel(const T* x, int64_t x_stride,
                                                                             DownOperands o, DownOutputs out, Cast cast,
                                                                             unsigned down_blocks, int64_t depth,
                                                                             bool A_vector, bool cast_vector) {
    using P = Part<Ranks>;
    alignas(16) __shared__ uint32_t part[P::kWords];
    if (blockIdx.x >= down_blocks) {
        if (blockIdx.y == 0) round_rows<T>(cast, blockIdx.x - down_blocks, cast_vector);
        return;  // the whole cluster
    }
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int warps = blockDim.x / kWarp;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x / cluster_blocks()) * warps * kRowsEach;
    const int64_t row = first_row + warp * kRowsEach + g, first_rank = static_cast<int64_t>(blockIdx.y) * Ranks;
    const int64_t begin = cluster_rank() * depth, end = o.K < begin + depth ? o.K : begin + depth;
    const uint64_t seed = o.threshold ? static_cast<uint64_t>(*o.seed) : 0;
    float sums[P::kSums] = {};
    const auto add = [&](Loaded& step, int64_t k, int at_part) {
#pragma unroll
        for (int half_step = 0; half_step < 2; ++half_step) {
            auto& [low, high] = step.pairs[half_step];
            if (o.threshold) {
                const auto group = static_cast<uint32_t>((k + 32 * half_step) / 8 + t);
                drop_pairs(philox_keep(seed, o.threshold, static_cast<uint32_t>(row), group), low);
                drop_pairs(philox_keep(seed, o.threshold, static_cast<uint32_t>(row + 8), group), high);
            }
#pragma unroll
            for (int j = 0; j < P::kRankTiles; ++j) {
                const uint4 word = *reinterpret_cast<const uint4*>(
                    part + ((8 * j + g) * P::kRow + at_part + 32 * half_step + 8 * t) / 2);
                float (&d)[4] = *reinterpret_cast<float (*)[4]>(&sums[4 * j]);
                mma_16x8x16<T>(d, {low[0], high[0], low[1], high[1]}, {word.x, word.y});
                mma_16x8x16<T>(d, {low[2], high[2], low[3], high[3]}, {word.z, word.w});
            }
        }
    };
    Loaded ahead[P::kAhead];
#pragma unroll
    for (int i = 0; i < P::kAhead; ++i) ahead[i] = load_tokens<Vector>(x, x_stride, o, row, begin + i * kStep, end);
    for (int64_t first = begin; first < end; first += P::kDepth) {
        const int64_t last = end < first + P::kDepth ? end : first + P::kDepth;
        __syncthreads();
        load_part<T, Ranks>(o, first_rank, first, last, A_vector, part);
        __syncthreads();
        for (int64_t k = first; k < last; k += P::kAhead * kStep)
#pragma unroll
            for (int i = 0; i < P::kAhead; ++i) {  // each step in registers of its own
                const int64_t now = k + i * kStep;
                if (now >= last) continue;
                add(ahead[i], now, static_cast<int>(now - first));
                ahead[i] = load_tokens<Vector>(x, x_stride, o, row, now + P::kAhead * kStep, end);
            }
    }
    const auto finish = [&](int of_warp, int i, int of_lane, float sum) {
        const int64_t m = first_row + of_warp * kRowsEach + i % 4 / 2 * 8 + of_lane / 4;
        const int64_t r = first_rank + i / 4 * 8 + of_lane % 4 * 2 + i % 2;
        if (m >= o.M || r >= o.rank) return;
        if (o.index != nullptr && o.index[m] != o.adapter) sum = 0;
        if (out.u != nullptr) out.u[m * out.u_stride + r] = sum * out.u_scale;
        if (out.q != nullptr) static_cast<T*>(out.q)[m * out.q_stride + r] = Convert<T>::from(sum * out.q_scale);
    };
    if (cluster_blocks() == 1) {
#pragma unroll
        for (int i = 0; i < P::kSums; ++i) finish(warp, i, lane, sums[i]);
        return;
    }
    __syncthreads();
    float* slots = reinterpret_cast<float*>(part);
#pragma unroll
    for (int i = 0; i < P::kSums; ++i) slots[(warp * P::kSums + i) * kWarp + lane] = sums[i];
    sum_blocks(slots, warps * P::kSums * kWarp, [&](int element, float sum) {
        finish(element / (P::kSums * kWarp), element / kWarp % P::kSums, element % kWarp, sum);
    });
}

template <typename T, int Ranks>
Error launch(const DownOperands& o, const DownOutputs& out, const Cast& cast, const Place& place) {
    const Device device = device_of(place.device);
    constexpr int64_t kManyTokens = 2048;  // from here on twice as many share a block's part of A
    const int warps = o.M < kManyTokens ? kMostWarps / 2 : kMostWarps;
    const unsigned rows = blocks_of(o.M, warps * kRowsEach), ranks = blocks_of(o.rank, Ranks);
    const unsigned blocks = blocks_of_cluster(device, rows * ranks, o.K / (2 * kStep));
    const int64_t depth = static_cast<int64_t>(blocks_of(o.K, kStep * blocks)) * kStep;
    const unsigned down = rows * blocks;
    const int64_t runs = cast.rows * ((cast.columns + 7) / 8);
    const unsigned rounding = (blocks_of(runs, kRunsEach * warps * kWarp) + blocks - 1) / blocks * blocks;
    const bool vector = o.K % 8 == 0 && o.x_stride % 8 == 0 && is_aligned(o.x);
    const auto kernel = vector ? &lora_down_many_kernel<T, Ranks, true> : &lora_down_many_kernel<T, Ranks, false>;
    return FASTPEFT_LAUNCH_CLUSTERS(kernel, dim3(down + rounding, ranks), warps * kWarp, blocks, place,
                                    static_cast<const T*>(o.x), o.x_stride, o, out, cast, down, depth,
                                    rows_are_aligned(o.A), rows_are_aligned(cast.from));
}

}  // namespace

Error lora_down_many(const DownOperands& o, const DownOutputs& out, const Cast& cast, DType dtype, const Place& place) {
    const auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (o.rank <= 16) return launch<T, 16>(o, out, cast, place);
        if (o.rank <= 32) return launch<T, 32>(o, out, cast, place);
        return launch<T, 64>(o, out, cast, place);
    };
    return dtype == DType::bf16 ? run(static_cast<__nv_bfloat16*>(nullptr)) : run(static_cast<__half*>(nullptr));
}

}  // namespace fastpeft::cuda

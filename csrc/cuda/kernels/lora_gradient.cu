// Sums over tokens: qᵀ (c ∘ D(x)) [r, C] of x [M, C], which is dA of x and dBᵀ of dy; beside it DoRA's dc and c ∘ dy. A
// lane reads 8 neighbours of four tokens, 16 bytes and one draw of the mask each, and pairs tokens up for the matrix
// units. Warps and the blocks of a cluster share the tokens.
#include "cluster.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kColumns = 64, kTokens = 16;
constexpr int kMostRanks = 32, kMostRanksScaled = 16;  // of a block: more do not fit the registers

template <int Ranks, bool Scaled>
struct Tile {
    static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
    static constexpr int kRankTiles = Ranks / 16, kSums = kRankTiles * 8 * 4;
};

// Of the tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of a step: eight neighbours as pairs, z beside them, and q, not yet
// converted, of the ranks g and g + 8 of each tile of 16.
template <typename Q, int RankTiles, bool Scaled>
struct Loaded {
    uint32_t token[4][4], z[Scaled ? 4 : 1][4];
    Q q[RankTiles][4][2];
};

template <typename T, typename Q, int Ranks, bool Scaled, bool Vector>
__global__ __launch_bounds__(Tile<Ranks, Scaled>::kThreads,
                             Ranks == 16 && Vector && !Scaled ? 2 : 1) void lora_gradient_kernel(const T* x,
                                                                                                 GradientOperands o,
                                                                                                 GradientOutputs out) {
    constexpr int kAhead = Vector ? 2 : 1;  // steps in the registers, of which one is computed
    using Sums = Tile<Ranks, Scaled>;
    using Step = Loaded<Q, Sums::kRankTiles, Scaled>;
    __shared__ float slots[Sums::kWarps / 2 * Sums::kSums * kWarp];
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const unsigned blocks = cluster_blocks();
    const int64_t column = static_cast<int64_t>(blockIdx.x / blocks) * kColumns, at = column + 8 * g;
    const int64_t first_rank = static_cast<int64_t>(blockIdx.y) * Ranks;
    const int count = static_cast<int>(o.columns - at < 8 ? (o.columns > at ? o.columns - at : 0) : 8);
    const uint64_t seed = o.threshold ? static_cast<uint64_t>(*o.seed) : 0;
    const bool first = blockIdx.y == 0;  // of the blocks that read these columns
    const bool sums_c = Scaled && first && out.dc != nullptr, makes_dz = Scaled && first && out.dz != nullptr;
    float sums[Sums::kSums] = {}, dc[8] = {}, c[8] = {};
    if constexpr (Scaled) {
#pragma unroll
        for (int j = 0; j < 8; ++j) c[j] = j < count ? o.c[at + j] : 0.0f;
    }
    const auto token_of = [&](int64_t m, int i) { return m + 2 * t + i % 2 + i / 2 * 8; };
    const auto q_at = [&](int64_t token, int64_t r) {
        Q value = Convert<Q>::from(0.0f);
        if (token < o.M && r < o.rank)
            value = static_cast<const Q*>(o.q.data)[token * o.q.row_stride + r * o.q.column_stride];
        return value;
    };
    const auto load = [&](int64_t m) {
        Step step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t token = token_of(m, i);
            const int here = token < o.M ? count : 0;
            load_pairs<Vector>(x + token * o.x_stride + at, here, step.token[i]);
            if constexpr (Scaled)
                if (sums_c) load_pairs<Vector>(static_cast<const T*>(o.z) + token * o.columns + at, here, step.z[i]);
        }
        if (out.sums != nullptr) {
#pragma unroll
            for (int i = 0; i < Sums::kRankTiles; ++i)
#pragma unroll
                for (int part = 0; part < 4; ++part)
#pragma unroll
                    for (int next = 0; next < 2; ++next)
                        step.q[i][part][next] =
                            q_at(token_of(m, part / 2 * 2 + next), first_rank + 16 * i + part % 2 * 8 + g);
        }
        return step;
    };
    const int64_t stride = static_cast<int64_t>(blocks) * Sums::kWarps * kTokens;
    // Tokens beyond the last one are 0.
    const auto add = [&](Step& now, int64_t m) {
        if (o.threshold) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                drop_pairs(philox_keep(seed, o.threshold, static_cast<uint32_t>(token_of(m, i)),
                                       static_cast<uint32_t>(at / 8)),
                           now.token[i]);
        }
        if constexpr (Scaled) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float scaled[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float value = half_of_pair<T>(now.token[i][j / 2], j % 2);
                    if (sums_c) dc[j] += value * half_of_pair<T>(now.z[i][j / 2], j % 2);
                    scaled[j] = value * c[j];
                }
                if (makes_dz)
                    store8(static_cast<T*>(out.dz) + token_of(m, i) * o.columns + at, token_of(m, i) < o.M ? count : 0,
                           Vector, scaled);
            }
        }
        if (out.sums == nullptr) return;
        uint32_t right[8][2];
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                right[j][half] = same_halves(now.token[2 * half][j / 2], now.token[2 * half + 1][j / 2], j % 2);
#pragma unroll
        for (int i = 0; i < Sums::kRankTiles; ++i) {
            uint32_t a[4];
#pragma unroll
            for (int part = 0; part < 4; ++part)
                a[part] = pair<T>(to_float(now.q[i][part][0]) * o.scale, to_float(now.q[i][part][1]) * o.scale);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float (&d)[4] = *reinterpret_cast<float (*)[4]>(&sums[(i * 8 + j) * 4]);
                mma_16x8x16<T>(d, a, right[j]);
            }
        }
    };
    Step ahead[kAhead];
    const int64_t begin = (static_cast<int64_t>(cluster_rank()) * Sums::kWarps + warp) * kTokens;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = load(begin + i * stride);
    for (int64_t m = begin; m < o.M; m += kAhead * stride)
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {  // each step in registers of its own
            add(ahead[i], m + i * stride);
            ahead[i] = load(m + (i + kAhead) * stride);
        }
    if (out.sums != nullptr) {
        // sums[i] of lane 4 g + t: rank g (+ 8) of a tile, of product j the columns 8 n + j, n = 2 t and the next.
        sum_up<Sums::kWarps>(sums, slots, [&](int i, int lane, float sum) {
            const int64_t r = first_rank + i / 32 * 16 + i % 4 / 2 * 8 + lane / 4;
            const int64_t n = column + 8 * (lane % 4 * 2 + i % 2) + i / 4 % 8;
            if (r >= o.rank || n >= o.columns) return;
            if (Scaled) sum *= o.c[n];
            const int64_t to = r * out.sums_rank_stride + n * out.sums_column_stride;
            switch (out.sums_dtype) {
                case DType::f32:
                    static_cast<float*>(out.sums)[to] = sum;
                    break;
                case DType::bf16:
                    static_cast<__nv_bfloat16*>(out.sums)[to] = Convert<__nv_bfloat16>::from(sum);
                    break;
                case DType::f16:
                    static_cast<__half*>(out.sums)[to] = Convert<__half>::from(sum);
            }
        });
    }
    if constexpr (Scaled) {
        if (!sums_c) return;  // the whole cluster
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            dc[j] += __shfl_xor_sync(kAllLanes, dc[j], 1);
            dc[j] += __shfl_xor_sync(kAllLanes, dc[j], 2);
        }
        sum_up<Sums::kWarps>(dc, slots, [&](int j, int lane, float sum) {  // the same sum in four lanes
            const int64_t n = column + lane / 4 * 8 + j;
            if (lane % 4 == 0 && n < o.columns) out.dc[n] = sum;
        });
    }
}

template <typename T, typename Q, int Ranks, bool Scaled>
Error launch(const GradientOperands& o, const GradientOutputs& out, const Place& place) {
    using Sums = Tile<Ranks, Scaled>;
    const Device device = device_of(place.device);
    const unsigned columns = blocks_of(o.columns, kColumns), ranks = blocks_of(o.rank, Ranks);
    const unsigned blocks = blocks_of_cluster(device, columns * ranks, o.M / (Sums::kWarps * kTokens));
    const bool vector =
        o.columns % 8 == 0 && o.x_stride % 8 == 0 && is_aligned(o.x) && is_aligned(o.z) && is_aligned(out.dz);
    const auto kernel =
        vector ? &lora_gradient_kernel<T, Q, Ranks, Scaled, true> : &lora_gradient_kernel<T, Q, Ranks, Scaled, false>;
    return FASTPEFT_LAUNCH_CLUSTERS(kernel, dim3(columns * blocks, ranks), Sums::kThreads, blocks, place,
                                    static_cast<const T*>(o.x), o, out);
}

template <typename T, int Ranks>
Error launch(const GradientOperands& o, const GradientOutputs& out, const Place& place) {
    if constexpr (Ranks <= kMostRanksScaled)
        if (o.c != nullptr) return launch<T, float, Ranks, true>(o, out, place);
    if (o.q.dtype != DType::f32) return launch<T, T, Ranks, false>(o, out, place);
    return launch<T, float, Ranks, false>(o, out, place);
}

}  // namespace

Error lora_gradient(const GradientOperands& o, const GradientOutputs& out, DType dtype, const Place& place) {
    const auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return o.rank <= 16 || o.c != nullptr ? launch<T, kMostRanksScaled>(o, out, place)
                                              : launch<T, kMostRanks>(o, out, place);
    };
    return dtype == DType::bf16 ? run(static_cast<__nv_bfloat16*>(nullptr)) : run(static_cast<__half*>(nullptr));
}

}  // namespace fastpeft::cuda

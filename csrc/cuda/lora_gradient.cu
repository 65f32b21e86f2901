// Sums over tokens: qᵀ (c ∘ D(x)) [r, C] of x [M, C], which is dA of x and dBᵀ of dy; beside it DoRA's dc and c ∘ dy. A
// lane reads 8 neighbours of four tokens, 16 bytes and one draw of the mask each, and pairs tokens up for the matrix
// units. Warps and the blocks of a cluster share the tokens.
#include "cluster.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kColumns = 64, kTokens = 16;

template <int Ranks>
struct Tile {
    static constexpr int kWarps = Ranks == 64 ? 4 : 8, kThreads = kWarps * kWarp, kSize = Ranks * kColumns;
    static constexpr int kRankTiles = Ranks / 16, kSums = kRankTiles * 8 * 4;
};

template <typename T, typename Q, int Ranks, bool Scaled>
__global__ __launch_bounds__(Tile<Ranks>::kThreads) void lora_gradient_kernel(const T* x, GradientOperands o,
                                                                              GradientOutputs out, bool vector) {
    using Sums = Tile<Ranks>;
    __shared__ float slots[Sums::kWarps / 2 * Sums::kSize];
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const unsigned blocks = cluster_blocks();
    const int64_t column = static_cast<int64_t>(blockIdx.x / blocks) * kColumns, at = column + 8 * g;
    const int64_t first_rank = static_cast<int64_t>(blockIdx.y) * Ranks;
    const int count = static_cast<int>(o.columns - at < 8 ? (o.columns > at ? o.columns - at : 0) : 8);
    const uint64_t seed = o.threshold ? static_cast<uint64_t>(*o.seed) : 0;
    const bool first = blockIdx.y == 0;  // of the blocks that read these columns
    float sums[Sums::kSums] = {}, dc[8] = {}, c[8] = {};
    if constexpr (Scaled) {
#pragma unroll
        for (int j = 0; j < 8; ++j) c[j] = j < count ? o.c[at + j] : 0.0f;
    }
    const auto q_at = [&](int64_t m, int64_t r) {
        if (m >= o.M || r >= o.rank) return 0.0f;
        return to_float(static_cast<const Q*>(o.q.data)[m * o.q.row_stride + r * o.q.column_stride]) * o.scale;
    };
    const int64_t stride = static_cast<int64_t>(blocks) * Sums::kWarps * kTokens;
    for (int64_t m = (static_cast<int64_t>(cluster_rank()) * Sums::kWarps + warp) * kTokens; m < o.M; m += stride) {
        uint32_t token[4][4];  // tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9: pairs of neighbours
        const int64_t at_token[4] = {m + 2 * t, m + 2 * t + 1, m + 2 * t + 8, m + 2 * t + 9};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            load_pairs(x + at_token[i] * o.x_stride + at, at_token[i] < o.M ? count : 0, vector, token[i]);
        if (o.threshold) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                drop_pairs(keep8(seed, o.threshold, static_cast<uint32_t>(at_token[i]), static_cast<uint32_t>(at / 8)),
                           token[i]);
        }
        if constexpr (Scaled) {
            if (first && (out.dc != nullptr || out.dz != nullptr)) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int here = at_token[i] < o.M ? count : 0;
                    float values[8], z[8];
#pragma unroll
                    for (int j = 0; j < 8; ++j) values[j] = half_of_pair<T>(token[i][j / 2], j % 2);
                    if (out.dc != nullptr) {
                        load8(static_cast<const T*>(o.z) + at_token[i] * o.columns + at, here, vector, z);
#pragma unroll
                        for (int j = 0; j < 8; ++j) dc[j] += values[j] * z[j];
                    }
                    if (out.dz != nullptr) {
#pragma unroll
                        for (int j = 0; j < 8; ++j) values[j] *= c[j];
                        store8(static_cast<T*>(out.dz) + at_token[i] * o.columns + at, here, vector, values);
                    }
                }
            }
        }
        if (out.sums == nullptr) continue;
        uint32_t right[8][2];
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                right[j][half] =
                    same_halves(token[2 * half][j / 2], token[2 * half + 1][j / 2], j % 2);
#pragma unroll
        for (int i = 0; i < Sums::kRankTiles; ++i) {
            float q[4][2];
#pragma unroll
            for (int part = 0; part < 4; ++part)
#pragma unroll
                for (int next = 0; next < 2; ++next)
                    q[part][next] = q_at(at_token[part / 2 * 2 + next], first_rank + 16 * i + 8 * (part % 2) + g);
            uint32_t a[4];
#pragma unroll
            for (int part = 0; part < 4; ++part) a[part] = pair<T>(q[part][0], q[part][1]);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float(&d)[4] = *reinterpret_cast<float(*)[4]>(&sums[(i * 8 + j) * 4]);
                mma_16x8x16<T>(d, a, right[j]);
            }
        }
    }
    if (out.sums != nullptr) {
        const auto place = [&](int i) {  // of sums[i] in the tile [ranks, columns]: column n of product j is 8 n + j
            const int tile = i / 4, r = tile / 8 * 16 + i % 4 / 2 * 8 + g;
            return r * kColumns + 8 * (2 * t + i % 2) + tile % 8;
        };
        sum_up<Sums::kWarps, Sums::kSize>(sums, slots, place, [&](int element, float sum) {
            const int64_t r = first_rank + element / kColumns, n = column + element % kColumns;
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
        if (out.dc == nullptr || !first) return;  // the whole cluster
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            dc[j] += __shfl_xor_sync(kAllLanes, dc[j], 1);
            dc[j] += __shfl_xor_sync(kAllLanes, dc[j], 2);
        }
        const auto place = [&](int j) { return 8 * g + j; };  // the same numbers in four lanes
        sum_up<Sums::kWarps, kColumns>(dc, slots, place, [&](int element, float sum) {
            if (column + element < o.columns) out.dc[column + element] = sum;
        });
    }
}

template <typename T, typename Q, int Ranks, bool Scaled>
Error launch(const GradientOperands& o, const GradientOutputs& out, const Place& place) {
    using Sums = Tile<Ranks>;
    const Device device = device_of(place.device);
    const unsigned columns = blocks_of(o.columns, kColumns), ranks = blocks_of(o.rank, Ranks);
    const unsigned blocks = blocks_of_cluster(device, columns * ranks, o.M / (Sums::kWarps * kTokens));
    const bool vector = o.x_stride % 8 == 0 && is_aligned(o.x) &&
                        (!Scaled || (o.columns % 8 == 0 && is_aligned(o.z) && is_aligned(out.dz)));
    return FASTPEFT_LAUNCH_CLUSTERS((lora_gradient_kernel<T, Q, Ranks, Scaled>), dim3(columns * blocks, ranks),
                                    Sums::kThreads, blocks, place, static_cast<const T*>(o.x), o, out, vector);
}

template <typename T, int Ranks>
Error launch(const GradientOperands& o, const GradientOutputs& out, const Place& place) {
    if (o.q.dtype != DType::f32) return launch<T, T, Ranks, false>(o, out, place);
    return o.c == nullptr ? launch<T, float, Ranks, false>(o, out, place)
                          : launch<T, float, Ranks, true>(o, out, place);
}

}  // namespace

Error lora_gradient(const GradientOperands& o, const GradientOutputs& out, DType dtype, const Place& place) {
    const auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (o.rank <= 16) return launch<T, 16>(o, out, place);
        if (o.rank <= 32) return launch<T, 32>(o, out, place);
        return launch<T, 64>(o, out, place);
    };
    return dtype == DType::bf16 ? run(static_cast<__nv_bfloat16*>(nullptr)) : run(static_cast<__half*>(nullptr));
}

}  // namespace fastpeft::cuda

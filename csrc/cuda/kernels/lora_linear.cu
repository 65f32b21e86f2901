// x Wᵀ with the low-rank part in the same sums, for sm_90a: blocks of K, then of ranks, go through the same pipeline. A
// cluster of two blocks shares each tile of W: either loads half of it for both. One warp moves tiles, two warpgroups
// multiply; each block takes tile after tile of y.
#include <algorithm>

#include "elements.cuh"

#ifdef FASTPEFT_EMULATE

#include "lora_linear_emulated.h"

#else

#include "hopper.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kCluster = 2, kRows = 128, kDepth = 64, kGroups = 2;  // a tile of x: kRows x kDepth, kGroups warpgroups
constexpr int kThreads = (kGroups + 1) * kWarpgroup, kPiece = 64;   // y is finished in pieces of so many columns
constexpr int kPieceBytes = 64 * kPiece * 2, kStagedPieces = 2;
[[maybe_unused]] constexpr int kRowTiles = 8;  // before the next column of tiles

// What follows the product, see Tail.
struct Ending {
    uint32_t threshold;
    const int64_t* seed;
    const float* c;
    bool has_z;
    Matrix bias;  // one row, in float32 or as y
};

template <int Columns>
struct Layout {
    static constexpr int kStages = Columns == 256 ? 4 : 6;
    static_assert(kMostRanksMasked <= kStages * kDepth);
    static constexpr int kLeft = kRows * kDepth * 2, kRight = Columns * kDepth * 2, kStage = kLeft + kRight;
    static constexpr int kStaged = kStages * kStage, kBarriers = kStaged + kGroups * kStagedPieces * kPieceBytes;
    static constexpr int kBytes = kBarriers + 2 * kStages * sizeof(Barrier), kAlignment = 1024;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where a role is in the ring of stages.
template <int Stages>
struct RingPlace {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void next() {
        if (++stage == Stages) stage = 0, parity ^= 1;
    }
};

// The tile of y of this block: clusters take two row tiles each, kRowTiles of them before the next column.
struct Tiles {
    int pairs, columns;
    __device__ int count() const { return pairs * columns; }
    __device__ void place(int tile, int& pair, int& column) const {
        const int group = tile / (kRowTiles * columns), first = group * kRowTiles;
        const int rows = pairs - first < kRowTiles ? pairs - first : kRowTiles;
        const int within = tile - first * columns;
        pair = first + within % rows;
        column = within / rows;
    }
};

__device__ __forceinline__ uint32_t pick(const uint32_t (&words)[4], int i) {
    const uint32_t low = i & 1 ? words[1] : words[0], high = i & 1 ? words[3] : words[2];
    return i & 2 ? high : low;
}

// Keep bits of the two columns 8 j + 2 t of a row, j = 0 … 3 from `group` on: bits 2 j and 2 j + 1. Each lane of four
// draws one j and hands the words round.
__device__ __forceinline__ uint32_t keep_pairs(uint64_t seed, uint32_t threshold, uint32_t row, uint32_t group) {
    const int t = threadIdx.x % 4;
    uint32_t words[4], got[4];
    philox(seed, row, group + t, words);
#pragma unroll
    for (int k = 0; k < 4; ++k) got[k] = __shfl_xor_sync(kAllLanes, pick(words, t ^ k), k);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint32_t word = pick(got, t ^ j);
        bits |= static_cast<uint32_t>((word & 0xffff) >= threshold) << (2 * j);
        bits |= static_cast<uint32_t>((word >> 16) >= threshold) << (2 * j + 1);
    }
    return bits;
}

template <typename T, int Columns, bool Transposed, bool Masked>
struct Kernel {
    using L = Layout<Columns>;
    using Ring = RingPlace<L::kStages>;
    // Bytes of W's tile from one block of 16 along the sum to the next.
    static constexpr int kRightStep = Transposed ? 16 * 128 : 32, kLeftStep = 32;
    static constexpr uint32_t kLeading = Transposed ? kDepth * 128 : 16;

    char* shared;
    int M, N, K, rank;
    Tiles tiles;

    __device__ Barrier& full(int stage) const { return reinterpret_cast<Barrier*>(shared + L::kBarriers)[stage]; }
    __device__ Barrier& empty(int stage) const { return full(L::kStages + stage); }
    __device__ char* left(int stage) const { return shared + stage * L::kStage; }
    __device__ char* right(int stage) const { return left(stage) + L::kLeft; }
    __device__ int depth_blocks() const { return (K + kDepth - 1) / kDepth; }
    __device__ int rank_blocks() const { return (rank + kDepth - 1) / kDepth; }
    __device__ int rank_steps(int block) const {
        const int steps = (rank - block * kDepth + 15) / 16;
        return steps < kDepth / 16 ? steps : kDepth / 16;
    }
    __device__ int clusters() const { return gridDim.x / kCluster; }

    __device__ void load(const CUtensorMap& x, const CUtensorMap& W, const CUtensorMap& q, const CUtensorMap& B) const {
        const int half = block_of_cluster();
        constexpr uint16_t kBoth = (1 << kCluster) - 1;
        Ring at;
        for (int tile = blockIdx.x / kCluster; tile < tiles.count(); tile += clusters()) {
            int pair, column;
            tiles.place(tile, pair, column);
            const int m = (pair * kCluster + half) * kRows, n = column * Columns, depths = depth_blocks();
            for (int i = 0; i < depths + rank_blocks(); ++i, at.next()) {
                const bool low_rank = i >= depths;
                const int k = (low_rank ? i - depths : i) * kDepth;
                const CUtensorMap& wide = low_rank ? B : W;
                Barrier& barrier = full(at.stage);
                empty(at.stage).wait(at.parity ^ 1);
                barrier.arrive_and_expect(L::kStage);
                load_tile(left(at.stage), low_rank ? q : x, k, m, barrier);
                if constexpr (Transposed) {
#pragma unroll
                    for (int j = 0; j < Columns / 64 / kCluster; ++j) {
                        const int box = half * (Columns / 64 / kCluster) + j;
                        load_tile(right(at.stage) + box * kDepth * 128, wide, n + box * 64, k, barrier, kBoth);
                    }
                } else {
                    const int first = half * (Columns / kCluster);
                    load_tile(right(at.stage) + first * 128, wide, k, n + first, barrier, kBoth);
                }
            }
        }
    }

    // The stage may be filled again, in both blocks, once both warpgroups of both have said so.
    __device__ void release(int stage) const {
        const uint32_t thread = threadIdx.x % kWarpgroup;
        if (thread < kCluster) empty(stage).arrive_at(thread);
    }

    __device__ void multiply(const CUtensorMap& y, const CUtensorMap& z, const Ending& ending) const {
        const int group = threadIdx.x / kWarpgroup, half = block_of_cluster();
        Ring at;
        int piece = 0;
        for (int tile = blockIdx.x / kCluster; tile < tiles.count(); tile += clusters()) {
            int pair, column;
            tiles.place(tile, pair, column);
            const int m = (pair * kCluster + half) * kRows + group * 64, n = column * Columns, depths = depth_blocks();
            float sums[Columns / 2];
            int before = 0;
            for (int i = 0; i < depths; ++i) {
                full(at.stage).wait(at.parity);
                const uint64_t a = matrix_operand(left(at.stage) + group * 64 * 128, 16);
                const uint64_t b = matrix_operand(right(at.stage), kLeading);
                products_begin();
#pragma unroll
                for (int s = 0; s < kDepth / 16; ++s)
                    product_16<T, Columns, Transposed>(sums, a + s * (kLeftStep >> 4), b + s * (kRightStep >> 4),
                                                       i + s > 0);
                products_commit();
                products_wait<1>();
                if (i > 0) release(before);
                before = at.stage;
                at.next();
            }
            if constexpr (!Masked) {
                for (int i = 0; i < rank_blocks(); ++i) {
                    full(at.stage).wait(at.parity);
                    const uint64_t a = matrix_operand(left(at.stage) + group * 64 * 128, 16);
                    const uint64_t b = matrix_operand(right(at.stage), kLeading);
                    for (int s = 0; s < rank_steps(i); ++s) {
                        products_begin();
                        product_16<T, Columns, Transposed>(sums, a + s * (kLeftStep >> 4), b + s * (kRightStep >> 4),
                                                           1);
                    }
                    products_commit();
                    products_wait<1>();
                    release(before);
                    before = at.stage;
                    at.next();
                }
            }
            products_wait<0>();
            release(before);
            finish(sums, m, n, at, y, z, ending, piece);
            if constexpr (Masked)
                for (int i = 0; i < rank_blocks(); ++i, at.next()) release(at.stage);
        }
        if (threadIdx.x % kWarpgroup == 0) stores_read<0>();
    }

    // scale q right of 64 columns; its operands are the stages from `at` on.
    __device__ void low_rank(float (&delta)[kPiece / 2], int piece, Ring at) const {
        const int group = threadIdx.x / kWarpgroup;
        for (int i = 0; i < rank_blocks(); ++i, at.next()) {
            if (piece == 0) full(at.stage).wait(at.parity);
            const uint64_t a = matrix_operand(left(at.stage) + group * 64 * 128, 16);
            const uint64_t b = matrix_operand(right(at.stage) + piece * 64 * 128, kLeading);
            for (int s = 0; s < rank_steps(i); ++s) {
                products_begin();
                product_16<T, kPiece, Transposed>(delta, a + s * (kLeftStep >> 4), b + s * (kRightStep >> 4),
                                                  i + s > 0);
            }
        }
        products_commit();
        products_wait<0>();
    }

    // Elements `first` + 8 j and the next of a vector; of none, or beyond its end, `other`.
    template <typename E>
    __device__ void load_columns(const E* vector, int64_t stride, int first, float other,
                                 float (&out)[kPiece / 8][2]) const {
#pragma unroll
        for (int j = 0; j < kPiece / 8; ++j)
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int at = first + 8 * j + next;
                out[j][next] = vector != nullptr && at < N ? to_float(vector[at * stride]) : other;
            }
    }

    __device__ void finish(float (&sums)[Columns / 2], int m, int n, const Ring& at, const CUtensorMap& y,
                           const CUtensorMap& z, const Ending& ending, int& staged) const {
        const int warp = threadIdx.x % kWarpgroup / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int piece = 0; piece < Columns / kPiece; ++piece) {
            const int first = n + piece * kPiece;
            float (&part)[kPiece / 2] = *reinterpret_cast<float (*)[kPiece / 2]>(&sums[piece * kPiece / 2]);
            float factor[kPiece / 8][2], bias[kPiece / 8][2];
            if constexpr (!Masked) {
                load_columns(ending.c, 1, first + 2 * t, 1.0f, factor);
                if (ending.bias.dtype == DType::f32)
                    load_columns(static_cast<const float*>(ending.bias.data), ending.bias.column_stride, first + 2 * t,
                                 0.0f, bias);
                else
                    load_columns(static_cast<const T*>(ending.bias.data), ending.bias.column_stride, first + 2 * t,
                                 0.0f, bias);
                if (ending.has_z) store(part, z, m, first, staged);
#pragma unroll
                for (int j = 0; j < kPiece / 8; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) part[4 * j + i] = part[4 * j + i] * factor[j][i % 2] + bias[j][i % 2];
            } else {
                float delta[kPiece / 2];
                low_rank(delta, piece, at);
                const uint64_t seed = static_cast<uint64_t>(*ending.seed);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int four = 0; four < 2; ++four) {
                        const uint32_t bits =
                            keep_pairs(seed, ending.threshold, m + 16 * warp + g + 8 * i, first / 8 + 4 * four);
#pragma unroll
                        for (int j = 0; j < 8; ++j) {
                            const int of = 4 * (4 * four + j / 2) + 2 * i + j % 2;
                            part[of] += bits >> j & 1 ? delta[of] : 0.0f;
                        }
                    }
            }
            store(part, y, m, first, staged);
        }
    }

    // A warpgroup's 64 x 64 sums, rounded, by way of shared memory, whose rows are swizzled as the copy engine expects.
    __device__ void store(const float (&part)[kPiece / 2], const CUtensorMap& to, int m, int n, int& staged) const {
        const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
        const int row = thread / kWarp * 16 + thread % kWarp / 4, t = thread % 4;
        char* buffer = shared + L::kStaged + (group * kStagedPieces + staged) * kPieceBytes;
        if (thread == 0) stores_read<kStagedPieces - 1>();
        synchronize_threads(1 + group, kWarpgroup);
#pragma unroll
        for (int j = 0; j < kPiece / 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                *reinterpret_cast<uint32_t*>(buffer + (row + 8 * i) * 128 + ((j ^ row % 8) << 4) + 4 * t) =
                    pair<T>(part[4 * j + 2 * i], part[4 * j + 2 * i + 1]);
        shared_is_written();
        synchronize_threads(1 + group, kWarpgroup);
        if (thread == 0) store_tile(to, n, m, buffer);
        staged = (staged + 1) % kStagedPieces;
    }
};

#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTPEFT_CLUSTER __cluster_dims__(kCluster)
#else
#define FASTPEFT_CLUSTER
#endif

template <typename T, int Columns, bool Transposed, bool Masked>
__global__ FASTPEFT_CLUSTER __launch_bounds__(kThreads, 1) void lora_linear_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap W, const __grid_constant__ CUtensorMap q,
    const __grid_constant__ CUtensorMap right, const __grid_constant__ CUtensorMap y,
    const __grid_constant__ CUtensorMap z, Ending ending, int M, int N, int K, int rank) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using L = Layout<Columns>;
    extern __shared__ char unaligned[];
    char* shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(unaligned) + L::kAlignment - 1) &
                                           ~static_cast<uintptr_t>(L::kAlignment - 1));
    const Kernel<T, Columns, Transposed, Masked> kernel{
        shared, M, N, K, rank, {(M + kCluster * kRows - 1) / (kCluster * kRows), (N + Columns - 1) / Columns}};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < L::kStages; ++stage) {
            kernel.full(stage).init(1);
            kernel.empty(stage).init(kCluster * kGroups);
        }
        barriers_are_ready();
    }
    synchronize_cluster();
    if (threadIdx.x >= kGroups * kWarpgroup) {
        give_registers<40>();
        if (threadIdx.x == kGroups * kWarpgroup) kernel.load(x, W, q, right);
        __syncwarp();
    } else {
        take_registers<232>();
        kernel.multiply(y, z, ending);
    }
    synchronize_cluster();  // the other block may still arrive at this one's barriers
#endif
}

// What the copy engine needs to know of a matrix, as [rows, columns] with contiguous columns.
bool describe(CUtensorMap& map, const void* data, DType dtype, int64_t rows, int64_t columns, int64_t stride,
              int box_rows, int box_columns) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<Encode>(found);
    }();
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)},
                     steps[] = {1, 1};
    const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode != nullptr &&
           encode(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, int Columns, bool Transposed, bool Masked>
Error launch(const LinearOperands& o, const Tail& tail, DType dtype, const Place& place) {
    CUtensorMap x, W, q, right, y, z;
    const auto wide = [&](CUtensorMap& map, const Matrix& m, int64_t depth) {
        if (Transposed) return describe(map, m.data, dtype, depth, o.N, m.column_stride, kDepth, 64);
        return describe(map, m.data, dtype, o.N, depth, m.row_stride, Columns / kCluster, kDepth);
    };
    const bool described = describe(x, o.x, dtype, o.M, o.K, o.x_stride, kRows, kDepth) && wide(W, o.weight, o.K) &&
                           describe(q, o.q, dtype, o.M, tail.rank, o.q_stride, kRows, kDepth) &&
                           wide(right, tail.right, tail.rank) &&
                           describe(y, o.y, dtype, o.M, o.N, o.y_stride, 64, kPiece) &&
                           describe(z, tail.z == nullptr ? o.y : tail.z, dtype, o.M, o.N,
                                    tail.z == nullptr ? o.y_stride : o.N, 64, kPiece);
    if (!described) return cudaErrorInvalidValue;
    const Ending ending{tail.threshold, tail.seed, tail.c, tail.z != nullptr, tail.bias};
    const auto kernel = &lora_linear_kernel<T, Columns, Transposed, Masked>;
    constexpr int kBytes = Layout<Columns>::kBytes + Layout<Columns>::kAlignment;
    const unsigned clusters = blocks_of(o.M, kCluster * kRows) * blocks_of(o.N, Columns);
    const unsigned at_once = static_cast<unsigned>(device_of(place.device).processors) / kCluster;
    return launched(place, [&] {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        if (error != cudaSuccess) return error;
        const dim3 grid(kCluster * std::min(clusters, at_once));
        const auto stream = static_cast<cudaStream_t>(place.stream);
        // clang-format off
        kernel<<<grid, kThreads, kBytes, stream>>>(x, W, q, right, y, z, ending, static_cast<int>(o.M),
                                                   static_cast<int>(o.N), static_cast<int>(o.K),
                                                   static_cast<int>(tail.rank));
        // clang-format on
        return cudaGetLastError();
    });
}

template <typename T, int Columns>
Error launch(const LinearOperands& o, const Tail& tail, DType dtype, const Place& place) {
    const bool transposed = o.weight.column_stride != 1, masked = tail.threshold != 0;
    if (transposed)
        return masked ? launch<T, Columns, true, true>(o, tail, dtype, place)
                      : launch<T, Columns, true, false>(o, tail, dtype, place);
    return masked ? launch<T, Columns, false, true>(o, tail, dtype, place)
                  : launch<T, Columns, false, false>(o, tail, dtype, place);
}

// Rounds of the whole GPU that a product takes times the width of its tiles, and what each round costs besides.
int64_t cost(int64_t M, int64_t N, int columns, int processors) {
    constexpr int kEachRound = 24;
    const int64_t clusters = static_cast<int64_t>(blocks_of(M, kCluster * kRows)) * blocks_of(N, columns);
    const int64_t at_once = processors / kCluster;
    return (clusters + at_once - 1) / at_once * (columns + kEachRound);
}

}  // namespace

bool has_lora_linear(int device) { return device_of(device).capability == 90; }

Error lora_linear(const LinearOperands& o, const Tail& tail, DType dtype, const Place& place) {
    const int processors = device_of(place.device).processors;
    const bool narrow = cost(o.M, o.N, 128, processors) < cost(o.M, o.N, 256, processors);
    const auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return narrow ? launch<T, 128>(o, tail, dtype, place) : launch<T, 256>(o, tail, dtype, place);
    };
    return dtype == DType::bf16 ? run(static_cast<__nv_bfloat16*>(nullptr)) : run(static_cast<__half*>(nullptr));
}

}  // namespace fastpeft::cuda
#endif

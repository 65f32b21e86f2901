// What sm_90a has and older GPUs have not: the copy engine that moves tiles (TMA), barriers that count its bytes, and
// the matrix units of a warpgroup (wgmma) that read their operands from shared memory.
#pragma once
#include <cuda.h>

#include "elements.cuh"

namespace fastpeft::cuda {

constexpr int kWarpgroup = 128;

__device__ __forceinline__ uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// A barrier in shared memory: a phase ends when all arrivals and all bytes that were announced have come.
struct Barrier {
    uint64_t word;

    __device__ void init(uint32_t arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(arrivals));
    }
    __device__ void arrive_and_expect(uint32_t bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word)), "r"(bytes)
                     : "memory");
    }
    // At the same barrier of another block of the cluster.
    __device__ void arrive_at(uint32_t block) {
        asm volatile(
            "{\n.reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&word)),
            "r"(block)
            : "memory");
    }
    __device__ void wait(uint32_t parity) {
        asm volatile(
            "{\n.reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n}" ::"r"(shared_address(&word)),
            "r"(parity)
            : "memory");
    }
};

__device__ __forceinline__ void barriers_are_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ uint32_t block_of_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void synchronize_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A tile of a matrix into shared memory, here and at the same place of every block that `blocks` has a bit for. What
// lies outside of the matrix is 0.
__device__ __forceinline__ void load_tile(void* to, const CUtensorMap& matrix, int column, int row, Barrier& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(&matrix), "r"(shared_address(&barrier.word)), "r"(column), "r"(row)
        : "memory");
}

__device__ __forceinline__ void load_tile(void* to, const CUtensorMap& matrix, int column, int row, Barrier& barrier,
                                          uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(&matrix), "r"(shared_address(&barrier.word)), "r"(column), "r"(row), "h"(blocks)
        : "memory");
}

// A tile from shared memory to a matrix; what lies outside of it is left out. `stores_read` waits until all but the
// `Newest` ones of this thread have been read.
__device__ __forceinline__ void store_tile(const CUtensorMap& matrix, int column, int row, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&matrix),
                 "r"(shared_address(from)), "r"(column), "r"(row)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int Newest>
__device__ __forceinline__ void stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Newest) : "memory");
}

// Between ordinary writes to shared memory and the copy engine's or the matrix units' reads of it.
__device__ __forceinline__ void shared_is_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void synchronize_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int Registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// An operand of wgmma in shared memory: rows of 128 bytes, 8 of them swizzled as the copy engine does. `leading`: bytes
// to the next 64 elements along the dimension that is not summed over, where that is the contiguous one.
__device__ __forceinline__ uint64_t matrix_operand(const void* at, uint32_t leading) {
    constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
    return (static_cast<uint64_t>(shared_address(at)) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
           kEightRows << 32 | kSwizzle128 << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Newest>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Newest) : "memory");
}

// clang-format off
#define FASTPEFT_8(d, i)                                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FASTPEFT_32(d, i) FASTPEFT_8(d, i), FASTPEFT_8(d, i + 8), FASTPEFT_8(d, i + 16), FASTPEFT_8(d, i + 24)
#define FASTPEFT_NAMES_32                                                                                             \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%" \
    "30,%31"
#define FASTPEFT_NAMES_64                                                                               \
    FASTPEFT_NAMES_32                                                                                   \
        ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54," \
        "%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FASTPEFT_NAMES_128                                                                            \
    FASTPEFT_NAMES_64                                                                                 \
        ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"   \
        "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106," \
        "%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,"  \
        "%125,%126,%127"
#define FASTPEFT_WGMMA(columns, type, names, a, b, keep, transposed, ...)                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" keep                                                        \
                 ", 0;\n"                                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, %" a ", %" b \
                 ", p, 1, 1, 0, %" transposed ";\n}"                                                              \
                 : __VA_ARGS__                                                                                    \
                 : "l"(left), "l"(right), "r"(added), "n"(Transposed ? 1 : 0))
// clang-format on

// d [64, Columns] of a warpgroup = left right (+ d if `added`), sums in float32: row 16 warp + g (+ 8), columns 8 j + 2
// t and the next in d[4 j] (d[4 j + 2]) and the next, of lane 4 g + t. `Transposed`: the columns of right, not the
// sums, are contiguous.
template <typename T, int Columns, bool Transposed>
__device__ __forceinline__ void product_16(float (&d)[Columns / 2], uint64_t left, uint64_t right, int added) {
    constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
    if constexpr (Columns == 256) {
        if constexpr (kBf16)
            FASTPEFT_WGMMA("256", "bf16", FASTPEFT_NAMES_128, "128", "129", "130", "131", FASTPEFT_32(d, 0),
                           FASTPEFT_32(d, 32), FASTPEFT_32(d, 64), FASTPEFT_32(d, 96));
        else
            FASTPEFT_WGMMA("256", "f16", FASTPEFT_NAMES_128, "128", "129", "130", "131", FASTPEFT_32(d, 0),
                           FASTPEFT_32(d, 32), FASTPEFT_32(d, 64), FASTPEFT_32(d, 96));
    } else if constexpr (Columns == 128) {
        if constexpr (kBf16)
            FASTPEFT_WGMMA("128", "bf16", FASTPEFT_NAMES_64, "64", "65", "66", "67", FASTPEFT_32(d, 0),
                           FASTPEFT_32(d, 32));
        else
            FASTPEFT_WGMMA("128", "f16", FASTPEFT_NAMES_64, "64", "65", "66", "67", FASTPEFT_32(d, 0),
                           FASTPEFT_32(d, 32));
    } else {
        static_assert(Columns == 64);
        if constexpr (kBf16)
            FASTPEFT_WGMMA("64", "bf16", FASTPEFT_NAMES_32, "32", "33", "34", "35", FASTPEFT_32(d, 0));
        else
            FASTPEFT_WGMMA("64", "f16", FASTPEFT_NAMES_32, "32", "33", "34", "35", FASTPEFT_32(d, 0));
    }
}

}  // namespace fastpeft::cuda

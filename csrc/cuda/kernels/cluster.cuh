// Blocks that add up what each of them has: a cluster on GPUs that have clusters, else one block alone. Always in the
// same order.
#pragma once
#include "elements.cuh"

namespace fastpeft::cuda {

#if !defined(FASTPEFT_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_blocks() {
    unsigned count;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(count));
    return count;
}
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void synchronize_blocks() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What stands at `at` in the shared memory of another block.
__device__ __forceinline__ float shared_of(const float* at, unsigned block) {
    uint32_t remote;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(remote)
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(block));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
    return value;
}
#else
__device__ __forceinline__ unsigned cluster_blocks() { return 1; }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void synchronize_blocks() { __syncthreads(); }
__device__ __forceinline__ float shared_of(const float* at, unsigned) { return *at; }
#endif

// Adds up, over the blocks of a cluster in the order of their ranks, what each of them has in `slots`; `finish(element,
// sum)` is called once for each of `size` elements, by some thread of some block.
template <typename Finish>
__device__ __forceinline__ void sum_blocks(const float* slots, int size, Finish finish) {
    synchronize_blocks();
    const unsigned blocks = cluster_blocks();
    for (int element = cluster_rank() * blockDim.x + threadIdx.x; element < size; element += blocks * blockDim.x) {
        float sum = 0;
        for (unsigned block = 0; block < blocks; ++block) sum += shared_of(slots + element, block);
        finish(element, sum);
    }
    synchronize_blocks();  // the others may still read this block's sums
}

// The sums over all warps and all blocks of a cluster of what each lane has in `values`: `finish(i, lane, sum)` is
// called once for each. `slots` is shared memory for half the warps. Order: warps in halves, then blocks.
template <int Warps, int Count, typename Finish>
__device__ __forceinline__ void sum_up(float (&values)[Count], float* slots, Finish finish) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = Warps / 2; half > 0; half /= 2) {
        if (warp >= half && warp < 2 * half) {
#pragma unroll
            for (int i = 0; i < Count; ++i) slots[((warp - half) * Count + i) * kWarp + lane] = values[i];
        }
        __syncthreads();
        if (warp < half) {
#pragma unroll
            for (int i = 0; i < Count; ++i) values[i] += slots[(warp * Count + i) * kWarp + lane];
        }
        __syncthreads();
    }
    if (warp == 0) {
#pragma unroll
        for (int i = 0; i < Count; ++i) slots[i * kWarp + lane] = values[i];
    }
    sum_blocks(slots, Count * kWarp, [&](int element, float sum) { finish(element / kWarp, element % kWarp, sum); });
}

// How many blocks share the work of one: a power of two, until two blocks a multiprocessor are busy, each with one of
// `steps` at least.
inline unsigned blocks_of_cluster(const Device& device, unsigned tiles, int64_t steps) {
    constexpr unsigned kMost = 8, kBlocksEach = 2;
    unsigned blocks = 1;
    while (device.has_clusters() && blocks < kMost && 2 * blocks <= steps &&
           2 * blocks * tiles <= kBlocksEach * static_cast<unsigned>(device.processors))
        blocks *= 2;
    return blocks;
}

}  // namespace fastpeft::cuda

// How the GPU's kernels decode elements of a 4-bit weight (../../matrix.h).
#pragma once
#include "elements.cuh"

namespace fastpeft::cuda {

constexpr int kNestedBits = 8;  // blocks that share an absmax2: 256

// What the codes of the block with this element are multiplied by; each step rounded, as bitsandbytes does.
__device__ __forceinline__ float block_scale(const FourBit& weight, int64_t element) {
    const int64_t block = element >> weight.block_bits;
    if (weight.absmax != nullptr) return weight.absmax[block];
    return __fadd_rn(__fmul_rn(weight.code2[weight.q[block]], weight.absmax2[block >> kNestedBits]), *weight.offset);
}

// A lane's entry of the code table, for decode8.
__device__ __forceinline__ float table_entry(const FourBit& weight) { return weight.code[threadIdx.x % 16]; }

// Eight elements of one block from four bytes, the first in the lowest one's high nibble. The table lies in the lanes
// of the warp: all of them have to come here.
__device__ __forceinline__ void decode8(uint32_t bytes, float entry, float scale, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int code = bytes >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15;
        out[i] = __fmul_rn(__shfl_sync(kAllLanes, entry, code), scale);
    }
}

}  // namespace fastpeft::cuda

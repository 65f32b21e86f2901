// CUDA, or with FASTPEFT_EMULATE the emulation of what the kernels use of it. FASTPEFT_LAUNCH starts a kernel and
// gives the launch's error, so that none is left pending.
#pragma once
#ifndef FASTPEFT_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#define FASTPEFT_LAUNCH(kernel, grid, threads, stream, ...) \
    (kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__), cudaGetLastError())

namespace fastpeft::cuda {

// D += A B of one warp on its matrix units, float32 sums; fragments as PTX lays out mma.m16n8k16.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fastpeft::cuda
#else
#include "emulation.h"
#endif

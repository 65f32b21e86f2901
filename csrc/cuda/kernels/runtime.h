// CUDA, or with FASTPEFT_EMULATE the emulation of what the kernels use of it. FASTPEFT_LAUNCH starts a kernel at a
// Place and gives the launch's error, so that none is left pending.
#pragma once
#include "launchers.h"

#ifndef FASTPEFT_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#define FASTPEFT_LAUNCH(kernel, grid, threads, place, ...)                                    \
    launched(place, [&] {                                                                     \
        kernel<<<grid, threads, 0, static_cast<cudaStream_t>((place).stream)>>>(__VA_ARGS__); \
        return cudaGetLastError();                                                            \
    })

// The same with clusters of `blocks` blocks.
#define FASTPEFT_LAUNCH_CLUSTERS(kernel, grid, threads, blocks, place, ...) \
    launched(place, [&] { return launch_clusters(kernel, grid, threads, blocks, (place).stream, __VA_ARGS__); })

namespace fastpeft::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, unsigned threads, unsigned blocks, void* stream,
                            const Arguments&... arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {blocks, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = threads;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = blocks > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

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

namespace fastpeft::cuda {

// What a launch depends on; asked of the driver once a GPU.
struct Device {
    int processors = 1, capability = 0;  // 90 for 9.0
    bool has_clusters() const { return capability >= 90; }
};
Device device_of(int device);

// Launches on the GPU of `place`, and leaves the current one as it was.
template <typename Launch>
Error launched(const Place& place, Launch launch) {
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    const bool elsewhere = current != place.device;
    if (error == cudaSuccess && elsewhere) error = cudaSetDevice(place.device);
    if (error == cudaSuccess) error = launch();
    if (elsewhere && cudaSetDevice(current) != cudaSuccess) cudaGetLastError();
    if (error != cudaSuccess) cudaGetLastError();  // what these calls leave
    return error;
}

}  // namespace fastpeft::cuda

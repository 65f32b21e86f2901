// What comes after a product, for one element: the low-rank part is in `delta` already.
#pragma once
#include "elements.cuh"

namespace fastpeft::cuda {

struct Finished {
    float y, z;
};

// y = base + delta + bias; with DoRA's c: z = base + delta, y = c z + bias; over dropped-out inputs z = second + delta,
// y = base - second + c z + bias.
__device__ __forceinline__ Finished finish(float base, float second, float delta, bool has_second, bool has_c, float c,
                                           float bias) {
    const float z = (has_second ? second : base) + delta;
    if (!has_c) return {z + bias, z};
    return {(has_second ? base - second : 0.0f) + c * z + bias, z};
}

__device__ __forceinline__ float bias_of(const Tail& tail, int64_t n) {
    return tail.bias.data == nullptr ? 0.0f : element(tail.bias.data, tail.bias.dtype, n * tail.bias.column_stride);
}

}  // namespace fastpeft::cuda

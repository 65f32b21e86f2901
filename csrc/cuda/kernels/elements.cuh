// What the kernels do to single elements and to runs of eight: types, loads and stores, the dropout mask.
#pragma once
#include <cstdint>

#include "../../philox.h"
#include "runtime.h"

namespace fastpeft::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
struct Convert {
    static __device__ __forceinline__ float from(float value) { return value; }
};
template <>
struct Convert<__nv_bfloat16> {
    static __device__ __forceinline__ __nv_bfloat16 from(float value) { return __float2bfloat16(value); }
};
template <>
struct Convert<__half> {
    static __device__ __forceinline__ __half from(float value) { return __float2half(value); }
};

template <typename T>
__device__ constexpr DType dtype_of() {
    return std::is_same_v<T, float> ? DType::f32 : std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
}

template <typename T>
__device__ __forceinline__ float rounded(float value) {
    return to_float(Convert<T>::from(value));
}

// Two numbers in a low precision as one operand of the matrix units, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
    union {
        T halves[2];
        uint32_t word;
    } both = {{Convert<T>::from(low), Convert<T>::from(high)}};
    return both.word;
}

template <typename T>
__device__ __forceinline__ float half_of_pair(uint32_t word, int i) {
    const union {
        uint32_t word;
        T halves[2];
    } both = {word};
    return to_float(both.halves[i]);
}

// The halves number `i` of two pairs.
__device__ __forceinline__ uint32_t same_halves(uint32_t low, uint32_t high, int i) {
    return i ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
}

__device__ __forceinline__ float element(const void* data, DType dtype, int64_t at) {
    if (dtype == DType::f32) return static_cast<const float*>(data)[at];
    if (dtype == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    return to_float(static_cast<const __half*>(data)[at]);
}

// Eight elements of two bytes that follow each other, as pairs; those from `count` on are 0. `Vector`: 16 bytes at
// once, all of them or none, which lets many loads be on their way.
template <bool Vector, typename T>
__device__ __forceinline__ void load_pairs(const T* at, int count, uint32_t (&pairs)[4]) {
    static_assert(sizeof(T) == 2);
    if constexpr (Vector) {
        uint4 word = {0, 0, 0, 0};
        if (count > 0) word = *reinterpret_cast<const uint4*>(at);
        pairs[0] = word.x, pairs[1] = word.y, pairs[2] = word.z, pairs[3] = word.w;
    } else {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(at);
        pairs[0] = pairs[1] = pairs[2] = pairs[3] = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) pairs[i / 2] |= static_cast<uint32_t>(halves[i]) << (16 * (i % 2));
    }
}

// Clears those of eight elements that have no keep bit.
__device__ __forceinline__ void drop_pairs(uint32_t bits, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pairs[i] &= (bits >> (2 * i) & 1 ? 0xffffu : 0) | (bits >> (2 * i + 1) & 1 ? 0xffff0000u : 0);
}

// Eight elements that follow each other; those from `count` on are 0. `vector`: 16 bytes at a time, data aligned so.
template <typename T>
__device__ __forceinline__ void load8(const T* at, int count, bool vector, float (&out)[8]) {
    if (vector && count >= 8) {
        constexpr int kPerLoad = 16 / sizeof(T);
#pragma unroll
        for (int part = 0; part < 8 / kPerLoad; ++part) {
            union {
                uint4 word;
                T elements[kPerLoad];
            } loaded;
            loaded.word = reinterpret_cast<const uint4*>(at)[part];
#pragma unroll
            for (int i = 0; i < kPerLoad; ++i) out[part * kPerLoad + i] = to_float(loaded.elements[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = i < count ? to_float(at[i]) : 0.0f;
    }
}

// Eight elements that are `stride` apart.
template <typename T>
__device__ __forceinline__ void load8_apart(const T* at, int64_t stride, int count, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i < count ? to_float(at[i * stride]) : 0.0f;
}

// The same of row `row` of a matrix from `column` on.
__device__ __forceinline__ void load8(const Matrix& m, int64_t row, int64_t column, int count, bool vector,
                                      float (&out)[8]) {
    const int64_t at = row * m.row_stride + column * m.column_stride;
    if (m.column_stride != 1) {
        if (m.dtype == DType::f32)
            load8_apart(static_cast<const float*>(m.data) + at, m.column_stride, count, out);
        else if (m.dtype == DType::bf16)
            load8_apart(static_cast<const __nv_bfloat16*>(m.data) + at, m.column_stride, count, out);
        else
            load8_apart(static_cast<const __half*>(m.data) + at, m.column_stride, count, out);
    } else if (m.dtype == DType::f32) {
        load8(static_cast<const float*>(m.data) + at, count, vector, out);
    } else if (m.dtype == DType::bf16) {
        load8(static_cast<const __nv_bfloat16*>(m.data) + at, count, vector, out);
    } else {
        load8(static_cast<const __half*>(m.data) + at, count, vector, out);
    }
}

template <typename T>
__device__ __forceinline__ void store8(T* at, int count, bool vector, const float (&values)[8]) {
    if (vector && count >= 8) {
        constexpr int kPerStore = 16 / sizeof(T);
#pragma unroll
        for (int part = 0; part < 8 / kPerStore; ++part) {
            union {
                uint4 word;
                T elements[kPerStore];
            } stored;
#pragma unroll
            for (int i = 0; i < kPerStore; ++i) stored.elements[i] = Convert<T>::from(values[part * kPerStore + i]);
            reinterpret_cast<uint4*>(at)[part] = stored.word;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) at[i] = Convert<T>::from(values[i]);
    }
}

// Calls `launch` with a null pointer of the type that `dtype` names.
template <typename Launch>
Error with_type(DType dtype, Launch launch) {
    if (dtype == DType::f32) return launch(static_cast<float*>(nullptr));
    if (dtype == DType::bf16) return launch(static_cast<__nv_bfloat16*>(nullptr));
    return launch(static_cast<__half*>(nullptr));
}

inline unsigned blocks_of(int64_t total, int64_t size) { return static_cast<unsigned>((total + size - 1) / size); }

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline bool rows_are_aligned(const Matrix& m) {
    return m.row_stride % (m.dtype == DType::f32 ? 4 : 8) == 0 && is_aligned(m.data);
}

}  // namespace fastpeft::cuda

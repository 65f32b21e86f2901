// A 4-bit weight decoded in one launch: each thread has kRuns runs of eight elements in flight, four bytes in and 16
// out.
#include "four_bit.cuh"

namespace fastpeft::cuda {

namespace {

constexpr int kThreads = 256, kRuns = 4;

template <typename T>
__global__ __launch_bounds__(kThreads) void four_bit_decode_kernel(FourBit weight, int64_t elements, T* out, bool words,
                                                                   bool vector) {
    __shared__ float code2[kThreads];  // 256 entries
    const float entry = table_entry(weight);
    const bool nested = weight.absmax == nullptr;
    if (nested) code2[threadIdx.x] = weight.code2[threadIdx.x];
    const float offset = nested ? *weight.offset : 0.0f;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kRuns * kThreads + threadIdx.x) * 8;
    uint32_t bytes[kRuns], q[kRuns];
    float scale[kRuns];
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
        const int64_t at = first + run * kThreads * 8;
        bytes[run] = q[run] = 0;
        scale[run] = 0;
        if (at >= elements) continue;
        if (words && at + 8 <= elements) {
            bytes[run] = *reinterpret_cast<const uint32_t*>(weight.packed + at / 2);
        } else {
            for (int i = 0; i < 4; ++i)
                if (at + 2 * i < elements) bytes[run] |= static_cast<uint32_t>(weight.packed[at / 2 + i]) << (8 * i);
        }
        const int64_t block = at >> weight.block_bits;
        scale[run] = nested ? weight.absmax2[block >> kNestedBits] : weight.absmax[block];
        if (nested) q[run] = weight.q[block];
    }
    __syncthreads();
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
        const int64_t at = first + run * kThreads * 8;
        float values[8];
        if (nested) scale[run] = __fadd_rn(__fmul_rn(code2[q[run]], scale[run]), offset);
        decode8(bytes[run], entry, scale[run], values);
        if (at < elements) store8(out + at, static_cast<int>(elements - at < 8 ? elements - at : 8), vector, values);
    }
}

}  // namespace

Error four_bit_decode(const FourBit& weight, int64_t elements, void* out, DType dtype, const Place& place) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const bool words = reinterpret_cast<uintptr_t>(weight.packed) % 4 == 0;
        return FASTPEFT_LAUNCH(four_bit_decode_kernel<T>, blocks_of(elements, 8 * kRuns * kThreads), kThreads, place,
                               weight, elements, static_cast<T*>(out), words, is_aligned(out));
    });
}

}  // namespace fastpeft::cuda

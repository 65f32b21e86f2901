// The dropout mask's random bits, Philox-4x32-10 as fastpeft/dropout.py defines it, on every device. Internal linkage:
// each instruction set compiles a copy of its own.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTPEFT_ANYWHERE __host__ __device__ __forceinline__
#define FASTPEFT_UNROLL _Pragma("unroll")
#else
#define FASTPEFT_ANYWHERE inline
#define FASTPEFT_UNROLL
#endif

namespace fastpeft {
namespace {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9, kPhiloxKeyStep1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

// The upper half of a product; GPUs have an instruction for it, and fewer registers than both halves take.
FASTPEFT_ANYWHERE uint32_t upper_half(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __umulhi(a, b);
#else
    return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
#endif
}

// The four random words of the counter (group, row, 0, 0).
FASTPEFT_ANYWHERE void philox(uint64_t seed, uint32_t row, uint32_t group, uint32_t (&words)[4]) {
    uint32_t c0 = group, c1 = row, c2 = 0, c3 = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    FASTPEFT_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint32_t high0 = upper_half(kPhiloxMultiplier0, c0), low0 = kPhiloxMultiplier0 * c0;
        const uint32_t high1 = upper_half(kPhiloxMultiplier1, c2), low1 = kPhiloxMultiplier1 * c2;
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += kPhiloxKeyStep0;
        key1 += kPhiloxKeyStep1;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Keep bits of the eight columns 8 * group … 8 * group + 7 of a row, the first column in the lowest bit: an element is
// kept when its 16 of the words' bits are at least the threshold.
FASTPEFT_ANYWHERE uint32_t philox_keep(uint64_t seed, uint32_t threshold, uint32_t row, uint32_t group) {
    uint32_t words[4];
    philox(seed, row, group, words);
    uint32_t bits = 0;
    FASTPEFT_UNROLL
    for (int word = 0; word < 4; ++word) {
        bits |= static_cast<uint32_t>((words[word] & 0xffff) >= threshold) << (2 * word);
        bits |= static_cast<uint32_t>((words[word] >> 16) >= threshold) << (2 * word + 1);
    }
    return bits;
}

}  // namespace
}  // namespace fastpeft

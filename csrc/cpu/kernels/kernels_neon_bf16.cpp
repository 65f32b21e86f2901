// The kernels for 64-bit Arm processors with BF16: float32 arithmetic for float32 and float16, dot products of pairs
// for bfloat16.
#if defined(__aarch64__)
#include "vector_neon.h"
//
#include "pairs_neon.h"
//
#include "pair_kernels.inl"

#define PAIR(name) name##_pairs
#include "pair_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kNeonBf16 = pair_table("neon_bf16", {});
#endif

// The kernels for processors with AVX-512 and its BF16: float32 arithmetic for float32 and float16, dot products of
// pairs for bfloat16.
#if defined(__x86_64__)
#include "vector_avx512.h"

namespace {
constexpr int kFloatRows = 8, kFloatRanks = 16;
}
#include "pair_kernels_avx512.inl"

#define PAIR(name) name##_pairs
#include "pair_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kAvx512 = pair_table("avx512", {.packs_dense = true});
#endif

// The kernels for processors with AVX-512 and its BF16: float32 arithmetic for float32 and float16, dot products of
// pairs for bfloat16.
#if defined(__x86_64__)
#include "vector_avx512.h"
//
#include "pairs_avx512.h"
//
#include "pair_kernels.inl"

#define PAIR(name) name##_pairs
#include "pair_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kAvx512Bf16 =
    pair_table("avx512_bf16", {.packs_from_depth = 0, .pairs_apart = true});
#endif

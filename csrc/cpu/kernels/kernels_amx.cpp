// The kernels for processors with AMX, which does the bfloat16 products; all else is AVX-512's.
#if defined(__x86_64__)
#include "vector_avx512.h"
//
#include "pairs_avx512.h"
//
#include "pair_kernels_amx.inl"

#define PAIR(name) name##_amx
#include "pair_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kAmx = pair_table(
    "amx", {.packs_from_depth = 1536, .packs_up_to_tokens = 512, .low_rank_first = true, .stripes_together = 4});
#endif

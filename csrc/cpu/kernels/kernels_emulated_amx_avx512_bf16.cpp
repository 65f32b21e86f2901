// The AMX kernels on processors without AMX, with the tile instructions emulated: for tests, never chosen by itself.
#if defined(__x86_64__)
#include "amx_emulation.h"
#include "vector_avx512.h"
//
#include "pairs_avx512.h"
//
#include "pair_kernels_amx.inl"

#define PAIR(name) name##_amx
#include "pair_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kEmulatedAmx =
    pair_table("emulated_amx",
               {.packs_from_depth = 1536, .packs_up_to_tokens = 512, .low_rank_first = true, .stripes_together = 4});
#endif

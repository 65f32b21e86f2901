// The kernels for processors with AVX2, FMA and F16C: float32 arithmetic for every dtype.
#if defined(__x86_64__)
#include "vector_avx2.h"
//
#include "float_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kAvx2 = float_table("avx2", {.packs_float = true});
#endif

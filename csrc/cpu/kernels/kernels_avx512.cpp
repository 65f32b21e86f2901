// The kernels for processors with AVX-512 but without its BF16: float32 arithmetic for every dtype.
#if defined(__x86_64__)
#include "vector_avx512.h"
//
#include "float_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kAvx512 = float_table("avx512", {.packs_float = true});
#endif

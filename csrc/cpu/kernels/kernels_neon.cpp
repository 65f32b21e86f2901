// The kernels for 64-bit Arm processors, each of which has NEON: float32 arithmetic for every dtype.
#if defined(__aarch64__)
#include "vector_neon.h"
//
#include "float_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kNeon = float_table("neon");
#endif

// The kernels for processors with AVX2, FMA and F16C: float32 arithmetic for every dtype.
#if defined(__x86_64__)
#include "../../philox.h"
#include "vector_avx2.h"

namespace {
constexpr int kFloatRows = 6, kFloatRanks = 4;  // accumulators: two registers each
}
#include "float_kernels.inl"
#include "float_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kAvx2 = float_table("avx2");
#endif

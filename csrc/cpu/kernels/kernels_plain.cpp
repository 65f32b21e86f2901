// The kernels in standard C++, for any processor: float32 arithmetic for every dtype.
#include "../../philox.h"
#include "vector_plain.h"

namespace {
constexpr int kFloatRows = 4, kFloatRanks = 4;
}
#include "float_kernels.inl"
#include "float_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kPlain = float_table("plain");

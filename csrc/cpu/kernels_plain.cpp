// Standard C++: any processor.
#include "vector_plain.h"
//
#include "philox.h"

namespace {
constexpr int kFloatRows = 4, kFloatRanks = 4;
}
#include "float_kernels.inl"
#include "float_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kPlain = float_table("plain");

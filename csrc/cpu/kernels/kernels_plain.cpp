// The kernels in standard C++, for any processor: float32 arithmetic for every dtype.
#include "vector_plain.h"
//
#include "float_table.inl"

const fastpeft::cpu::Kernels fastpeft::cpu::kPlain = float_table("plain");

// The base product and its low-rank part in one: both are summed in the same float32 accumulators.
#pragma once
#include "skinny.h"

namespace fastpeft::cpu {

// Whether these kernels can pack for torch's bfloat16 micro-kernels, and those run here: false without oneDNN.
bool has_base_product(const Kernels& kernels);

// output [rows, columns] = x S + D'(q · panel_out) + bias, where `low_rank` says all but x [rows, S.rows] and S.
// bfloat16, S.rows even, one stride of S is 1, rows of x at least S.rows apart. S is packed stripe by stripe, nothing
// outlives it.
void base_product(const Kernels& kernels, const Sweep& low_rank, const void* x, int64_t ld_x, const Matrix& s);

}  // namespace fastpeft::cpu

// The product with the frozen weight W and the adapter's low-rank part in the same float32 sums, rounded once.
#pragma once
#include "skinny.h"

namespace fastpeft::cpu {

// Whether these kernels can pack for torch's bfloat16 micro-kernels, and those run here: false without oneDNN.
bool has_base_product(const Kernels& kernels);

// S, or Wᵀ or W for a 4-bit W [N, K]: what `packed` holds is decoded stripe by stripe.
struct RightOperand {
    Matrix s;  // dense; its sizes alone count where `packed` is given
    const FourBit* packed = nullptr;
    bool transposed = false;  // S = Wᵀ
};

struct Operand {
    const void* data;  // bfloat16 [rows, S.rows]
    int64_t ld;        // at least S.rows
};

// The output of the sweep onto x[0] S, where x[i] S is the `second` of the groups whose operand is i; the sweep's
// `seconds` are not looked at. bfloat16, S.rows even, one stride of a dense S is 1. S is packed stripe by stripe,
// nothing outlives the call.
void base_product(const Kernels& kernels, const Sweep& sweep, const std::vector<Operand>& x, const RightOperand& s);

}  // namespace fastpeft::cpu

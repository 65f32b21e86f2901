// The product with the frozen weight W and the adapter's low-rank part in the same float32 sums, rounded once.
#pragma once
#include "dropped.h"
#include "skinny.h"

namespace fastpeft::cpu {

// Whether a product contracted over `depth` elements of this dtype runs in bfloat16 pairs, by torch's micro-kernels:
// false without oneDNN. Otherwise it is computed in float32, by the kernels' own `product`.
bool multiplies_pairs(const Kernels& kernels, DType dtype, int64_t depth);

// S, or Wᵀ or W for a 4-bit W [N, K]: what `packed` holds, from element `first` on, is decoded stripe by stripe.
struct RightOperand {
    Matrix s;  // dense; its sizes and its dtype alone count where `packed` is given
    const FourBit* packed = nullptr;
    bool transposed = false;  // S = Wᵀ
    int64_t first = 0;        // where W begins, in a stack
};

struct Operand {
    const void* data;  // [rows, S.rows], in float32 or, for products in pairs, in bfloat16
    int64_t ld;        // at least S.rows; for products in pairs such as reaches_rows allows
};

// Whether torch's micro-kernels find rows so far apart: they count the bytes from a block's first one in 32 bits.
bool reaches_rows(int64_t ld);

// Elements that dropout drops taken apart from the others, in float32: what remains needs no product of its own
// (docs/equations.md).
struct Apart {
    // x[0] dropped, in blocks of depth_of(S.rows) columns: the `second` of operand 1 is factor · (x[0] S - inputs S).
    const Dropped* inputs = nullptr;
    float factor = 1.0f;
    // Elements of the output, in blocks of kStripe columns: there the base product is `whole` S instead of x[0] S.
    const Dropped* outputs = nullptr;
    const float* whole = nullptr;  // [rows, S.rows], contiguous

    explicit operator bool() const { return inputs || outputs; }
};

// Of the contracted dimension that is packed at a time, in float32.
int64_t depth_of(int64_t rows);

// x[0] S; x[i] S is the `second` of the groups whose operand is i. One stride of a dense S is 1.
struct Term {
    std::vector<Operand> x;
    RightOperand s;
};

// The output of the sweep onto the sum of the terms, which have as many x each; the sweep's `seconds` are not looked
// at. Several terms are contracted over an even number each where products run in pairs.
struct BaseProduct {
    Sweep sweep;
    std::vector<Term> terms;

    int64_t depth() const {  // of all that is contracted
        int64_t rows = 0;
        for (const Term& term : terms) rows += term.s.s.rows;
        return rows;
    }
};

// All of them; each S is packed stripe by stripe, nothing outlives the call. Apart: one term.
void base_products(const Kernels& kernels, const std::vector<BaseProduct>& products, bool pairs,
                   const Apart& apart = {});

}  // namespace fastpeft::cpu

// How a product with W and its low-rank part are computed on the CPU.
#pragma once
#include "../call.h"

namespace fastpeft::cpu {

enum class Plan {
    dots,             // dot products with the rows of W: a few tokens, contiguous tensors, forward alone
    base_first,       // the vendor's product with W, the low-rank part added onto it
    low_rank_first,   // the low-rank part, the vendor's product with W added onto it
    one_accumulator,  // both in the same float32 sums (base_product.h)
};

// The fastest plan for a call as `python -m fastpeft.bench.cpu_plans` measured them, or the one that tests and benches
// force.
Plan forward_plan(const at::Tensor& x, const Weight& weight, const Adapters& adapters);
Plan backward_plan(const at::Tensor& dy, const Weight& weight, const Adapters& adapters);

// Whether the product with D(x) that DoRA's dropout needs beside the one with x is made of x's dropped elements: they
// are few, and there is one adapter. `x` is the left operand of the product, dy in backward.
bool takes_dropped_apart(Plan plan, const at::Tensor& x, const Adapters& adapters);

// For tests and benches: takes this plan in every call, until it is called without one; `dots` forward alone. Whether
// the plan can compute the call is the caller's to know.
void force_plan(std::optional<Plan> plan);

}  // namespace fastpeft::cpu

// Products with W and the low-rank part of an adapter: what the ops on linear layers are made of.
#pragma once
#include "base_product.h"
#include "layout.h"
#include "plan.h"

namespace fastpeft::cpu {

// A sweep over all of `wide`, which does nothing yet.
Sweep sweep_over(const at::Tensor& wide, const Layout& layout);

// A left operand as base products take it, in pairs or in float32; and its rows from `first` on.
at::Tensor operand_rows(const at::Tensor& x, bool pairs);
Operand operand_of(const at::Tensor& rows, int64_t first = 0);

// x[0] W (or Wᵀ; nothing where W is absent); x[i] W is the `second` of the groups whose operand is i.
struct Factors {
    std::vector<at::Tensor> x;
    const Weight& weight;
};

// y = the sum of the products + the output of the sweep; what else the sweep does is done too. Of several products none
// has a second.
void adapted_product(const Kernels& kernels, Sweep& sweep, const at::Tensor& y, const std::vector<Factors>& products,
                     bool transposed, Plan plan, const Apart& apart = {});

}  // namespace fastpeft::cpu

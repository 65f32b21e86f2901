// Products with W and the low-rank part of an adapter: what the ops on linear layers are made of.
#pragma once
#include "base_product.h"
#include "layout.h"
#include "plan.h"

namespace fastpeft::cpu {

// A sweep over all of `wide`, which does nothing yet.
Sweep sweep_over(const at::Tensor& wide, const Layout& layout);

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

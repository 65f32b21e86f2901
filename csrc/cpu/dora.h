// DoRA's factors in a sweep, and what they make of gradients; of a layer [N] or of stacked experts [E, N].
#pragma once
#include "layout.h"

namespace fastpeft::cpu {

// Rows bounds[e] up to bounds[e + 1] of a matrix are expert e's; all of them are a layer's.
using Bounds = std::vector<int64_t>;

// factor · keep ∘ scale ∘ in; a scale [columns] or [E, columns] that is not defined and a threshold of 0 do nothing.
at::Tensor scaled(const at::Tensor& in, const Bounds& bounds, const at::Tensor& scale, double factor, uint64_t seed = 0,
                  int64_t threshold = 0);

// Column sums of a ∘ b over each expert's rows, [E, columns] in float32; tiles of rows are summed by themselves.
at::Tensor column_dots(const at::Tensor& a, const at::Tensor& b, const Bounds& bounds);

// Gives the groups their scales and, with keep_z, each a z [M, N], which is returned.
std::vector<at::Tensor> scale_groups(std::vector<RankGroup>& groups, const Adapters& adapters, const at::Tensor& y,
                                     bool keep_z);

// What DoRA's scales c make of a gradient: dy ∘ later[i] is the gradient of what adapter i hands on, dy ∘ own[i] that
// of its z, and dy ∘ base that of x Wᵀ. An adapter without dropout scales all that comes before it. Undefined: ones.
struct Chain {
    std::vector<at::Tensor> later, own;
    at::Tensor base;

    explicit Chain(const Adapters& adapters);

    // The gradient of x Wᵀ, then that of each D(x) Wᵀ, which its group finds as its operand.
    std::vector<at::Tensor> inputs(const at::Tensor& dy, const Bounds& bounds, const Adapters& adapters,
                                   std::vector<RankGroup>& groups) const;
};

}  // namespace fastpeft::cpu

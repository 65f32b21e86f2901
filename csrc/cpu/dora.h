// What DoRA's factors make of gradients, of a layer [N] or of stacked experts [E, N].
#pragma once
#include "../call.h"

namespace fastpeft::cpu {

// Rows bounds[e] up to bounds[e + 1] of a matrix are expert e's; all of them are a layer's.
using Bounds = std::vector<int64_t>;

// factor · keep ∘ scale ∘ in; a scale [columns] or [E, columns] that is not defined and a threshold of 0 do nothing.
at::Tensor scaled(const at::Tensor& in, const Bounds& bounds, const at::Tensor& scale, double factor, uint64_t seed = 0,
                  int64_t threshold = 0);

// Column sums of a ∘ b over each expert's rows, [E, columns] in float32; tiles of rows are summed by themselves.
at::Tensor column_dots(const at::Tensor& a, const at::Tensor& b, const Bounds& bounds);

// What DoRA's scales c make of a gradient: dy ∘ later[i] is the gradient of what adapter i hands on, dy ∘ own[i] that
// of its z, and dy ∘ base that of x Wᵀ. An adapter without dropout scales all that comes before it. Undefined: ones.
struct Chain {
    std::vector<at::Tensor> later, own;
    at::Tensor base;

    explicit Chain(const Adapters& adapters);
};

}  // namespace fastpeft::cpu

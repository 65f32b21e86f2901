// The arguments of an op under names, as in fastpeft/call.py: a weight, adapters, what is kept, which gradients are
// asked for.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "matrix.h"

namespace fastpeft {

// W [N, K]: a dense tensor, 4 bits an element, or absent: then the low-rank part is all. Of experts a stack, dense or
// of 4 bits.
struct Weight {
    at::Tensor data;                // [N, K] or [E, N, K], any strides; or uint8, flat, see lies_transposed
    std::vector<at::Tensor> quant;  // empty; or code [16], absmax; or code, absmax in uint8, code2, absmax2, offset
    int64_t blocksize;              // negative: W is absent
    int64_t N, K;

    bool four_bit() const { return !quant.empty(); }
    bool absent() const { return blocksize < 0; }
    bool lies_transposed() const { return data.dim() == 2; }  // of 4-bit experts [1, bytes]: each lies as [K, N]
};

// The adapters, with dropout's factor 1 / (1 - p) made part of `scaling` and p turned into the mask's threshold.
struct Adapters {
    std::vector<at::Tensor> A, B;  // [r, K], [N, r]; of experts [E, r, K], [E, N, r]
    std::vector<at::Tensor> c;     // DoRA: [N] or [E, N], float32, contiguous, one an adapter; empty for LoRA
    std::vector<double> scaling;
    std::vector<int64_t> thresholds;  // 0: nothing is dropped
    std::optional<at::Tensor> seed, index;

    size_t count() const { return A.size(); }
    bool dora() const { return !c.empty(); }
    int64_t ranks() const {
        int64_t sum = 0;
        for (const at::Tensor& a : A) sum += a.size(-2);
        return sum;
    }
};

// A layer with one LoRA adapter, one of several that read the same x.
struct Layer {
    Weight weight;
    std::optional<at::Tensor> bias;
    Adapters adapter;
};

using Layers = std::vector<Layer>;

// The gradients that are asked for.
struct Needs {
    bool x, weight, bias;
    std::vector<bool> A, B, c;

    static bool any(const std::vector<bool>& some) { return std::find(some.begin(), some.end(), true) != some.end(); }
};

// What the forward pass keeps beside its operands.
struct Kept {
    std::optional<at::Tensor> u;  // [M, Σ r], float32
    std::vector<at::Tensor> z;    // [M, N], one for each c
};

// y [..., N], u and z.
using Forward = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// y [..., N] of each layer, and their u side by side.
using Shared = std::tuple<std::vector<at::Tensor>, at::Tensor>;

// The dtype that a call of so many tokens keeps z in: of a single one, no sum averages z's rounding.
inline at::ScalarType z_dtype(int64_t tokens, at::ScalarType dtype) { return tokens == 1 ? at::kFloat : dtype; }

// Rows of x [..., columns].
inline int64_t tokens_of(const at::Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }

}  // namespace fastpeft

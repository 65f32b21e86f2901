// The ops in C++, on the CPU or a GPU, forward, backward and DoRA's norm: what fastpeft/backends/compiled.py calls.
#pragma once
#include "call.h"

namespace fastpeft {

// Where a call runs: on the CPU, or on a GPU by the launchers of fastpeft._cuda. In numbers, since autograd hashes what
// a graph keeps when it compiles one.
struct Where {
    int64_t launchers = 0;  // the address of a cuda::Launchers; 0: on the CPU
    int64_t device = 0, stream = 0;
};

// y = x Wᵀ + b with the adapters, u = D(x) Aᵀ, and with keep_z each DoRA adapter's z; see fastpeft/reference.py.
Forward lora_linear(const Where& where, const at::Tensor& x, const Weight& weight,
                    const std::optional<at::Tensor>& bias, const Adapters& adapters, bool keep_z);

// The gradients of x, weight, bias, *A, *B, *c that are needed, in this order. x may be missing where neither weight
// nor any A needs one.
std::vector<at::Tensor> lora_linear_backward(const Where& where, const at::Tensor& dy,
                                             const std::optional<at::Tensor>& x, const Weight& weight,
                                             const Adapters& adapters, const Kept& kept, const Needs& needs);

// The same of layers that read the same x, in one pass over x each way; dx is summed once. needs: of x and each A and
// B. Not where a call has so few tokens that there is nothing to share.
bool shares(const Where& where, const at::Tensor& x, const Layers& layers);
Shared lora_shared_linear(const Where& where, const at::Tensor& x, const Layers& layers);
std::vector<at::Tensor> lora_shared_linear_backward(const Where& where, const std::vector<at::Tensor>& dy,
                                                    const std::optional<at::Tensor>& x, const Layers& layers,
                                                    const std::optional<at::Tensor>& u, const Needs& needs);

// The same of experts, on a CPU: W [E, N, K], bias [E, N] and the adapters are stacks, expert e has rows
// offsets[e] up to offsets[e + 1] of x [T, K]. Gradients of stacks have their layout, and zeros for experts without
// rows.
Forward lora_grouped_linear(const at::Tensor& x, const at::Tensor& offsets, const Weight& weight,
                            const std::optional<at::Tensor>& bias, const Adapters& adapters, bool keep_z);
std::vector<at::Tensor> lora_grouped_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                                     const at::Tensor& offsets, const Weight& weight,
                                                     const Adapters& adapters, const Kept& kept, const Needs& needs);

// ‖W + s B A‖ of each row of W [N, K]: [N] in float32; s B A is computed in `dtype`.
at::Tensor dora_norm(const Where& where, const Weight& weight, const at::Tensor& A, const at::Tensor& B, double scaling,
                     at::ScalarType dtype);

// The same of stacked experts, [E, N], on a CPU.
at::Tensor dora_grouped_norm(const Weight& weight, const at::Tensor& A, const at::Tensor& B, double scaling,
                             at::ScalarType dtype);

// y of lora_linear, with its autograd node: what fastpeft/ops.py's node does in Python, which takes as long as a small
// layer. Keeps x as it came, for dA (or dW), u, for dB, z, for dc, and the seed. Differentiable once.
at::Tensor lora_linear_with_gradient(const Where& where, const at::Tensor& x, const Weight& weight,
                                     const std::optional<at::Tensor>& bias, const Adapters& adapters, bool keep_z);

// The y of lora_shared_linear, with one node for all of them. Of its operands x, A and B alone may ask for gradients.
std::vector<at::Tensor> lora_shared_linear_with_gradient(const Where& where, const at::Tensor& x, const Layers& layers);

}  // namespace fastpeft

// The op with its autograd node, for whoever puts forward and backward together in C++: what ops.py's node does in
// Python, which takes as long as a small layer.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <memory>

#include "lora_linear.h"

namespace fastpeft {

// Kernels compute in the dtype they are given: no autograd, no autocast below this point.
struct PlainDispatch {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// The op put together, as lora_linear.h describes it.
class Composition {
  public:
    virtual ~Composition() = default;
    virtual Forward forward(const at::Tensor& x, const Weight& weight, const std::optional<at::Tensor>& bias,
                            const Adapters& adapters, bool keep_z) const = 0;
    virtual std::vector<at::Tensor> backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                             const Weight& weight, const Adapters& adapters,
                                             const std::optional<at::Tensor>& u, const std::vector<at::Tensor>& z,
                                             const std::vector<bool>& needs) const = 0;
};

// y. Keeps x as it came, for dA (or dW), u, for dB, z, for dc, and the seed. Differentiable once.
at::Tensor with_gradient(std::shared_ptr<const Composition> composition, const at::Tensor& x, const Weight& weight,
                         const std::optional<at::Tensor>& bias, const Adapters& adapters, bool keep_z);

}  // namespace fastpeft

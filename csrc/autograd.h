// The op with its autograd node, for whoever puts forward and backward together in C++: what ops.py's node does in
// Python, which takes as long as a small layer.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "lora_linear.h"

namespace fastpeft {

// Kernels compute in the dtype they are given: no autograd, no autocast below this point.
struct PlainDispatch {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Where and how a call is put together, in numbers: autograd hashes what a graph keeps when it compiles one.
struct Composition {
    int64_t launchers;  // the address of a cuda::Launchers; 0: on the CPU
    int64_t device, stream;
    int64_t forward, backward;  // Plans, on the CPU
};

// y. Keeps x as it came, for dA (or dW), u, for dB, z, for dc, and the seed. Differentiable once.
at::Tensor with_gradient(const Composition& composition, const at::Tensor& x, const Weight& weight,
                         const std::optional<at::Tensor>& bias, const Adapters& adapters, bool keep_z);

}  // namespace fastpeft

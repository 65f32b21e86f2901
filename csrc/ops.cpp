#include "ops.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "checks.h"
#include "cpu/lora_linear.h"
#include "cuda/lora_linear.h"

namespace fastpeft {

using at::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

// Kernels compute in the dtype they are given: no autograd, no autocast below this point.
struct PlainDispatch {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

gpu::Gpu gpu_of(const Where& where) {
    const auto& launchers = *reinterpret_cast<const cuda::Launchers*>(where.launchers);
    TORCH_CHECK(launchers.layout == cuda::kLayout,
                "fastpeft._cuda and fastpeft._C were built from different sources: run `python -m fastpeft build`");
    return {launchers, {static_cast<int>(where.device), reinterpret_cast<void*>(where.stream)}};
}

}  // namespace

Forward lora_linear(const Where& where, const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
                    const Adapters& adapters, bool keep_z) {
    check_operands(x, weight, bias, adapters, tokens_of(x));
    if (is_lazy(x) || is_lazy(weight) || is_lazy(bias) || is_lazy(adapters))
        return lora_linear(where, in_memory(x), in_memory(weight), in_memory(bias), in_memory(adapters), keep_z);
    const PlainDispatch plain;
    return where.launchers ? gpu::lora_linear(gpu_of(where), x, weight, bias, adapters, keep_z)
                           : cpu::lora_linear(x, weight, bias, adapters, keep_z);
}

Tensors lora_linear_backward(const Where& where, const Tensor& dy, const std::optional<Tensor>& x, const Weight& weight,
                             const Adapters& adapters, const Kept& kept, const Needs& needs) {
    check_operands(x, weight, {}, adapters, tokens_of(dy));
    check_kept(dy, weight, adapters, kept, tokens_of(dy));
    if (is_lazy(dy) || is_lazy(x) || is_lazy(weight) || is_lazy(adapters))
        return lora_linear_backward(where, in_memory(dy), in_memory(x), in_memory(weight), in_memory(adapters), kept,
                                    needs);
    const PlainDispatch plain;
    return where.launchers ? gpu::lora_linear_backward(gpu_of(where), dy, x, weight, adapters, kept, needs)
                           : cpu::lora_linear_backward(dy, x, weight, adapters, kept, needs);
}

bool shares(const Where& where, const Tensor& x, const Layers& layers) {
    return where.launchers || cpu::shares(x, layers);
}

Shared lora_shared_linear(const Where& where, const Tensor& x, const Layers& layers) {
    check_layers(x, layers, tokens_of(x));
    if (is_lazy(x) || is_lazy(layers)) return lora_shared_linear(where, in_memory(x), in_memory(layers));
    const PlainDispatch plain;
    return where.launchers ? gpu::lora_shared_linear(gpu_of(where), x, layers) : cpu::lora_shared_linear(x, layers);
}

Tensors lora_shared_linear_backward(const Where& where, const Tensors& dy, const std::optional<Tensor>& x,
                                    const Layers& layers, const std::optional<Tensor>& u, const Needs& needs) {
    check_layers(x, layers, tokens_of(dy[0]));
    check_kept(dy, layers, u, tokens_of(dy[0]));
    if (is_lazy(dy) || is_lazy(x) || is_lazy(layers))
        return lora_shared_linear_backward(where, in_memory(dy), in_memory(x), in_memory(layers), u, needs);
    const PlainDispatch plain;
    return where.launchers ? gpu::lora_shared_linear_backward(gpu_of(where), dy, x, layers, u, needs)
                           : cpu::lora_shared_linear_backward(dy, x, layers, u, needs);
}

Forward lora_grouped_linear(const Tensor& x, const Tensor& offsets, const Weight& weight,
                            const std::optional<Tensor>& bias, const Adapters& adapters, bool keep_z) {
    const std::vector<int64_t> bounds = check_experts(x, offsets, weight, bias, adapters, tokens_of(x));
    if (is_lazy(x) || is_lazy(weight) || is_lazy(bias) || is_lazy(adapters))
        return lora_grouped_linear(in_memory(x), offsets, in_memory(weight), in_memory(bias), in_memory(adapters),
                                   keep_z);
    const PlainDispatch plain;
    return cpu::lora_grouped_linear(x, bounds, weight, bias, adapters, keep_z);
}

Tensors lora_grouped_linear_backward(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& offsets,
                                     const Weight& weight, const Adapters& adapters, const Kept& kept,
                                     const Needs& needs) {
    const std::vector<int64_t> bounds = check_experts(x, offsets, weight, {}, adapters, tokens_of(dy));
    check_kept(dy, weight, adapters, kept, tokens_of(dy));
    if (is_lazy(dy) || is_lazy(x) || is_lazy(weight) || is_lazy(adapters))
        return lora_grouped_linear_backward(in_memory(dy), in_memory(x), offsets, in_memory(weight),
                                            in_memory(adapters), kept, needs);
    const PlainDispatch plain;
    return cpu::lora_grouped_linear_backward(dy, x, bounds, weight, adapters, kept, needs);
}

Tensor dora_norm(const Where& where, const Weight& weight, const Tensor& A, const Tensor& B, double scaling,
                 at::ScalarType dtype) {
    check_operands({}, weight, {}, {.A = {A}, .B = {B}}, 0);
    if (is_lazy(weight) || is_lazy(A) || is_lazy(B))
        return dora_norm(where, in_memory(weight), in_memory(A), in_memory(B), scaling, dtype);
    const PlainDispatch plain;
    return where.launchers ? gpu::dora_norm(gpu_of(where), weight, A, B, scaling, dtype)
                           : cpu::dora_norm(weight, A, B, scaling, dtype);
}

Tensor dora_grouped_norm(const Weight& weight, const Tensor& A, const Tensor& B, double scaling, at::ScalarType dtype) {
    check_stacks(weight, {.A = {A}, .B = {B}});
    if (is_lazy(weight) || is_lazy(A) || is_lazy(B))
        return dora_grouped_norm(in_memory(weight), in_memory(A), in_memory(B), scaling, dtype);
    const PlainDispatch plain;
    const Tensor norms = at::empty({A.size(0), weight.N}, at::dtype(at::kFloat));
    for (int64_t e = 0; e < A.size(0); ++e) {
        Weight expert = weight;
        if (!weight.four_bit()) expert.data = weight.data[e];
        norms[e].copy_(cpu::dora_norm(expert, A[e], B[e], scaling, dtype, e * weight.N * weight.K));
    }
    return norms;
}

}  // namespace fastpeft

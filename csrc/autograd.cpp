#include "autograd.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "gpu.h"

namespace fastpeft {

using at::Tensor;
using at::TensorList;
using Tensors = std::vector<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::Function;

namespace {

// What a node keeps beside tensors.
struct Call {
    Composition composition;
    int64_t blocksize, N, K;
    int64_t count, scales, quants;  // how many adapters, of them with DoRA's c, and tensors beside a 4-bit weight
    std::vector<double> scaling;
    std::vector<int64_t> thresholds;
    bool keep_z;
    std::vector<int64_t> needs;

    void keep(AutogradContext* ctx) const {
        const auto& [launchers, device, stream, forward, backward] = composition;
        ctx->saved_data["numbers"] =
            std::vector<int64_t>{launchers, device, stream, forward, backward, blocksize, N, K, count, scales, quants};
        ctx->saved_data["scaling"] = scaling;
        ctx->saved_data["thresholds"] = thresholds;
        ctx->saved_data["needs"] = needs;
    }

    static Call kept(AutogradContext* ctx) {
        const std::vector<int64_t> n = ctx->saved_data["numbers"].toIntVector();
        return {{n[0], n[1], n[2], n[3], n[4]},
                n[5],
                n[6],
                n[7],
                n[8],
                n[9],
                n[10],
                ctx->saved_data["scaling"].toDoubleVector(),
                ctx->saved_data["thresholds"].toIntVector(),
                false,
                ctx->saved_data["needs"].toIntVector()};
    }

    Weight weight(const Tensor& data, Tensors quant) const { return {data, std::move(quant), blocksize, N, K}; }

    bool any_need(int64_t first, int64_t number) const {
        return std::any_of(needs.begin() + first, needs.begin() + first + number, [](int64_t need) { return need; });
    }
};

gpu::Gpu gpu_of(const Composition& c) {
    return {*reinterpret_cast<const cuda::Launchers*>(c.launchers),
            {static_cast<int>(c.device), reinterpret_cast<void*>(c.stream)}};
}

Forward forward_of(const Call& call, const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
                   const Adapters& adapters) {
    const PlainDispatch plain;
    const Composition& c = call.composition;
    if (c.launchers) return gpu::lora_linear(gpu_of(c), x, weight, bias, adapters, call.keep_z);
    return lora_linear(x, weight, bias, adapters, call.keep_z, static_cast<Plan>(c.forward));
}

Tensors backward_of(const Call& call, const Tensor& dy, const std::optional<Tensor>& x, const Weight& weight,
                    const Adapters& adapters, const std::optional<Tensor>& u, const Tensors& z) {
    const PlainDispatch plain;
    const Composition& c = call.composition;
    const std::vector<bool> needs(call.needs.begin(), call.needs.end());
    if (c.launchers) return gpu::lora_linear_backward(gpu_of(c), dy, x, weight, adapters, u, z, needs);
    return lora_linear_backward(dy, x, weight, adapters, u, z, needs, static_cast<Plan>(c.backward));
}

std::optional<Tensor> maybe(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

// Gradients that raise when they are differentiated by anything that they depend on: torch's once_differentiable ties
// them to nothing, and who asks for a second derivative without minding unused inputs would be given zeros.
struct Once : Function<Once> {
    static Tensors forward(AutogradContext*, TensorList /*what they depend on*/, TensorList grads) {
        Tensors aliases;
        for (const Tensor& grad : grads) aliases.push_back(grad.detach());
        return aliases;
    }
    static Tensors backward(AutogradContext*, const Tensors&) {
        TORCH_CHECK(false, "trying to differentiate twice a function that was marked with @once_differentiable");
    }
};

struct LoraLinear : Function<LoraLinear> {
    static Tensor forward(AutogradContext* ctx, Call* call, const Tensor& x, const Tensor& weight, TensorList quant,
                          const std::optional<Tensor>& bias, TensorList A, TensorList B, TensorList c,
                          const std::optional<Tensor>& seed, const std::optional<Tensor>& index) {
        call->needs = {x.requires_grad(), weight.requires_grad(), bias && bias->requires_grad()};
        for (const TensorList& some : {A, B, c})
            for (const Tensor& t : some) call->needs.push_back(t.requires_grad());
        const Adapters adapters{A.vec(), B.vec(), c.vec(), call->scaling, call->thresholds, seed, index};
        auto [y, u, z] = forward_of(*call, x, call->weight(weight, quant.vec()), bias, adapters);
        const bool keep_x = call->needs[1] || call->any_need(3, call->count);
        const bool keep_u = call->any_need(3 + call->count, call->count);
        Tensors kept{keep_x ? x : Tensor(), weight, keep_u ? u : Tensor(), seed.value_or(Tensor()),
                     index.value_or(Tensor())};
        for (const TensorList& some : {quant, A, B, c, TensorList(z)})
            kept.insert(kept.end(), some.begin(), some.end());
        ctx->save_for_backward(std::move(kept));
        call->keep(ctx);
        ctx->set_materialize_grads(false);
        return y;
    }

    static Tensors backward(AutogradContext* ctx, const Tensors& dy) {
        const Call call = Call::kept(ctx);
        // By argument: the call, x, W, what describes W, bias, A, B, c, the seed, the index.
        Tensors all(1 + call.needs.size() + call.quants + 2);
        if (!dy[0].defined()) return all;
        const Tensors kept = ctx->get_saved_variables();
        auto next = kept.begin() + 5;
        const auto take = [&](int64_t count) {
            next += count;
            return Tensors(next - count, next);
        };
        const Tensors quant = take(call.quants), A = take(call.count), B = take(call.count), c = take(call.scales);
        const Tensors z(next, kept.end());
        const Adapters adapters{A, B, c, call.scaling, call.thresholds, maybe(kept[3]), maybe(kept[4])};
        Tensors grads =
            backward_of(call, dy[0], maybe(kept[0]), call.weight(kept[1], quant), adapters, maybe(kept[2]), z);
        if (at::GradMode::is_enabled()) {
            Tensors origins{dy[0]};
            for (const Tensor& t : kept)
                if (t.defined() && t.requires_grad()) origins.push_back(t);
            grads = Once::apply(TensorList(origins), TensorList(grads));
        }
        auto grad = grads.begin();
        for (size_t i = 0; i < call.needs.size(); ++i)
            if (call.needs[i]) all[1 + i + (i < 2 ? 0 : call.quants)] = *grad++;
        return all;
    }
};

}  // namespace

Tensor with_gradient(const Composition& composition, const Tensor& x, const Weight& weight,
                     const std::optional<Tensor>& bias, const Adapters& adapters, bool keep_z) {
    Call call{composition,
              weight.blocksize,
              weight.N,
              weight.K,
              static_cast<int64_t>(adapters.A.size()),
              static_cast<int64_t>(adapters.c.size()),
              static_cast<int64_t>(weight.quant.size()),
              adapters.scaling,
              adapters.thresholds,
              keep_z,
              {}};
    return LoraLinear::apply(&call, x, weight.data, TensorList(weight.quant), bias, TensorList(adapters.A),
                             TensorList(adapters.B), TensorList(adapters.c), adapters.seed, adapters.index);
}

}  // namespace fastpeft

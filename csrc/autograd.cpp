#include "autograd.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>

namespace fastpeft {

using at::Tensor;
using at::TensorList;
using Tensors = std::vector<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::Function;

namespace {

constexpr char kCall[] = "call";

// What a node keeps beside what it may differentiate.
struct Call : torch::CustomClassHolder {
    std::shared_ptr<const Composition> composition;
    Weight weight;  // without its data
    std::vector<double> scaling;
    std::vector<int64_t> thresholds;
    size_t count, scales;
    bool keep_z;
    std::vector<bool> needs;
};

bool any(const std::vector<bool>& flags, size_t first, size_t count) {
    return std::any_of(flags.begin() + first, flags.begin() + first + count, [](bool flag) { return flag; });
}

std::optional<Tensor> maybe(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

// Gradients that raise when they are differentiated, as torch.autograd.function.once_differentiable makes them.
struct Once : Function<Once> {
    static Tensors forward(AutogradContext*, const Tensor& /*requires a gradient*/, TensorList grads) {
        Tensors aliases;
        for (const Tensor& grad : grads) aliases.push_back(grad.detach());
        return aliases;
    }
    static Tensors backward(AutogradContext*, const Tensors&) {
        TORCH_CHECK(false, "trying to differentiate twice a function that was marked with @once_differentiable");
    }
};

struct LoraLinear : Function<LoraLinear> {
    static Tensor forward(AutogradContext* ctx, const c10::intrusive_ptr<Call>& call, const Tensor& x,
                          const Tensor& weight, const std::optional<Tensor>& bias, TensorList A, TensorList B,
                          TensorList c, const std::optional<Tensor>& seed, const std::optional<Tensor>& index) {
        call->needs = {x.requires_grad(), weight.requires_grad(), bias && bias->requires_grad()};
        for (const TensorList& some : {A, B, c})
            for (const Tensor& t : some) call->needs.push_back(t.requires_grad());
        Weight whole = call->weight;
        whole.data = weight;
        const Adapters adapters{A.vec(), B.vec(), c.vec(), call->scaling, call->thresholds, seed, index};
        auto [y, u, z] = [&] {
            const PlainDispatch plain;
            return call->composition->forward(x, whole, bias, adapters, call->keep_z);
        }();
        const bool keep_x = call->needs[1] || any(call->needs, 3, call->count);
        const bool keep_u = any(call->needs, 3 + call->count, call->count);
        Tensors kept{keep_x ? x : Tensor(), weight, keep_u ? u : Tensor(), seed.value_or(Tensor()),
                     index.value_or(Tensor())};
        for (const TensorList& some : {A, B, c}) kept.insert(kept.end(), some.begin(), some.end());
        kept.insert(kept.end(), z.begin(), z.end());
        ctx->save_for_backward(std::move(kept));
        ctx->saved_data[kCall] = c10::IValue::make_capsule(call);
        ctx->set_materialize_grads(false);
        return y;
    }

    static Tensors backward(AutogradContext* ctx, const Tensors& dy) {
        const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data[kCall].toCapsule());
        Tensors all(1 + call->needs.size() + 2);  // by argument: the call, those with needs, seed and index
        if (!dy[0].defined()) return all;
        const Tensors kept = ctx->get_saved_variables();
        auto next = kept.begin() + 5;
        const auto take = [&](size_t count) {
            next += static_cast<std::ptrdiff_t>(count);
            return Tensors(next - static_cast<std::ptrdiff_t>(count), next);
        };
        const Tensors A = take(call->count), B = take(call->count), c = take(call->scales);
        const Tensors z(next, kept.end());
        Weight whole = call->weight;
        whole.data = kept[1];
        Tensors grads;
        {
            const PlainDispatch plain;
            grads =
                call->composition->backward(dy[0], maybe(kept[0]), whole,
                                            {A, B, c, call->scaling, call->thresholds, maybe(kept[3]), maybe(kept[4])},
                                            maybe(kept[2]), z, call->needs);
        }
        if (at::GradMode::is_enabled()) grads = Once::apply(at::empty({0}).requires_grad_(), TensorList(grads));
        auto grad = grads.begin();
        for (size_t i = 0; i < call->needs.size(); ++i)
            if (call->needs[i]) all[1 + i] = *grad++;
        return all;
    }
};

}  // namespace

Tensor with_gradient(std::shared_ptr<const Composition> composition, const Tensor& x, const Weight& weight,
                     const std::optional<Tensor>& bias, const Adapters& adapters, bool keep_z) {
    auto call = c10::make_intrusive<Call>();
    call->composition = std::move(composition);
    call->weight = weight;
    call->weight.data = Tensor();
    call->scaling = adapters.scaling;
    call->thresholds = adapters.thresholds;
    call->count = adapters.A.size();
    call->scales = adapters.c.size();
    call->keep_z = keep_z;
    return LoraLinear::apply(call, x, weight.data, bias, TensorList(adapters.A), TensorList(adapters.B),
                             TensorList(adapters.c), adapters.seed, adapters.index);
}

}  // namespace fastpeft

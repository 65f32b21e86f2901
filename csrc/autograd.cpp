// The autograd nodes of lora_linear and lora_shared_linear in C++, for calls that no compiler and no mode has to see:
// see ops.h.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "ops.h"
#include "tensors.h"

namespace fastpeft {

using at::Tensor;
using at::TensorList;
using Tensors = std::vector<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::Function;

namespace {

// What a node keeps beside tensors.
struct Call {
    Where where;
    int64_t blocksize, N, K;
    int64_t count, scales, quants;  // how many adapters, of them with DoRA's c, and tensors beside a 4-bit weight
    std::vector<double> scaling;
    std::vector<int64_t> thresholds;
    bool keep_z;
    std::vector<int64_t> needs;  // in the order of the gradients

    void keep(AutogradContext* ctx) const {
        ctx->saved_data["numbers"] =
            std::vector<int64_t>{where.launchers, where.device, where.stream, blocksize, N, K, count, scales, quants};
        ctx->saved_data["scaling"] = scaling;
        ctx->saved_data["thresholds"] = thresholds;
        ctx->saved_data["needs"] = needs;
    }

    static Call kept(AutogradContext* ctx) {
        const std::vector<int64_t> n = ctx->saved_data["numbers"].toIntVector();
        return {{n[0], n[1], n[2]},
                n[3],
                n[4],
                n[5],
                n[6],
                n[7],
                n[8],
                ctx->saved_data["scaling"].toDoubleVector(),
                ctx->saved_data["thresholds"].toIntVector(),
                false,
                ctx->saved_data["needs"].toIntVector()};
    }

    Weight weight(const Tensor& data, Tensors quant) const { return {data, std::move(quant), blocksize, N, K}; }

    Needs named_needs() const {
        const auto A = needs.begin() + 3, B = A + count, c = B + count;
        return {needs[0] != 0, needs[1] != 0, needs[2] != 0, {A, B}, {B, c}, {c, needs.end()}};
    }
};

// Whether a tensor stands for a batch of them, as torch.autograd.grad(..., is_grads_batched=True) makes them.
bool is_batched(const Tensor& t) {
    return t.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched}));
}

// The backward op by torch's dispatcher, which has a way to take batches (ops.py).
Tensors dispatched_backward(const Tensor& dy, const std::optional<Tensor>& x, const Weight& weight,
                            const Adapters& adapters, const Kept& kept, const std::vector<int64_t>& needed) {
    static const c10::OperatorHandle op =
        c10::Dispatcher::singleton().findSchemaOrThrow("fastpeft::lora_linear_backward", "");
    std::vector<double> scaling = adapters.scaling, dropout_p;
    for (size_t i = 0; i < adapters.count(); ++i) {
        scaling[i] /= dropout_scale(adapters.thresholds[i]);
        dropout_p.push_back(static_cast<double>(adapters.thresholds[i]) / 65536);
    }
    c10::List<bool> needs;
    for (const int64_t need : needed) needs.push_back(need != 0);
    torch::jit::Stack stack{dy,         x,          weight.data, weight.quant, weight.blocksize, adapters.A,
                            adapters.B, adapters.c, scaling,     dropout_p,    adapters.seed,    adapters.index,
                            kept.u,     kept.z,     needs,       c10::IValue()};
    op.callBoxed(stack);
    return stack[0].toTensorVector();
}

// What was kept; who changed it in place hears what to do about it.
Tensors kept_by(AutogradContext* ctx) {
    try {
        return ctx->get_saved_variables();
    } catch (const c10::Error& error) {
        const std::string said = error.what_without_backtrace();
        TORCH_CHECK(said.find("modified by an inplace operation") == std::string::npos, said,
                    " If it is a layer's input: fastpeft keeps the input itself, where PEFT may keep a copy. Change it "
                    "out of place, or give the layer a clone.");
        throw;
    }
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

Tensors once(const Tensors& dy, const Tensors& kept, const Tensors& grads) {
    Tensors origins;
    for (const Tensors* some : {&dy, &kept})
        for (const Tensor& t : *some)
            if (t.defined() && t.requires_grad()) origins.push_back(t);
    return Once::apply(TensorList(origins), TensorList(grads));
}

struct LoraLinear : Function<LoraLinear> {
    static Tensor forward(AutogradContext* ctx, Call* call, const Tensor& x, const Tensor& weight, TensorList quant,
                          const std::optional<Tensor>& bias, TensorList A, TensorList B, TensorList c,
                          const std::optional<Tensor>& seed, const std::optional<Tensor>& index) {
        call->needs = {x.requires_grad(), weight.requires_grad(), bias && bias->requires_grad()};
        for (const TensorList& some : {A, B, c})
            for (const Tensor& t : some) call->needs.push_back(t.requires_grad());
        const Adapters adapters{A.vec(), B.vec(), c.vec(), call->scaling, call->thresholds, seed, index};
        auto [y, u, z] = lora_linear(call->where, x, call->weight(weight, quant.vec()), bias, adapters, call->keep_z);
        const Needs needs = call->named_needs();
        const bool keep_x = needs.weight || Needs::any(needs.A), keep_u = Needs::any(needs.B);
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
        const Tensors kept = kept_by(ctx);
        auto next = kept.begin() + 5;
        const auto take = [&](int64_t count) {
            next += count;
            return Tensors(next - count, next);
        };
        const Tensors quant = take(call.quants), A = take(call.count), B = take(call.count), c = take(call.scales);
        const Tensors z(next, kept.end());
        const Adapters adapters{A, B, c, call.scaling, call.thresholds, maybe(kept[3]), maybe(kept[4])};
        const Weight weight = call.weight(kept[1], quant);
        const Kept beside{maybe(kept[2]), z};
        Tensors grads =
            is_batched(dy[0])
                ? dispatched_backward(dy[0], maybe(kept[0]), weight, adapters, beside, call.needs)
                : lora_linear_backward(call.where, dy[0], maybe(kept[0]), weight, adapters, beside, call.named_needs());
        if (at::GradMode::is_enabled()) grads = once(dy, kept, grads);
        auto grad = grads.begin();
        for (size_t i = 0; i < call.needs.size(); ++i)
            if (call.needs[i]) all[1 + i + (i < 2 ? 0 : call.quants)] = *grad++;
        return all;
    }
};

bool needs_gradient(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
                    const Adapters& adapters) {
    if (!at::GradMode::is_enabled()) return false;
    const auto asks = [](const Tensor& t) { return t.requires_grad(); };
    const auto any = [&](const Tensors& some) { return std::any_of(some.begin(), some.end(), asks); };
    return asks(x) || asks(weight.data) || (bias && asks(*bias)) || any(adapters.A) || any(adapters.B) ||
           any(adapters.c);
}

// What the node of several layers keeps beside tensors, a layer after the other.
struct SharedCall {
    Where where;
    Layers layers;
    std::vector<int64_t> needs;  // of x, each A, each B

    void keep(AutogradContext* ctx) const {
        std::vector<int64_t> numbers{where.launchers, where.device, where.stream};
        std::vector<double> scaling;
        for (const auto& [weight, _, adapter] : layers) {
            numbers.insert(numbers.end(), {weight.blocksize, weight.N, weight.K, adapter.thresholds[0],
                                           static_cast<int64_t>(weight.quant.size())});
            scaling.push_back(adapter.scaling[0]);
        }
        ctx->saved_data["numbers"] = numbers;
        ctx->saved_data["scaling"] = scaling;
        ctx->saved_data["needs"] = needs;
    }

    // `tensors`: of each layer A, B, the seed, W and what describes it.
    static SharedCall kept(AutogradContext* ctx, Tensors::const_iterator tensors) {
        const std::vector<int64_t> n = ctx->saved_data["numbers"].toIntVector();
        SharedCall call{{n[0], n[1], n[2]}, {}, ctx->saved_data["needs"].toIntVector()};
        auto number = n.begin() + 3;
        for (const double scaling : ctx->saved_data["scaling"].toDoubleVector()) {
            const auto quant = tensors + 4, end = quant + number[4];
            call.layers.push_back({{tensors[3], {quant, end}, number[0], number[1], number[2]},
                                   {},
                                   {{tensors[0]}, {tensors[1]}, {}, {scaling}, {number[3]}, maybe(tensors[2]), {}}});
            number += 5;
            tensors = end;
        }
        return call;
    }

    Needs named_needs() const {
        const auto A = needs.begin() + 1, B = A + static_cast<int64_t>(layers.size());
        return {needs[0] != 0, false, false, {A, B}, {B, needs.end()}, {}};
    }

    // Leaves the layers alone that a gradient came for; their u.
    std::optional<Tensor> reach(const Tensors& dy, const std::optional<Tensor>& u) {
        Layers reached;
        std::vector<int64_t> needs_A, needs_B;
        Tensors columns;
        int64_t rank = 0;
        for (size_t i = 0; i < layers.size(); ++i) {
            const int64_t ranks = layers[i].adapter.ranks();
            if (dy[i].defined()) {
                reached.push_back(layers[i]);
                needs_A.push_back(needs[1 + i]);
                needs_B.push_back(needs[1 + layers.size() + i]);
                if (u) columns.push_back(u->narrow(1, rank, ranks));
            }
            rank += ranks;
        }
        const bool all = reached.size() == layers.size();
        layers = reached;
        needs.resize(1);
        for (const auto* some : {&needs_A, &needs_B}) needs.insert(needs.end(), some->begin(), some->end());
        return all || !u ? u : at::cat(columns, 1);
    }
};

// The same as lora_shared_linear_backward.
Tensors dispatched_backward(const SharedCall& call, const Tensors& dy, const std::optional<Tensor>& x,
                            const std::optional<Tensor>& u) {
    const Needs needs = call.named_needs();
    Tensors dx, dA, dB;
    int64_t rank = 0;
    for (size_t i = 0; i < dy.size(); ++i) {
        const auto& [weight, _, adapter] = call.layers[i];
        Kept kept;
        if (u) kept.u = u->narrow(1, rank, adapter.ranks());
        rank += adapter.ranks();
        const Tensors grads =
            dispatched_backward(dy[i], x, weight, adapter, kept, {needs.x, false, false, needs.A[i], needs.B[i]});
        auto next = grads.begin();
        if (needs.x) {
            dx = {dx.empty() ? *next : dx[0].add(*next)};
            ++next;
        }
        if (needs.A[i]) dA.push_back(*next++);
        if (needs.B[i]) dB.push_back(*next++);
    }
    for (const Tensors* some : {&dA, &dB}) dx.insert(dx.end(), some->begin(), some->end());
    return dx;
}

struct LoraSharedLinear : Function<LoraSharedLinear> {
    static Tensors forward(AutogradContext* ctx, SharedCall* call, const Tensor& x, TensorList A, TensorList B) {
        call->needs = {x.requires_grad()};
        for (const TensorList& some : {A, B})
            for (const Tensor& t : some) call->needs.push_back(t.requires_grad());
        auto [y, u] = lora_shared_linear(call->where, x, call->layers);
        const Needs needs = call->named_needs();
        Tensors kept{Needs::any(needs.A) ? x : Tensor(), Needs::any(needs.B) ? u : Tensor()};
        for (const auto& [weight, _, adapter] : call->layers) {
            kept.insert(kept.end(), {adapter.A[0], adapter.B[0], adapter.seed.value_or(Tensor()), weight.data});
            kept.insert(kept.end(), weight.quant.begin(), weight.quant.end());
        }
        ctx->save_for_backward(std::move(kept));
        call->keep(ctx);
        ctx->set_materialize_grads(false);
        return y;
    }

    static Tensors backward(AutogradContext* ctx, const Tensors& every_dy) {
        const std::vector<int64_t> needs = ctx->saved_data["needs"].toIntVector();
        Tensors all(1 + needs.size()), dy;  // all: of the call, x, each A, each B
        for (const Tensor& each : every_dy)
            if (each.defined()) dy.push_back(each);
        if (dy.empty()) return all;
        const Tensors kept = kept_by(ctx);
        SharedCall call = SharedCall::kept(ctx, kept.begin() + 2);
        const std::optional<Tensor> x = maybe(kept[0]), u = call.reach(every_dy, maybe(kept[1]));
        Tensors grads = std::any_of(dy.begin(), dy.end(), is_batched)
                            ? dispatched_backward(call, dy, x, u)
                            : lora_shared_linear_backward(call.where, dy, x, call.layers, u, call.named_needs());
        if (at::GradMode::is_enabled()) grads = once(dy, kept, grads);
        auto grad = grads.begin();
        if (needs[0]) all[1] = *grad++;
        for (size_t i = 1; i < needs.size(); ++i)
            if (needs[i] && every_dy[(i - 1) % every_dy.size()].defined()) all[1 + i] = *grad++;
        return all;
    }
};

}  // namespace

Tensor lora_linear_with_gradient(const Where& where, const Tensor& x, const Weight& weight,
                                 const std::optional<Tensor>& bias, const Adapters& adapters, bool keep_z) {
    if (!needs_gradient(x, weight, bias, adapters))
        return std::get<0>(lora_linear(where, x, weight, bias, adapters, keep_z));
    Call call{where,
              weight.blocksize,
              weight.N,
              weight.K,
              static_cast<int64_t>(adapters.count()),
              static_cast<int64_t>(adapters.c.size()),
              static_cast<int64_t>(weight.quant.size()),
              adapters.scaling,
              adapters.thresholds,
              keep_z,
              {}};
    return LoraLinear::apply(&call, x, weight.data, TensorList(weight.quant), bias, TensorList(adapters.A),
                             TensorList(adapters.B), TensorList(adapters.c), adapters.seed, adapters.index);
}

Tensors lora_shared_linear_with_gradient(const Where& where, const Tensor& x, const Layers& layers) {
    Tensors A, B;
    bool asks = x.requires_grad();
    for (const Layer& layer : layers) {
        A.push_back(layer.adapter.A[0]);
        B.push_back(layer.adapter.B[0]);
        asks = asks || A.back().requires_grad() || B.back().requires_grad();
    }
    if (!at::GradMode::is_enabled() || !asks) return std::get<0>(lora_shared_linear(where, x, layers));
    SharedCall call{where, layers, {}};
    return LoraSharedLinear::apply(&call, x, TensorList(A), TensorList(B));
}

}  // namespace fastpeft

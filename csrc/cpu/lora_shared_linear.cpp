// The op on layers that read the same x (q, k and v; gate and up): one sweep over x makes every u, another every dA,
// and dx is summed in the float32 sums of one product.
#include <ATen/ATen.h>

#include <algorithm>

#include "adapted_product.h"
#include "lora_linear.h"

namespace fastpeft::cpu {

using at::Tensor;

namespace {

// All adapters as those of one layer would be.
Adapters together(const Layers& layers) {
    Adapters all;
    std::vector<Tensor> seeds;
    for (const Layer& layer : layers) {
        const Adapters& one = layer.adapter;
        all.A.push_back(one.A[0]);
        all.B.push_back(one.B[0]);
        all.scaling.push_back(one.scaling[0]);
        all.thresholds.push_back(one.thresholds[0]);
        seeds.push_back(one.seed ? *one.seed : at::zeros({1}, at::dtype(at::kLong)));
    }
    all.seed = at::cat(seeds);
    return all;
}

}  // namespace

bool shares(const Tensor& x, const Layers& layers) {
    return std::none_of(layers.begin(), layers.end(),
                        [&](const Layer& layer) { return forward_plan(x, layer.weight, layer.adapter) == Plan::dots; });
}

Shared lora_shared_linear(const Tensor& x, const Layers& layers) {
    const Kernels& kernels = cpu::kernels();
    const bool pairs = kernels.pairs(dtype_of(x));
    const Tensor x2 = flat_rows(x);
    const Adapters adapters = together(layers);
    const Layout layout(adapters, true);
    const Tensor q = floats({x2.size(0), layout.ranks});

    Sweep down = sweep_over(x2, layout);
    const Tensor panel_A = layout.panel_of(kernels, adapters.A, pairs, true);
    down.input = x2.const_data_ptr();
    down.ld_input = x2.stride(0);
    down.panel_in = panel_A.const_data_ptr();
    down.product = q.mutable_data_ptr<float>();
    run(kernels, down);
    const Tensor u = layout.dense_then_scale_(q);

    std::vector<Tensor> all;
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto& [weight, bias, adapter] = layers[i];
        const Layout own(adapter);
        std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
        shape.back() = weight.N;
        const Tensor& y = all.emplace_back(at::empty(shape, x.options()));
        const Tensor y2 = y.dim() == 2 ? y : y.view({-1, weight.N});
        const Tensor bias32 = bias ? bias->to(at::kFloat).contiguous() : Tensor();
        const Tensor own_q = layout.columns_of(q, i);
        const Tensor panel_B = panel(kernels, own.stacked(adapter.B, true), pairs);
        Sweep up = sweep_over(y2, own);
        up.groups = {own.unmasked()};
        up.q = own_q.const_data_ptr<float>();
        up.panel_out = panel_B.const_data_ptr();
        up.bias = bias ? bias32.const_data_ptr<float>() : nullptr;
        adapted_product(kernels, up, y2, {{{x2}, weight}}, true, forward_plan(x, weight, adapter));
    }
    return {all, u};
}

std::vector<Tensor> lora_shared_linear_backward(const std::vector<Tensor>& dy, const std::optional<Tensor>& x,
                                                const Layers& layers, const std::optional<Tensor>& u,
                                                const Needs& needs) {
    const Kernels& kernels = cpu::kernels();
    const bool pairs = kernels.pairs(dtype_of(dy[0])), need_A = Needs::any(needs.A);
    const Tensor x2 = x ? flat_rows(*x) : Tensor();
    const Adapters adapters = together(layers);
    const Layout layout(adapters, true);
    const int64_t K = layers[0].weight.K, M = tokens_of(dy[0]);
    const Tensor v = needs.x || need_A ? floats({M, layout.ranks}) : Tensor();

    std::vector<Tensor> dB;
    std::vector<Factors> products;
    Plan plan = Plan::one_accumulator;  // which every product can follow
    int64_t rank = 0;
    for (size_t i = 0; i < layers.size(); ++i) {  // each dy is read once for its v and its dB
        const auto& [weight, _, adapter] = layers[i];
        const Layout own(adapter);
        const Tensor dy2 = flat_rows(dy[i]);
        Sweep sweep = sweep_over(dy2, own);
        sweep.groups = {own.unmasked()};
        sweep.input = dy2.const_data_ptr();
        sweep.ld_input = dy2.stride(0);
        Tensor panel_B, own_v, own_u, sums;
        if (v.defined()) {
            own_v = floats({M, own.ranks});
            panel_B = panel(kernels, own.stacked(adapter.B, true).t(), pairs);
            sweep.panel_in = panel_B.const_data_ptr();
            sweep.product = own_v.mutable_data_ptr<float>();
        }
        if (needs.B[i]) {
            own_u = own.padded_from(u->narrow(1, rank, own.rank(0)));
            sums = floats({own.ranks, gradient_stride(M, weight.N)});
            sweep.q = own_u.const_data_ptr<float>();
            sweep.gradient = sums.mutable_data_ptr<float>();
            sweep.ld_gradient = sums.size(1);
        }
        if (sweep.product || sweep.gradient) run(kernels, sweep);
        if (v.defined()) layout.put_columns(v, i, own_v);
        if (needs.B[i]) dB.push_back(own.scaled_columns_of(sums, 0, weight.N, {}));
        rank += own.rank(0);
        products.push_back({{dy2}, weight});
        const Plan its = backward_plan(dy[i], weight, adapter);
        plan = i == 0 || its == plan ? its : Plan::one_accumulator;
    }
    if (v.defined()) layout.scale_(v);

    std::vector<Tensor> grads;
    Tensor dA;
    if (needs.x || need_A) {  // x is read once for every dA; the low-rank part of dx may be written in the same sweep
        std::vector<int64_t> shape(dy[0].sizes().begin(), dy[0].sizes().end());
        shape.back() = K;
        const Tensor dx = needs.x ? at::empty(shape, dy[0].options()) : Tensor();
        const Tensor dx2 = needs.x ? dx.view({-1, K}) : x2;
        Sweep sweep = sweep_over(dx2, layout);
        sweep.q = v.const_data_ptr<float>();
        Tensor panel_A;
        if (need_A) {
            dA = floats({layout.ranks, gradient_stride(M, K)});
            sweep.input = x2.const_data_ptr();
            sweep.ld_input = x2.stride(0);
            sweep.gradient = dA.mutable_data_ptr<float>();
            sweep.ld_gradient = dA.size(1);
        }
        if (needs.x) {
            panel_A = layout.panel_of(kernels, adapters.A, pairs, false);
            sweep.panel_out = panel_A.const_data_ptr();
            adapted_product(kernels, sweep, dx2, products, false, plan);
            grads.push_back(dx);
        } else {
            run(kernels, sweep);
        }
    }
    for (size_t i = 0; i < layers.size(); ++i)
        if (needs.A[i]) grads.push_back(layout.rows_of(dA, i, K));
    grads.insert(grads.end(), dB.begin(), dB.end());
    return grads;
}

}  // namespace fastpeft::cpu

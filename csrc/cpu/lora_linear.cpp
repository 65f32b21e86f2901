// The op on CPU tensors, forward and backward: products with W by the plan (plan.h), skinny ones by sweeps (skinny.h).
#include "lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "adapted_product.h"
#include "dora.h"

namespace fastpeft::cpu {

using at::Tensor;

Forward lora_linear(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias, const Adapters& adapters,
                    bool keep_z) {
    const Plan plan = forward_plan(x, weight, adapters);
    const Tensor x2 = flat_rows(x);
    const Bounds all{0, x2.size(0)};
    const int64_t N = weight.N;
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = N;
    const Tensor y = at::empty(shape, x.options());
    const Tensor y2 = y.dim() == 2 ? y : y.view({-1, N});
    const Tensor bias32 = bias ? bias->to(at::kFloat).contiguous() : Tensor();
    const bool dora = adapters.dora();

    if (plan == Plan::dots) {
        const Tensor u = floats({x2.size(0), adapters.ranks()});
        if (!dora) {
            few_tokens_product(x2, weight, bias32, adapters, u, y2);
            return {y, u, {}};
        }
        TORCH_CHECK(adapters.c.size() == 1 && !adapters.thresholds[0],
                    "Plan.dots takes one DoRA adapter without dropout");
        const Tensor z = floats({x2.size(0), N});
        few_tokens_product(x2, weight, {}, adapters, u, z);
        const Tensor product = z * adapters.c[0];
        y2.copy_(bias ? product + bias32 : product);
        return {y, u, keep_z ? std::vector<Tensor>{z.to(z_dtype(x2.size(0), x.scalar_type()))} : std::vector<Tensor>{}};
    }

    const Kernels& kernels = cpu::kernels();
    const bool pairs = kernels.pairs(dtype_of(x));
    const Layout layout(adapters);
    const Tensor q = floats({x2.size(0), layout.ranks});

    Sweep down = sweep_over(x2, layout);
    const Tensor panel_A = panel(kernels, layout.stacked(adapters.A, false).t(), pairs);
    down.input = x2.const_data_ptr();
    down.ld_input = x2.stride(0);
    down.panel_in = panel_A.const_data_ptr();
    down.product = q.mutable_data_ptr<float>();
    run(kernels, down);
    layout.select_(q);
    Tensor u = layout.dense_then_scale_(q);

    Sweep up = sweep_over(y2, layout);
    const Tensor panel_B = panel(kernels, layout.stacked(adapters.B, true), pairs);
    std::vector<Tensor> inputs{x2};
    Apart apart;
    std::optional<Dropped> dropped;
    if (takes_dropped_apart(plan, x2, adapters)) {
        const Tensor x32 = x2.to(at::kFloat);
        if (!multiplies_pairs(kernels, dtype_of(x), x2.size(1))) inputs[0] = x32;
        const RankGroup& group = layout.groups[0];
        dropped.emplace(kernels, group.seed, group.threshold, x2.size(0), x2.size(1), depth_of(x2.size(1)),
                        x32.const_data_ptr<float>(), x32.stride(0));
        if (dropped->finite())
            apart = {.inputs = &*dropped, .factor = static_cast<float>(dropout_scale(group.threshold))};
    }
    if (!dora) up.groups = {layout.unmasked()};
    const std::vector<Tensor> z = scale_groups(up.groups, adapters, y2, keep_z);
    for (size_t i = 0; i < adapters.c.size(); ++i) {
        RankGroup& group = up.groups[i];
        if (!group.threshold) continue;  // the mask is on x: y has none
        if (!apart.inputs)
            inputs.push_back(scaled(x2, all, {}, dropout_scale(group.threshold), group.seed, group.threshold));
        group.operand = apart.inputs ? 1 : inputs.size() - 1;
        group.threshold = 0;
    }
    up.q = q.const_data_ptr<float>();
    up.panel_out = panel_B.const_data_ptr();
    up.bias = bias ? bias32.const_data_ptr<float>() : nullptr;
    adapted_product(kernels, up, y2, {{inputs, weight}}, true, plan, apart);
    return {y, u, z};
}

std::vector<Tensor> lora_linear_backward(const Tensor& dy, const std::optional<Tensor>& x, const Weight& weight,
                                         const Adapters& adapters, const Kept& kept, const Needs& needs) {
    const Plan plan = backward_plan(dy, weight, adapters);
    const size_t count = adapters.count();
    const bool need_A = Needs::any(needs.A), need_B = Needs::any(needs.B);
    const Kernels& kernels = cpu::kernels();
    const Layout layout(adapters);
    const Chain chain(adapters);
    const Tensor dy2 = flat_rows(dy);
    const Tensor x2 = x ? flat_rows(*x) : Tensor();
    const bool pairs = kernels.pairs(dtype_of(dy));
    const int64_t M = dy2.size(0), N = weight.N, K = weight.K;
    const Bounds all{0, M};

    Tensor v, dA, dB, dx;
    if (needs.x || need_A || need_B) {  // dy is read once for v and dB
        Sweep sweep = sweep_over(dy2, layout);
        sweep.groups = {layout.unmasked()};
        sweep.input = dy2.const_data_ptr();
        sweep.ld_input = dy2.stride(0);
        Tensor panel_B, q;
        if (needs.x || need_A) {
            std::vector<Tensor> B = adapters.B;
            for (size_t i = 0; i < adapters.c.size(); ++i) B[i] = B[i] * chain.own[i].unsqueeze(1);
            v = floats({M, layout.ranks});
            panel_B = panel(kernels, layout.stacked(B, true).t(), pairs);
            sweep.panel_in = panel_B.const_data_ptr();
            sweep.product = v.mutable_data_ptr<float>();
        }
        if (need_B) {
            q = layout.padded_from(*kept.u);
            dB = floats({layout.ranks, gradient_stride(M, N)});
            sweep.q = q.const_data_ptr<float>();
            sweep.gradient = dB.mutable_data_ptr<float>();
            sweep.ld_gradient = dB.size(1);
        }
        run(kernels, sweep);
    }
    if (v.defined()) {
        layout.scale_(v);
        layout.select_(v);
    }
    std::vector<Tensor> inputs;  // of the product with W: the gradients of x Wᵀ and of each D(x) Wᵀ
    std::vector<RankGroup> groups = layout.groups;
    Apart apart;
    Tensor whole;
    std::optional<Dropped> dropped;
    if (needs.x && !needs.weight && takes_dropped_apart(plan, dy2, adapters)) {
        const auto factor = dropout_scale(adapters.thresholds[0]);
        whole = dy2.to(at::kFloat).contiguous();
        const Tensor& dense = multiplies_pairs(kernels, dtype_of(dy2), N) ? dy2 : whole;
        inputs = {scaled(dense, all, (adapters.c[0] - 1) * factor + 1, 1.0)};
        dropped.emplace(kernels, groups[0].seed, groups[0].threshold, M, K, kStripe, nullptr, 0);
        apart = {.outputs = &*dropped, .whole = whole.const_data_ptr<float>()};
    } else if (needs.x || needs.weight) {
        inputs = chain.inputs(dy2, all, adapters, groups);
    }
    if (needs.x || need_A) {  // x is read once for dA; the low-rank part of dx may be written in the same sweep
        std::vector<int64_t> shape(dy.sizes().begin(), dy.sizes().end());
        shape.back() = K;
        if (needs.x) dx = at::empty(shape, dy.options());
        const Tensor dx2 = needs.x ? dx.view({-1, K}) : x2;
        Sweep sweep = sweep_over(dx2, layout);
        sweep.groups = groups;
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
            panel_A = panel(kernels, layout.stacked(adapters.A, false), pairs);
            sweep.panel_out = panel_A.const_data_ptr();
            adapted_product(kernels, sweep, dx2, {{inputs, weight}}, false, plan, apart);
        } else {
            run(kernels, sweep);
        }
    }

    std::vector<Tensor> grads;
    if (needs.x) grads.push_back(dx);
    if (needs.weight) {
        Tensor dW = at::mm(inputs[0].t(), x2);
        for (const RankGroup& group : groups)
            if (group.operand)
                dW = dW + at::mm(inputs[group.operand].t(), scaled(x2, all, {}, 1.0, group.seed, group.threshold));
        grads.push_back(dW.to(weight.data.scalar_type()));
    }
    if (needs.bias) grads.push_back(dy2.sum(at::IntArrayRef{0}, false, at::kFloat).to(dy.scalar_type()));
    for (size_t i = 0; i < count; ++i)
        if (needs.A[i]) grads.push_back(layout.rows_of(dA, i, K));
    for (size_t i = 0; i < count; ++i)
        if (needs.B[i]) grads.push_back(layout.scaled_columns_of(dB, i, N, chain.own[i]));
    for (size_t i = 0; i < adapters.c.size(); ++i)
        if (needs.c[i]) {
            const Tensor sums = column_dots(dy2, kept.z[i], all)[0];
            grads.push_back(chain.later[i].defined() ? sums * chain.later[i] : sums);
        }
    return grads;
}

Tensor dropout_keep(int64_t seed, int64_t rows, int64_t columns, int64_t threshold) {
    const Kernels& kernels = cpu::kernels();
    Tensor mask = at::empty({rows, columns}, at::dtype(at::kBool));
    bool* out = mask.mutable_data_ptr<bool>();
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += kColumns) {
            uint64_t words[kKeepWords];
            const int64_t n = std::min(kColumns, columns - c);
            kernels.keep(static_cast<uint64_t>(seed), static_cast<uint32_t>(threshold), m, c, 1, n, words);
            for (int64_t i = 0; i < n; ++i) out[m * columns + c + i] = words[i / 64] >> (i % 64) & 1;
        }
    return mask;
}

}  // namespace fastpeft::cpu

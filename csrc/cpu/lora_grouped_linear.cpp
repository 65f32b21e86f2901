// The op on experts: every product of lora_linear.cpp for each expert's rows, the experts shared out between the
// threads.
#include <ATen/ATen.h>

#include "adapted_product.h"
#include "dora.h"
#include "lora_linear.h"

namespace fastpeft::cpu {
namespace {

using at::Tensor;

// The rows of each expert.
class Experts {
  public:
    explicit Experts(const std::vector<int64_t>& offsets) : offsets_(offsets) {
        for (size_t e = 0; e + 1 < offsets.size(); ++e) busy.push_back(offsets[e] < offsets[e + 1]);
    }

    int64_t count() const { return static_cast<int64_t>(busy.size()); }
    int64_t first(int64_t e) const { return offsets_[e]; }
    int64_t rows(int64_t e) const { return offsets_[e + 1] - offsets_[e]; }

    std::vector<bool> busy;  // whether an expert has any

  private:
    const std::vector<int64_t>& offsets_;
};

// A sweep over all rows, whose panels, bias and gradient are stacks, as a sweep for each expert.
std::vector<Sweep> split(const Kernels& kernels, const Sweep& all, const Experts& experts) {
    const int64_t size = all.dtype == DType::f32 ? 4 : 2;
    const int64_t panel = panel_elements(all.columns, all.ranks) * (kernels.pairs(all.dtype) ? 2 : 4);
    const auto on = [](const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : nullptr; };
    std::vector<Sweep> sweeps(experts.count(), all);
    for (int64_t e = 0; e < experts.count(); ++e) {
        Sweep& s = sweeps[e];
        const int64_t first = experts.first(e);
        s.rows = experts.rows(e);
        s.first_row = first;
        s.input = on(all.input, first * all.ld_input * size);
        s.panel_in = on(all.panel_in, e * panel);
        s.panel_out = on(all.panel_out, e * panel);
        if (all.product) s.product = all.product + first * all.ranks;
        if (all.q) s.q = all.q + first * all.ranks;
        if (all.gradient) s.gradient = all.gradient + e * all.ranks * all.ld_gradient;
        if (all.bias) s.bias = all.bias + e * all.columns;
        if (all.output) s.output = static_cast<char*>(all.output) + first * all.ld_output * size;
        for (RankGroup& g : s.groups) {
            if (g.scale) g.scale += e * all.columns;
            if (g.z) g.z = static_cast<char*>(g.z) + first * all.columns * (g.z_dtype == DType::f32 ? 4 : 2);
        }
    }
    return sweeps;
}

// y = x[0] Wᵀ, or x[0] W, of each expert, with the output of its sweep, whose groups find x[i] times the same as their
// operand i. Of a 4-bit W, experts without rows are not decoded.
void multiply(const Kernels& kernels, const std::vector<Sweep>& sweeps, const Experts& experts,
              const std::vector<Tensor>& x, const Weight& weight, bool transposed) {
    const bool decodes = weight.four_bit();
    const FourBit packed = decodes ? four_bit(weight) : FourBit{};
    const Tensor right = transposed && !decodes ? weight.data.transpose(1, 2) : weight.data;  // [E, depth, columns]
    const int64_t depth = x[0].size(1);
    const auto right_operand = [&](int64_t e) -> RightOperand {
        if (!decodes) return {.s = matrix(right, e)};
        return {.s = {nullptr, dtype_of(x[0]), depth, transposed ? weight.N : weight.K, 0, 0},
                .packed = &packed,
                .transposed = transposed != weight.lies_transposed(),
                .first = e * weight.N * weight.K};
    };
    const bool of_one_dtype = decodes || x[0].scalar_type() == weight.data.scalar_type();
    const bool pairs = of_one_dtype && multiplies_pairs(kernels, dtype_of(x[0]), depth);
    std::vector<Tensor> inputs;
    for (const Tensor& part : x) inputs.push_back(operand_rows(part, pairs));
    std::vector<BaseProduct> products;
    for (int64_t e = 0; e < experts.count(); ++e) {
        if (!experts.busy[e]) continue;
        Term term{.s = right_operand(e)};
        for (const Tensor& rows : inputs) term.x.push_back(operand_of(rows, experts.first(e)));
        products.push_back({sweeps[e], {term}});
    }
    base_products(kernels, products, pairs);
}

}  // namespace

Forward lora_grouped_linear(const Tensor& x, const std::vector<int64_t>& offsets, const Weight& weight,
                            const std::optional<Tensor>& bias, const Adapters& adapters, bool keep_z) {
    const Kernels& kernels = cpu::kernels();
    const Experts experts(offsets);
    const Layout layout(adapters);
    const Tensor x2 = flat_rows(x), q = floats({x2.size(0), layout.ranks});
    const bool pairs = kernels.pairs(dtype_of(x));

    Sweep down = sweep_over(x2, layout);
    const Tensor panels_A = panels(kernels, layout.stacked(adapters.A, false).transpose(1, 2), pairs, experts.busy);
    down.input = x2.const_data_ptr();
    down.ld_input = x2.stride(0);
    down.panel_in = panels_A.const_data_ptr();
    down.product = q.mutable_data_ptr<float>();
    run(kernels, split(kernels, down, experts));
    const Tensor u = layout.dense_then_scale_(q);

    const Tensor y = at::empty({x2.size(0), weight.N}, x.options());
    const Tensor bias32 = bias ? bias->to(at::kFloat).contiguous() : Tensor();
    Sweep up = sweep_over(y, layout);
    const Tensor panels_B = panels(kernels, layout.stacked(adapters.B, true), pairs, experts.busy);
    std::vector<Tensor> inputs{x2};
    if (!adapters.dora()) up.groups = {layout.unmasked()};
    const std::vector<Tensor> z = scale_groups(up.groups, adapters, y, keep_z);
    for (size_t i = 0; i < adapters.c.size(); ++i) {
        RankGroup& group = up.groups[i];
        if (group.threshold) {  // the mask is on x: y has none
            inputs.push_back(scaled(x2, offsets, {}, dropout_scale(group.threshold), group.seed, group.threshold));
            group.operand = inputs.size() - 1;
            group.threshold = 0;
        }
    }
    up.q = q.const_data_ptr<float>();
    up.panel_out = panels_B.const_data_ptr();
    up.bias = bias ? bias32.const_data_ptr<float>() : nullptr;
    up.output = y.mutable_data_ptr();
    up.ld_output = y.stride(0);
    multiply(kernels, split(kernels, up, experts), experts, inputs, weight, true);
    return {y, u, z};
}

std::vector<Tensor> lora_grouped_linear_backward(const Tensor& dy, const std::optional<Tensor>& x,
                                                 const std::vector<int64_t>& offsets, const Weight& weight,
                                                 const Adapters& adapters, const Kept& kept, const Needs& needs) {
    const Kernels& kernels = cpu::kernels();
    const Experts experts(offsets);
    const Layout layout(adapters);
    const Chain chain(adapters);
    const Tensor dy2 = flat_rows(dy), x2 = x ? flat_rows(*x) : Tensor();
    const bool pairs = kernels.pairs(dtype_of(dy)), need_A = Needs::any(needs.A), need_B = Needs::any(needs.B);
    const int64_t E = experts.count(), M = dy2.size(0), N = weight.N, K = weight.K;

    Tensor v, dA, dB, dx;
    if (needs.x || need_A || need_B) {  // dy is read once for v and dB
        Sweep sweep = sweep_over(dy2, layout);
        sweep.groups = {layout.unmasked()};
        sweep.input = dy2.const_data_ptr();
        sweep.ld_input = dy2.stride(0);
        Tensor panels_B, q;
        if (needs.x || need_A) {
            std::vector<Tensor> B = adapters.B;
            for (size_t i = 0; i < adapters.c.size(); ++i) B[i] = B[i] * chain.own[i].unsqueeze(2);
            v = floats({M, layout.ranks});
            panels_B = panels(kernels, layout.stacked(B, true).transpose(1, 2), pairs, experts.busy);
            sweep.panel_in = panels_B.const_data_ptr();
            sweep.product = v.mutable_data_ptr<float>();
        }
        if (need_B) {
            q = layout.padded_from(*kept.u);
            dB = floats({E, layout.ranks, gradient_stride(M, N)});
            sweep.q = q.const_data_ptr<float>();
            sweep.gradient = dB.mutable_data_ptr<float>();
            sweep.ld_gradient = dB.size(2);
        }
        run(kernels, split(kernels, sweep, experts));
    }
    if (v.defined()) layout.scale_(v);
    std::vector<Tensor> inputs;  // of the product with W: the gradients of x Wᵀ and of each D(x) Wᵀ
    std::vector<RankGroup> groups = layout.groups;
    if (needs.x || needs.weight) {
        inputs = chain.inputs(dy2, offsets, adapters, groups);
    }
    if (needs.x) {
        dx = at::empty({M, K}, dy.options());
        Sweep sweep = sweep_over(dx, layout);
        sweep.groups = groups;
        const Tensor panels_A = panels(kernels, layout.stacked(adapters.A, false), pairs, experts.busy);
        sweep.q = v.const_data_ptr<float>();
        sweep.panel_out = panels_A.const_data_ptr();
        sweep.output = dx.mutable_data_ptr();
        sweep.ld_output = dx.stride(0);
        multiply(kernels, split(kernels, sweep, experts), experts, inputs, weight, false);
    }
    if (need_A) {
        Sweep sweep = sweep_over(x2, layout);
        dA = floats({E, layout.ranks, gradient_stride(M, K)});
        sweep.q = v.const_data_ptr<float>();
        sweep.input = x2.const_data_ptr();
        sweep.ld_input = x2.stride(0);
        sweep.gradient = dA.mutable_data_ptr<float>();
        sweep.ld_gradient = dA.size(2);
        run(kernels, split(kernels, sweep, experts));
    }

    std::vector<Tensor> grads;
    const auto rows_of = [&](const Tensor& t, int64_t e) { return t.narrow(0, experts.first(e), experts.rows(e)); };
    if (needs.x) grads.push_back(dx);
    if (needs.weight) {
        std::vector<Tensor> factors{x2};
        for (const RankGroup& group : groups)
            if (group.operand) factors.push_back(scaled(x2, offsets, {}, 1.0, group.seed, group.threshold));
        grads.push_back(at::empty_like(weight.data));
        for (int64_t e = 0; e < E; ++e) {
            Tensor dW = at::mm(rows_of(inputs[0], e).t(), rows_of(factors[0], e));
            for (size_t i = 1; i < inputs.size(); ++i)
                dW = dW + at::mm(rows_of(inputs[i], e).t(), rows_of(factors[i], e));
            grads.back()[e].copy_(dW);
        }
    }
    if (needs.bias) {
        grads.push_back(at::empty({E, N}, dy.options()));
        for (int64_t e = 0; e < E; ++e)
            grads.back()[e].copy_(rows_of(dy2, e).sum(at::IntArrayRef{0}, false, at::kFloat));
    }
    for (size_t i = 0; i < adapters.count(); ++i)
        if (needs.A[i]) grads.push_back(at::empty_like(adapters.A[i]).copy_(layout.part_of(dA, i, K)));
    for (size_t i = 0; i < adapters.count(); ++i)
        if (needs.B[i]) {
            const Tensor s = at::scalar_tensor(adapters.scaling[i]);
            grads.push_back(at::empty_like(adapters.B[i]));
            at::mul_out(grads.back(), layout.part_of(dB, i, N).transpose(1, 2),
                        adapters.dora() ? chain.own[i].unsqueeze(2) * s : s);
        }
    for (size_t i = 0; i < adapters.c.size(); ++i)
        if (needs.c[i]) {
            const Tensor sums = column_dots(dy2, kept.z[i], offsets);
            grads.push_back(chain.later[i].defined() ? sums * chain.later[i] : sums);
        }
    return grads;
}

}  // namespace fastpeft::cpu

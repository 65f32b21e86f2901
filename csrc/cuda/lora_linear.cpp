// The op on a GPU, forward and backward, step by step of launch.h.
#include "lora_linear.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "launch.h"

namespace fastpeft::gpu {

using at::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

// Each adapter's columns of u [M, Σ r].
Tensors parts_of(const Tensor& u, const Adapters& adapters) {
    if (adapters.A.size() == 1) return {u};
    Tensors parts;
    int64_t first = 0;
    for (const Tensor& A : adapters.A) {
        parts.push_back(u.narrow(1, first, A.size(0)));
        first += A.size(0);
    }
    return parts;
}

std::vector<Mask> masks_of(const Adapters& adapters) {
    std::vector<Mask> masks(adapters.A.size());
    for (size_t i = 0; i < masks.size(); ++i)
        if (adapters.thresholds[i])
            masks[i] = {static_cast<uint32_t>(adapters.thresholds[i]),
                        adapters.seed->const_data_ptr<int64_t>() + static_cast<int64_t>(i) * adapters.seed->stride(0)};
    return masks;
}

bool any_masked(const std::vector<Mask>& masks) {
    return std::any_of(masks.begin(), masks.end(), [](const Mask& mask) { return mask.threshold != 0; });
}

Tensor index_of(const Adapters& adapters) {
    return adapters.index ? adapters.index->reshape({-1}).to(at::kInt).contiguous() : Tensor();
}

Tensors columns_of(const Tensor& buffer, const Adapters& adapters) {
    return buffer.defined() ? parts_of(buffer, adapters) : Tensors(adapters.A.size());
}

// u [M, Σ r] = keep ∘ x Aᵀ of every adapter; with `left` and `right` also the operands of the fused product.
Tensor lora_down(const Kernels& kernels, const Tensor& x, const Adapters& adapters, const std::vector<Mask>& masks,
                 const Tensor& left, const Tensor& right) {
    const Tensor u = at::empty({x.size(0), adapters.ranks()}, x.options().dtype(at::kFloat));
    const Tensor index = index_of(adapters);
    const Tensors parts = parts_of(u, adapters), q = columns_of(left, adapters), B = columns_of(right, adapters);
    for (size_t i = 0; i < parts.size(); ++i)
        kernels.down(x, adapters.A[i], {}, masks[i], index, i,
                     {.u = parts[i], .q = q[i], .q_scale = adapters.scaling[i]}, {adapters.B[i], B[i]});
    return u;
}

Tensor dense_of(const Kernels& kernels, const Weight& weight, at::ScalarType dtype) {
    return weight.four_bit() ? kernels.decode(weight, dtype) : weight.data;
}

// All adapters' low-rank parts as one.
Tail lora_tail(const Tensor& u, const Adapters& adapters) {
    if (adapters.B.size() == 1) return {.q = u, .right = adapters.B[0], .scale = adapters.scaling[0]};
    Tensors scaled;
    for (size_t i = 0; i < adapters.B.size(); ++i) scaled.push_back(adapters.B[i].to(at::kFloat) * adapters.scaling[i]);
    return {.q = u, .right = at::cat(scaled, 1)};
}

Tensors empty_gradients(const Tensor& dy, const Weight& weight, const Adapters& adapters, const Needs& needs) {
    Tensors grads;
    const auto add = [&](bool need, const Tensor& like) {
        if (need) grads.push_back(at::zeros_like(like));
    };
    add(needs.x, with_leading_shape_of(dy, at::empty({0, weight.K}, dy.options())));
    add(needs.weight, weight.data);
    add(needs.bias, at::empty({weight.N}, dy.options()));
    for (size_t i = 0; i < adapters.count(); ++i) add(needs.A[i], adapters.A[i]);
    for (size_t i = 0; i < adapters.count(); ++i) add(needs.B[i], adapters.B[i]);
    for (size_t i = 0; i < adapters.c.size(); ++i) add(needs.c[i], adapters.c[i]);
    return grads;
}

}  // namespace

Forward lora_linear(const Gpu& gpu, const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
                    const Adapters& adapters, bool keep_z) {
    const Kernels kernels(gpu);
    const Tensor x2 = flat_rows(x);
    const int64_t M = x2.size(0);
    const std::vector<Mask> masks = masks_of(adapters);
    const size_t scales = adapters.c.size();
    Tensors z;
    for (size_t i = 0; keep_z && i < scales; ++i)
        z.push_back(at::empty({M, weight.N}, x.options().dtype(z_dtype(M, x.scalar_type()))));
    if (M == 0)
        return {with_leading_shape_of(x, at::empty({0, weight.N}, x.options())),
                at::empty({0, adapters.ranks()}, x.options().dtype(at::kFloat)), z};
    const bool one_tail = scales == 0 || (scales == 1 && !masks[0].threshold);
    const bool in_loop = one_tail && Kernels::decodes_in_loop(M, weight);
    const Tensor dense = in_loop || weight.absent() ? Tensor() : dense_of(kernels, weight, x.scalar_type());
    const bool fused = one_tail && dense.defined() && kernels.fuses(x2, dense, adapters.ranks(), false);
    const Tensor left = fused ? left_of(x2, adapters.ranks()) : Tensor();
    const Tensor right = fused ? right_of(dense, adapters.ranks()) : Tensor();
    const Tensor u = lora_down(kernels, x2, adapters, masks, left, right);

    std::vector<Tail> tails;
    if (scales == 0) tails.push_back(fused ? Tail{} : lora_tail(u, adapters));
    const Tensors parts = parts_of(u, adapters);
    for (size_t i = 0; i < scales; ++i)
        tails.push_back({.q = parts[i],
                         .right = adapters.B[i],
                         .scale = adapters.scaling[i],
                         .c = adapters.c[i],
                         .z = keep_z ? z[i] : Tensor()});
    if (bias) tails.back().bias = *bias;

    if (in_loop) return {with_leading_shape_of(x, kernels.few_tokens_four_bit(x2, weight, tails[0])), u, z};
    if (fused) {
        tails[0].q = left;
        tails[0].right = right;
        return {with_leading_shape_of(x, kernels.fused(x2, dense, tails[0])), u, z};
    }
    const Tensor y = dense.defined() ? at::mm(x2, dense.t()) : at::zeros({M, weight.N}, x.options());
    for (size_t i = 0; i < tails.size(); ++i) {  // DoRA's adapters one after the other
        Tensor second;
        if (scales != 0 && masks[i].threshold)
            second = at::mm(kernels.dropout(x2, masks[i], dropout_scale(masks[i].threshold)), dense.t());
        kernels.finish_(y, second, tails[i]);
    }
    return {with_leading_shape_of(x, y), u, z};
}

Tensors lora_linear_backward(const Gpu& gpu, const Tensor& dy, const std::optional<Tensor>& x, const Weight& weight,
                             const Adapters& adapters, const Kept& kept, const Needs& needs, const Tensor& onto) {
    const Kernels kernels(gpu);
    const size_t count = adapters.count();
    const bool scales = adapters.dora();
    const Tensor dy2 = flat_rows(dy);
    if (dy2.size(0) == 0) return empty_gradients(dy, weight, adapters, needs);
    const at::ScalarType dtype = dy.scalar_type();
    const Tensor x2 = x ? flat_rows(*x) : Tensor(), index = index_of(adapters);
    const Tensors u_parts = kept.u ? parts_of(*kept.u, adapters) : Tensors(count);
    const std::vector<Mask> masks = masks_of(adapters);
    const bool multiplies = !weight.absent() && (needs.x || needs.weight);
    const Tensor dense = multiplies ? dense_of(kernels, weight, dtype) : Tensor();
    // One sweep masks one adapter's part; DoRA's dropout takes a product of its own.
    const bool masked = any_masked(masks), one_product = !masked || (count == 1 && !scales);
    const bool fused = needs.x && multiplies && one_product && !onto.defined() &&
                       kernels.fuses(dy2, dense.t(), adapters.ranks(), masked);
    const bool need_q = fused || Needs::any(needs.A);
    const Tensor left = need_q ? left_of(dy2, adapters.ranks()) : Tensor();
    const Tensor right = fused ? right_of(dense.t(), adapters.ranks()) : Tensor();
    const Tensor v =
        needs.x && !fused ? at::empty({dy2.size(0), adapters.ranks()}, dy.options().dtype(at::kFloat)) : Tensor();
    const Tensors q = columns_of(left, adapters), v_parts = columns_of(v, adapters), A = columns_of(right, adapters);

    Tensors dA(count), dB(count), dc(count);
    Tensor flowing = dy2;                           // into what is below the adapters that were passed
    std::vector<std::pair<Mask, Tensor>> branches;  // what flows into D(x) Wᵀ: DoRA with dropout
    for (size_t i = count; i-- > 0;) {
        const bool need_A = needs.A[i], need_B = needs.B[i], need_c = scales && needs.c[i];
        const bool hands_on = scales && (i > 0 || needs.x || needs.weight);
        const Tensor c = scales ? adapters.c[i] : Tensor();
        if (needs.x || need_A)
            kernels.down(flowing, adapters.B[i].t(), c, {}, index, i,
                         {v_parts[i], q[i], adapters.scaling[i], adapters.scaling[i]}, {adapters.A[i].t(), A[i]});
        if (need_B || need_c || hands_on) {
            const DyGradients found =
                kernels.output_sums(flowing, u_parts[i], adapters.scaling[i], c, need_c ? kept.z[i] : Tensor(),
                                    {need_B, need_c, hands_on}, adapters.B[i].scalar_type());
            dB[i] = found.dB;
            dc[i] = found.dc;
            if (hands_on && masks[i].threshold)
                branches.emplace_back(masks[i], found.dz - flowing);
            else if (hands_on)
                flowing = found.dz;
        }
        if (need_A) dA[i] = kernels.input_sums(x2, q[i], masks[i], adapters.A[i].scalar_type());
    }

    Tensors grads;
    if (needs.x) {
        Tensor dx;
        if (fused) {
            dx = kernels.fused(flowing, dense.t(), {.q = left, .right = right, .mask = masks[0]});
        } else {
            if (onto.defined())
                dx = onto.addmm_(flowing, dense);
            else
                dx = multiplies ? at::mm(flowing, dense) : at::zeros({dy2.size(0), weight.K}, dy.options());
            for (size_t i = 0; i < count; ++i)
                kernels.finish_(dx, {}, {.q = v_parts[i], .right = adapters.A[i].t(), .mask = masks[i]});
        }
        for (const auto& [mask, branch] : branches)
            dx = dx + kernels.dropout(at::mm(branch, dense), mask, dropout_scale(mask.threshold));
        grads.push_back(with_leading_shape_of(dy, dx));
    }
    if (needs.weight) {
        Tensor dW = at::mm(flowing.t(), x2);
        for (const auto& [mask, branch] : branches)
            dW = dW + at::mm(branch.t(), kernels.dropout(x2, mask, dropout_scale(mask.threshold)));
        grads.push_back(dW.to(weight.data.scalar_type()));
    }
    if (needs.bias) grads.push_back(dy2.sum(at::IntArrayRef{0}, false, at::kFloat).to(dtype));
    for (const Tensors* some : {&dA, &dB, &dc})
        for (const Tensor& grad : *some)
            if (grad.defined()) grads.push_back(grad);
    return grads;
}

Shared lora_shared_linear(const Gpu& gpu, const Tensor& x, const Layers& layers) {
    Tensors y, u;
    for (const auto& [weight, bias, adapter] : layers) {
        const Forward one = lora_linear(gpu, x, weight, bias, adapter, false);
        y.push_back(std::get<0>(one));
        u.push_back(std::get<1>(one));
    }
    return {y, at::cat(u, 1)};
}

Tensors lora_shared_linear_backward(const Gpu& gpu, const Tensors& dy, const std::optional<Tensor>& x,
                                    const Layers& layers, const std::optional<Tensor>& u, const Needs& needs) {
    Tensors dx, dA, dB;
    int64_t rank = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto& [weight, _, adapter] = layers[i];
        Kept kept;
        if (u) kept.u = u->narrow(1, rank, adapter.ranks());
        rank += adapter.ranks();
        const Tensors grads = lora_linear_backward(gpu, dy[i], x, weight, adapter, kept,
                                                   {needs.x, false, false, {needs.A[i]}, {needs.B[i]}, {}},
                                                   dx.empty() ? Tensor() : flat_rows(dx[0]));
        auto next = grads.begin();
        if (needs.x) dx = {*next++};
        if (needs.A[i]) dA.push_back(*next++);
        if (needs.B[i]) dB.push_back(*next++);
    }
    for (const Tensors* some : {&dA, &dB}) dx.insert(dx.end(), some->begin(), some->end());
    return dx;
}

Tensor dora_norm(const Gpu& gpu, const Weight& weight, const Tensor& A, const Tensor& B, double scaling,
                 at::ScalarType dtype) {
    return Kernels(gpu).dora_norm(weight, A, B, scaling, dtype);
}

}  // namespace fastpeft::gpu

#include "gpu.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "gpu_kernels.h"
#include "layout.h"

namespace fastpeft::gpu {

using at::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

Tensor matrix_of(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({-1, x.size(-1)}); }

Tensor with_leading_shape_of(const Tensor& like, const Tensor& y) {
    if (like.dim() == 2) return y;
    std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
    shape.back() = y.size(1);
    return y.view(shape);
}

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

Tensor side_by_side(const Tensors& parts) { return parts.size() == 1 ? parts[0] : at::cat(parts, 1); }

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

// A product of its own, times a factor; rows that another adapter serves are 0, whatever stood there.
Tensor selected(const Tensor& product, double factor, const Tensor& index, size_t adapter) {
    if (factor != 1.0) product.mul_(factor);
    if (index.defined()) product.masked_fill_(index.ne(static_cast<int64_t>(adapter)).unsqueeze(1), 0);
    return product;
}

Tensor index_of(const Adapters& adapters) { return adapters.index ? adapters.index->reshape({-1}) : Tensor(); }

Tensor kept(const Kernels& kernels, const Tensor& x, const Mask& mask) {
    return mask.threshold ? kernels.dropout(x, mask, 1.0) : x;
}

// u [M, Σ r] = keep ∘ x Aᵀ of every adapter.
Tensor lora_down(const Kernels& kernels, const Tensor& x, const Adapters& adapters, const std::vector<Mask>& masks) {
    const Tensor index = index_of(adapters);
    Tensors parts;
    if (x.size(0) <= cuda::kDownTokens && !any_masked(masks)) {
        int64_t ranks = 0;
        for (const Tensor& A : adapters.A) ranks += A.size(0);
        const Tensor u = at::empty({x.size(0), ranks}, x.options().dtype(at::kFloat));
        const Tensor index32 = index.defined() ? index.to(at::kInt).contiguous() : index;
        parts = parts_of(u, adapters);
        for (size_t i = 0; i < parts.size(); ++i) kernels.few_tokens_down(x, adapters.A[i], parts[i], index32, i);
        return u;
    }
    for (size_t i = 0; i < masks.size(); ++i) {
        const Tensor A = adapters.A[i].to(x.scalar_type());
        parts.push_back(selected(wide_product(kept(kernels, x, masks[i]), A.t()), 1.0, index, i));
    }
    return side_by_side(parts);
}

// All adapters' low-rank parts as one.
Tail lora_tail(const Tensor& u, const Adapters& adapters) {
    if (adapters.B.size() == 1) return {.q = u, .right = adapters.B[0], .scale = adapters.scaling[0]};
    Tensors scaled;
    for (size_t i = 0; i < adapters.B.size(); ++i) scaled.push_back(adapters.B[i].to(at::kFloat) * adapters.scaling[i]);
    return {.q = u, .right = at::cat(scaled, 1)};
}

// dx = dy W + Σ keep ∘ (v A); each mask takes a sweep of its own over the result.
Tensor input_gradient(const Kernels& kernels, const Tensor& dy, const Tensor& weight, const Adapters& adapters,
                      const Tensors& v, const std::vector<Mask>& masks) {
    const Tensor dx = at::mm(dy, weight);
    if (!any_masked(masks)) {
        Tensors A;
        for (const Tensor& a : adapters.A) A.push_back(adapters.A.size() == 1 ? a : a.to(at::kFloat));
        const Tensor rows = A.size() == 1 ? A[0] : at::cat(A);
        kernels.finish_(dx, {}, {.q = side_by_side(v), .right = rows.t()});
        return dx;
    }
    for (size_t i = 0; i < v.size(); ++i)
        kernels.finish_(dx, {}, {.q = v[i], .right = adapters.A[i].t(), .mask = masks[i]});
    return dx;
}

Tensors empty_gradients(const Tensor& dy, const Weight& weight, const Adapters& adapters,
                        const std::vector<bool>& needs) {
    std::vector<int64_t> shape(dy.sizes().begin(), dy.sizes().end());
    shape.back() = weight.K;
    Tensors like{at::empty(shape, dy.options()), weight.data, at::empty({weight.N}, dy.options())};
    for (const Tensors* some : {&adapters.A, &adapters.B, &adapters.c})
        like.insert(like.end(), some->begin(), some->end());
    Tensors grads;
    for (size_t i = 0; i < like.size(); ++i)
        if (needs[i]) grads.push_back(at::zeros_like(like[i]));
    return grads;
}

}  // namespace

Forward lora_linear(const Gpu& gpu, const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
                    const Adapters& adapters, bool keep_z) {
    const Kernels kernels(gpu);
    const Tensor x2 = matrix_of(x);
    const int64_t M = x2.size(0);
    const std::vector<Mask> masks = masks_of(adapters);
    const size_t scales = adapters.c.size();
    Tensors z;
    for (size_t i = 0; keep_z && i < scales; ++i)
        z.push_back(at::empty({M, weight.N}, M == 1 ? x.options().dtype(at::kFloat) : x.options()));
    if (M == 0) {
        int64_t ranks = 0;
        for (const Tensor& A : adapters.A) ranks += A.size(0);
        return {with_leading_shape_of(x, at::empty({0, weight.N}, x.options())),
                at::empty({0, ranks}, x.options().dtype(at::kFloat)), z};
    }
    const Tensor u = lora_down(kernels, x2, adapters, masks);
    std::vector<Tail> tails;
    if (scales == 0) tails.push_back(lora_tail(u, adapters));
    const Tensors parts = parts_of(u, adapters);
    for (size_t i = 0; i < scales; ++i)
        tails.push_back({.q = parts[i],
                         .right = adapters.B[i],
                         .scale = adapters.scaling[i],
                         .c = adapters.c[i],
                         .z = keep_z ? z[i] : Tensor()});
    if (bias) tails.back().bias = *bias;

    const bool one_tail = tails.size() == 1 && (scales == 0 || !masks[0].threshold);
    if (one_tail && Kernels::decodes_in_loop(M, weight))
        return {with_leading_shape_of(x, kernels.few_tokens_four_bit(x2, weight, tails[0])), u, z};
    const Tensor dense = weight.four_bit() ? kernels.decode(weight, x.scalar_type()) : weight.data;
    const Tensor y = at::mm(x2, dense.t());
    for (size_t i = 0; i < tails.size(); ++i) {  // DoRA's adapters one after the other
        Tensor second;
        if (scales != 0 && masks[i].threshold)
            second = at::mm(kernels.dropout(x2, masks[i], dropout_scale(masks[i].threshold)), dense.t());
        kernels.finish_(y, second, tails[i]);
    }
    return {with_leading_shape_of(x, y), u, z};
}

Tensors lora_linear_backward(const Gpu& gpu, const Tensor& dy, const std::optional<Tensor>& x, const Weight& weight,
                             const Adapters& adapters, const std::optional<Tensor>& u, const Tensors& z,
                             const std::vector<bool>& needs) {
    const Kernels kernels(gpu);
    const size_t count = adapters.A.size();
    const bool need_x = needs[0], need_weight = needs[1], scales = !adapters.c.empty();
    const Tensor dy2 = matrix_of(dy);
    if (dy2.size(0) == 0) return empty_gradients(dy, weight, adapters, needs);
    const at::ScalarType dtype = dy.scalar_type();
    const Tensor x2 = x ? matrix_of(*x) : Tensor(), index = index_of(adapters);
    const Tensors u_parts = u ? parts_of(*u, adapters) : Tensors(count);
    const std::vector<Mask> masks = masks_of(adapters);
    const Tensor dense = !weight.four_bit()      ? weight.data
                         : need_x || need_weight ? kernels.decode(weight, dtype)
                                                 : Tensor();

    Tensors v(count), dA(count), dB(count), dc(count);
    Tensor flowing = dy2;                           // into what is below the adapters that were passed
    std::vector<std::pair<Mask, Tensor>> branches;  // what flows into D(x) Wᵀ: DoRA with dropout
    for (size_t i = count; i-- > 0;) {
        const bool need_A = needs[3 + i], need_B = needs[3 + count + i], need_c = scales && needs[3 + 2 * count + i];
        const bool need_v = need_x || need_A, hands_on = scales && (i > 0 || need_x || need_weight);
        if (need_c) dc[i] = (flowing.to(at::kFloat) * z[i]).sum(0);
        if (!need_v && !need_B && !hands_on) continue;
        const double scale = adapters.scaling[i];
        const Tensor dz = scales ? scaled_to(flowing, adapters.c[i], dtype) : flowing;
        if (need_v) v[i] = selected(wide_product(dz, adapters.B[i].to(dtype)), scale, index, i);
        if (need_B) dB[i] = wide_product(dz.t(), scaled_to(u_parts[i], scale, dtype)).to(adapters.B[i].scalar_type());
        if (need_A)
            dA[i] = wide_product(v[i].to(dtype).t(), kept(kernels, x2, masks[i])).to(adapters.A[i].scalar_type());
        if (hands_on && masks[i].threshold)
            branches.emplace_back(masks[i], dz - flowing);
        else if (hands_on)
            flowing = dz;
    }

    Tensors grads;
    if (need_x) {
        Tensor dx = input_gradient(kernels, flowing, dense, adapters, v, masks);
        for (const auto& [mask, branch] : branches)
            dx = dx + kernels.dropout(at::mm(branch, dense), mask, dropout_scale(mask.threshold));
        grads.push_back(with_leading_shape_of(dy, dx));
    }
    if (need_weight) {
        Tensor dW = at::mm(flowing.t(), x2);
        for (const auto& [mask, branch] : branches)
            dW = dW + at::mm(branch.t(), kernels.dropout(x2, mask, dropout_scale(mask.threshold)));
        grads.push_back(dW.to(weight.data.scalar_type()));
    }
    if (needs[2]) grads.push_back(dy2.sum(at::IntArrayRef{0}, false, at::kFloat).to(dtype));
    for (const Tensors* some : {&dA, &dB, &dc})
        for (const Tensor& grad : *some)
            if (grad.defined()) grads.push_back(grad);
    return grads;
}

}  // namespace fastpeft::gpu

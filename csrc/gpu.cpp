#include "gpu.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "gpu_kernels.h"
#include "layout.h"
#include "operands.h"

namespace fastpeft::gpu {

using at::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

// x [..., K] as [M, K] with contiguous rows; a copy only where a view cannot be.
Tensor rows_of(const Tensor& x) {
    const Tensor rows = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
    return rows.stride(1) == 1 && (rows.size(1) != 1 || rows.stride(0) == 1) ? rows : rows.contiguous();
}

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

int64_t ranks_of(const Adapters& adapters) {
    int64_t ranks = 0;
    for (const Tensor& A : adapters.A) ranks += A.size(0);
    return ranks;
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
    const Tensor u = at::empty({x.size(0), ranks_of(adapters)}, x.options().dtype(at::kFloat));
    const Tensor index = index_of(adapters);
    const Tensors parts = parts_of(u, adapters), q = columns_of(left, adapters), B = columns_of(right, adapters);
    for (size_t i = 0; i < parts.size(); ++i)
        kernels.down(x, adapters.A[i], {}, masks[i], index, i,
                     {.u = parts[i], .q = q[i], .q_scale = adapters.scaling[i]}, {adapters.B[i], B[i]});
    return u;
}

// All adapters' low-rank parts as one.
Tail lora_tail(const Tensor& u, const Adapters& adapters) {
    if (adapters.B.size() == 1) return {.q = u, .right = adapters.B[0], .scale = adapters.scaling[0]};
    Tensors scaled;
    for (size_t i = 0; i < adapters.B.size(); ++i) scaled.push_back(adapters.B[i].to(at::kFloat) * adapters.scaling[i]);
    return {.q = u, .right = at::cat(scaled, 1)};
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
    check_operands(x, weight, bias, adapters, x.size(-1) ? x.numel() / x.size(-1) : 0);
    if (is_lazy(x) || is_lazy(weight) || is_lazy(bias) || is_lazy(adapters))
        return lora_linear(gpu, in_memory(x), in_memory(weight), in_memory(bias), in_memory(adapters), keep_z);
    const Kernels kernels(gpu);
    const Tensor x2 = rows_of(x);
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
    const bool one_tail = scales == 0 || (scales == 1 && !masks[0].threshold);
    const bool in_loop = one_tail && Kernels::decodes_in_loop(M, weight);
    const Tensor dense = in_loop ? Tensor() : weight.four_bit() ? kernels.decode(weight, x.scalar_type()) : weight.data;
    const bool fused = one_tail && !in_loop && kernels.fuses(x2, dense, ranks_of(adapters), false);
    const Tensor left = fused ? left_of(x2, ranks_of(adapters)) : Tensor();
    const Tensor right = fused ? right_of(dense, ranks_of(adapters)) : Tensor();
    const Tensor u = lora_down(kernels, x2, adapters, masks, left, right);

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

    if (in_loop) return {with_leading_shape_of(x, kernels.few_tokens_four_bit(x2, weight, tails[0])), u, z};
    if (fused) {
        tails[0].q = left;
        tails[0].right = right;
        return {with_leading_shape_of(x, kernels.fused(x2, dense, tails[0])), u, z};
    }
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
    const int64_t tokens = dy.size(-1) ? dy.numel() / dy.size(-1) : 0;
    check_operands(x, weight, {}, adapters, tokens);
    check_kept(dy, weight, adapters, u, z, tokens);
    if (is_lazy(dy) || is_lazy(x) || is_lazy(weight) || is_lazy(adapters))
        return lora_linear_backward(gpu, in_memory(dy), in_memory(x), in_memory(weight), in_memory(adapters), u, z,
                                    needs);
    const Kernels kernels(gpu);
    const size_t count = adapters.A.size();
    const bool need_x = needs[0], need_weight = needs[1], scales = !adapters.c.empty();
    const Tensor dy2 = rows_of(dy);
    if (dy2.size(0) == 0) return empty_gradients(dy, weight, adapters, needs);
    const at::ScalarType dtype = dy.scalar_type();
    const Tensor x2 = x ? rows_of(*x) : Tensor(), index = index_of(adapters);
    const Tensors u_parts = u ? parts_of(*u, adapters) : Tensors(count);
    const std::vector<Mask> masks = masks_of(adapters);
    const Tensor dense = !weight.four_bit()      ? weight.data
                         : need_x || need_weight ? kernels.decode(weight, dtype)
                                                 : Tensor();
    // One sweep masks one adapter's part; DoRA's dropout takes a product of its own.
    const bool masked = any_masked(masks), one_product = !masked || (count == 1 && !scales);
    const bool fused = need_x && one_product && kernels.fuses(dy2, dense.t(), ranks_of(adapters), masked);
    const bool need_q =
        fused || std::any_of(needs.begin() + 3, needs.begin() + 3 + count, [](bool need) { return need; });
    const Tensor left = need_q ? left_of(dy2, ranks_of(adapters)) : Tensor();
    const Tensor right = fused ? right_of(dense.t(), ranks_of(adapters)) : Tensor();
    const Tensor v =
        need_x && !fused ? at::empty({dy2.size(0), ranks_of(adapters)}, dy.options().dtype(at::kFloat)) : Tensor();
    const Tensors q = columns_of(left, adapters), v_parts = columns_of(v, adapters), A = columns_of(right, adapters);

    Tensors dA(count), dB(count), dc(count);
    Tensor flowing = dy2;                           // into what is below the adapters that were passed
    std::vector<std::pair<Mask, Tensor>> branches;  // what flows into D(x) Wᵀ: DoRA with dropout
    for (size_t i = count; i-- > 0;) {
        const bool need_A = needs[3 + i], need_B = needs[3 + count + i], need_c = scales && needs[3 + 2 * count + i];
        const bool hands_on = scales && (i > 0 || need_x || need_weight);
        const Tensor c = scales ? adapters.c[i] : Tensor();
        if (need_x || need_A)
            kernels.down(flowing, adapters.B[i].t(), c, {}, index, i,
                         {v_parts[i], q[i], adapters.scaling[i], adapters.scaling[i]}, {adapters.A[i].t(), A[i]});
        if (need_B || need_c || hands_on) {
            const DyGradients found =
                kernels.output_sums(flowing, u_parts[i], adapters.scaling[i], c, need_c ? z[i] : Tensor(),
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
    if (need_x) {
        Tensor dx;
        if (fused) {
            dx = kernels.fused(flowing, dense.t(), {.q = left, .right = right, .mask = masks[0]});
        } else {
            dx = at::mm(flowing, dense);
            for (size_t i = 0; i < count; ++i)
                kernels.finish_(dx, {}, {.q = v_parts[i], .right = adapters.A[i].t(), .mask = masks[i]});
        }
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

Tensor dora_norm(const Gpu& gpu, const Weight& weight, const Tensor& A, const Tensor& B, double scaling,
                 at::ScalarType dtype) {
    check_operands({}, weight, {}, {.A = {A}, .B = {B}}, 0);
    return Kernels(gpu).dora_norm(in_memory(weight), in_memory(A), in_memory(B), scaling, dtype);
}

}  // namespace fastpeft::gpu

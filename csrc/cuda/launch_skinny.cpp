// The GPU's products with an adapter's rank: kernels of kernels/ in bfloat16 and float16, torch's products in float32
// and where they are faster.
#include <ATen/ATen.h>

#include "launch.h"

namespace fastpeft::gpu {

using at::Tensor;

namespace {

const float* floats(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

Tensor rows(const Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

// Whether torch's products, which have no mask, are faster than ours, their roundings and launches included: as
// measured on an H100 (bench/results) from so many tokens on. More ranks than kMostRanks make ours read x once more.
constexpr int64_t kTokensDown = 8192, kTokensSummed = 2048, kMostRanks = 64;
bool torch_is_faster(const Tensor& x, int64_t rank, int64_t tokens) {
    return x.size(0) >= (rank > kMostRanks ? cuda::kFewestTokens : tokens);
}

// A product of matrices of one dtype in float32: torch may add up parts of what it rounds in the lower precision. A
// CPU, on which the kernels are emulated, has no such product.
Tensor product(const Tensor& a, const Tensor& b) {
    if (a.is_cuda() && a.scalar_type() != at::kFloat) return at::mm(a, b, at::kFloat);
    return at::mm(a.to(at::kFloat), b.to(at::kFloat));
}

}  // namespace

Tensor Kernels::kept(const Tensor& x, const Mask& mask) const { return mask.threshold ? dropout(x, mask, 1.0) : x; }

void Kernels::torch_down(const Tensor& x, const Tensor& A, const Tensor& c, const Mask& mask, const Tensor& index,
                         size_t adapter, const DownResult& result) const {
    Tensor right = A.to(x.scalar_type());
    if (c.defined()) {
        right = at::empty(A.sizes(), x.options());
        at::mul_out(right, A, c);
    }
    const Tensor wide = product(kept(x, mask), right.t());
    if (index.defined()) wide.masked_fill_(index.ne(static_cast<int64_t>(adapter)).unsqueeze(1), 0);
    if (result.u.defined()) result.u.copy_(result.u_scale == 1.0 ? wide : wide * result.u_scale);
    if (result.q.defined()) result.q.copy_(wide * result.q_scale);
}

void Kernels::down(const Tensor& x, const Tensor& A, const Tensor& c, const Mask& mask, const Tensor& index,
                   size_t adapter, const DownResult& result, const Rounding& rounding) const {
    if (x.scalar_type() == at::kFloat ||
        (!mask.threshold && !index.defined() && torch_is_faster(x, A.size(0), kTokensDown))) {
        torch_down(x, A, c, mask, index, adapter, result);
        if (rounding.to.defined()) rounding.to.copy_(rounding.from);
        return;
    }
    const Tensor tokens = rows(x);
    const auto& [u, q, u_scale, q_scale] = result;
    const int32_t* adapters = index.defined() ? index.const_data_ptr<int32_t>() : nullptr;
    if (x.size(0) <= cuda::kDownTokens && !mask.threshold && !c.defined() && !q.defined() && u_scale == 1.0 &&
        !rounding.to.defined()) {
        check("lora_down",
              launchers_.lora_down(tokens.const_data_ptr(), tokens.stride(0), matrix(A), u.mutable_data_ptr<float>(),
                                   u.stride(0), adapters, static_cast<int>(adapter), x.size(0), x.size(1), A.size(0),
                                   dtype_of(x), place_));
        return;
    }
    const cuda::DownOperands operands{.x = tokens.const_data_ptr(),
                                      .x_stride = tokens.stride(0),
                                      .A = matrix(A),
                                      .factor = floats(c),
                                      .threshold = mask.threshold,
                                      .seed = mask.seed,
                                      .index = adapters,
                                      .adapter = static_cast<int>(adapter),
                                      .M = x.size(0),
                                      .K = x.size(1),
                                      .rank = A.size(0)};
    const cuda::DownOutputs outputs{.u = u.defined() ? u.mutable_data_ptr<float>() : nullptr,
                                    .u_stride = u.defined() ? u.stride(0) : 0,
                                    .q = q.defined() ? q.mutable_data_ptr() : nullptr,
                                    .q_stride = q.defined() ? q.stride(0) : 0,
                                    .u_scale = static_cast<float>(u_scale),
                                    .q_scale = static_cast<float>(q_scale)};
    cuda::Cast cast{};
    if (rounding.to.defined()) {
        const bool transposed = rounding.to.stride(1) != 1;
        const Tensor to = transposed ? rounding.to.t() : rounding.to,
                     from = transposed ? rounding.from.t() : rounding.from;
        cast = {.from = matrix(from),
                .to = to.mutable_data_ptr(),
                .to_stride = to.stride(0),
                .rows = to.size(0),
                .columns = to.size(1)};
    }
    check("lora_down", launchers_.lora_down_many(operands, outputs, cast, dtype_of(x), place_));
}

Tensor Kernels::input_sums(const Tensor& x, const Tensor& v, const Mask& mask, at::ScalarType dtype) const {
    if (x.scalar_type() == at::kFloat || (!mask.threshold && torch_is_faster(x, v.size(1), kTokensSummed)))
        return product(v.t(), kept(x, mask)).to(dtype);
    const Tensor tokens = rows(x), dA = at::empty({v.size(1), x.size(1)}, x.options().dtype(dtype));
    const cuda::GradientOperands operands{.x = tokens.const_data_ptr(),
                                          .x_stride = tokens.stride(0),
                                          .q = matrix(v),
                                          .scale = 1.0f,
                                          .threshold = mask.threshold,
                                          .seed = mask.seed,
                                          .c = nullptr,
                                          .z = nullptr,
                                          .M = x.size(0),
                                          .columns = x.size(1),
                                          .rank = v.size(1)};
    const cuda::GradientOutputs outputs{.sums = dA.mutable_data_ptr(),
                                        .sums_dtype = dtype_of(dA),
                                        .sums_rank_stride = dA.stride(0),
                                        .sums_column_stride = 1,
                                        .dc = nullptr,
                                        .dz = nullptr};
    check("lora_gradient", launchers_.lora_gradient(operands, outputs, dtype_of(x), place_));
    return dA;
}

DyGradients Kernels::output_sums(const Tensor& dy, const Tensor& u, double scale, const Tensor& c, const Tensor& z,
                                 std::array<bool, 3> needs, at::ScalarType dtype) const {
    const auto [need_B, need_c, need_z] = needs;
    DyGradients found;
    if (dy.scalar_type() == at::kFloat || (need_c && z.scalar_type() == at::kFloat)) {
        if (need_c) found.dc = (dy.to(at::kFloat) * z).sum(0);
        if (dy.scalar_type() == at::kFloat) {
            const Tensor dz = c.defined() ? dy * c : dy;
            if (need_B) found.dB = at::mm(dz.t(), u * scale).to(dtype);
            if (need_z) found.dz = dz;
            return found;
        }
    }
    if (need_B && !c.defined() && !need_z && torch_is_faster(dy, u.size(1), kTokensSummed)) {
        Tensor q = at::empty(u.sizes(), dy.options());
        at::mul_out(q, u, at::scalar_tensor(scale));
        found.dB = product(dy.t(), q).to(dtype);
        return found;
    }
    const bool sums_c = need_c && !found.dc.defined();
    if (!need_B && !need_z && !sums_c) return found;
    const Tensor tokens = rows(dy);
    const int64_t N = dy.size(1), rank = need_B ? u.size(1) : 1;
    if (need_B) found.dB = at::empty({N, rank}, dy.options().dtype(dtype));
    if (sums_c) found.dc = at::empty({N}, dy.options().dtype(at::kFloat));
    if (need_z) found.dz = at::empty({dy.size(0), N}, dy.options());
    const cuda::GradientOperands operands{.x = tokens.const_data_ptr(),
                                          .x_stride = tokens.stride(0),
                                          .q = need_B ? matrix(u) : Matrix{},
                                          .scale = static_cast<float>(scale),
                                          .threshold = 0,
                                          .seed = nullptr,
                                          .c = floats(c),
                                          .z = sums_c ? z.const_data_ptr() : nullptr,
                                          .M = dy.size(0),
                                          .columns = N,
                                          .rank = rank};
    const cuda::GradientOutputs outputs{.sums = need_B ? found.dB.mutable_data_ptr() : nullptr,
                                        .sums_dtype = need_B ? dtype_of(found.dB) : DType::f32,
                                        .sums_rank_stride = 1,
                                        .sums_column_stride = rank,
                                        .dc = sums_c ? found.dc.mutable_data_ptr<float>() : nullptr,
                                        .dz = need_z ? found.dz.mutable_data_ptr() : nullptr};
    check("lora_gradient", launchers_.lora_gradient(operands, outputs, dtype_of(dy), place_));
    return found;
}

}  // namespace fastpeft::gpu

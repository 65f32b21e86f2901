// One step of an op on a GPU each, on tensors: launches of the kernels in kernels/, or torch's products.
#pragma once
#include <array>

#include "../tensors.h"
#include "lora_linear.h"

namespace fastpeft::gpu {

// One adapter's dropout; a threshold of 0 drops nothing.
struct Mask {
    uint32_t threshold = 0;
    const int64_t* seed = nullptr;  // on the GPU
};

// What follows a product, see cuda::Tail: scale q [M, r] right [N, r]ᵀ, where the mask keeps it; tensors that are not
// defined do nothing.
struct Tail {
    at::Tensor q, right;
    double scale = 1.0;
    Mask mask;
    at::Tensor c, z, bias;
};

// Where a skinny product's result goes: u [M, r] in float32, times u_scale; q [M, r] in the product's dtype, times
// q_scale. Tensors that are not defined do nothing.
struct DownResult {
    at::Tensor u, q;
    double u_scale = 1.0, q_scale = 1.0;
};

// to = from, rounded; both matrices, or undefined.
struct Rounding {
    at::Tensor from, to;
};

// What flows from dy [M, N] into one adapter; undefined where it is not asked for.
struct DyGradients {
    at::Tensor dB, dc, dz;
};

class Kernels {
  public:
    explicit Kernels(const Gpu& gpu) : launchers_(gpu.launchers), place_(gpu.place) {}

    // factor · keep ∘ x, contiguous.
    at::Tensor dropout(const at::Tensor& x, const Mask& mask, double factor) const;

    // `product` [M, N] with its tail, in place; `second`: D(x) Wᵀ, or undefined.
    void finish_(const at::Tensor& product, const at::Tensor& second, const Tail& tail) const;

    // Whether `fused` takes x [M, K] Wᵀ with so many ranks.
    bool fuses(const at::Tensor& x, const at::Tensor& weight, int64_t ranks, bool masked) const;

    // x Wᵀ with its tail, whose q is scaled and in the dtype of x, and whose right is `right_of(weight, …)`.
    at::Tensor fused(const at::Tensor& x, const at::Tensor& weight, const Tail& tail) const;

    // W, dense.
    at::Tensor decode(const Weight& weight, at::ScalarType dtype) const;

    // Whether few_tokens_four_bit takes this product.
    static bool decodes_in_loop(int64_t M, const Weight& weight);

    // x Wᵀ with its tail, which has no mask.
    at::Tensor few_tokens_four_bit(const at::Tensor& x, const Weight& weight, const Tail& tail) const;

    // keep ∘ x (c ∘ A)ᵀ [M, r] of x [M, K], A [r, K], c [K] or undefined; 0 where index [M] (int32, contiguous, or
    // undefined) names another adapter. `rounding` is done beside it.
    void down(const at::Tensor& x, const at::Tensor& A, const at::Tensor& c, const Mask& mask, const at::Tensor& index,
              size_t adapter, const DownResult& result, const Rounding& rounding) const;

    // dA [r, K] = vᵀ (keep ∘ x), in `dtype`.
    at::Tensor input_sums(const at::Tensor& x, const at::Tensor& v, const Mask& mask, at::ScalarType dtype) const;

    // dB [N, r] = (c ∘ dy)ᵀ scale u, in `dtype`, dc [N] = Σ dy ∘ z and dz = c ∘ dy, as `needs` says; c and z may be
    // undefined.
    DyGradients output_sums(const at::Tensor& dy, const at::Tensor& u, double scale, const at::Tensor& c,
                            const at::Tensor& z, std::array<bool, 3> needs, at::ScalarType dtype) const;

    // ‖W + scaling B A‖ of each row, see ops.py.
    at::Tensor dora_norm(const Weight& weight, const at::Tensor& A, const at::Tensor& B, double scaling,
                         at::ScalarType dtype) const;

  private:
    void check(const char* kernel, cuda::Error error) const;
    void torch_down(const at::Tensor& x, const at::Tensor& A, const at::Tensor& c, const Mask& mask,
                    const at::Tensor& index, size_t adapter, const DownResult& result) const;
    at::Tensor kept(const at::Tensor& x, const Mask& mask) const;

    const cuda::Launchers& launchers_;
    cuda::Place place_;
};

// A buffer for the right operand [N, ranks] of a low-rank part, laid out as `fused` wants it beside W [N, K].
at::Tensor right_of(const at::Tensor& weight, int64_t ranks);

// A buffer for the left operand [M, ranks].
at::Tensor left_of(const at::Tensor& x, int64_t ranks);

}  // namespace fastpeft::gpu

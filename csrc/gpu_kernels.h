// The launchers of cuda/ on tensors, and torch's products as the GPU's op needs them.
#pragma once
#include "gpu.h"

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

class Kernels {
  public:
    explicit Kernels(const Gpu& gpu) : launchers_(gpu.launchers), place_(gpu.place) {}

    // factor · keep ∘ x, contiguous.
    at::Tensor dropout(const at::Tensor& x, const Mask& mask, double factor) const;

    // `product` [M, N] with its tail, in place; `second`: D(x) Wᵀ, or undefined.
    void finish_(const at::Tensor& product, const at::Tensor& second, const Tail& tail) const;

    // W, dense.
    at::Tensor decode(const Weight& weight, at::ScalarType dtype) const;

    // Whether few_tokens_four_bit takes this product.
    static bool decodes_in_loop(int64_t M, const Weight& weight);

    // x Wᵀ with its tail, which has no mask.
    at::Tensor few_tokens_four_bit(const at::Tensor& x, const Weight& weight, const Tail& tail) const;

    // Writes x Aᵀ to u [M, r], M up to cuda::kDownTokens; 0 where index (int32, contiguous, or undefined) names another
    // adapter.
    void few_tokens_down(const at::Tensor& x, const at::Tensor& A, const at::Tensor& u, const at::Tensor& index,
                         size_t adapter) const;

  private:
    void check(const char* kernel, cuda::Error error) const;

    const cuda::Launchers& launchers_;
    cuda::Place place_;
};

// a b with its sums left in float32.
at::Tensor wide_product(const at::Tensor& a, const at::Tensor& b);

// t times a number (t in float32) or a tensor (in float32), rounded once to `dtype`.
at::Tensor scaled_to(const at::Tensor& t, double factor, at::ScalarType dtype);
at::Tensor scaled_to(const at::Tensor& t, const at::Tensor& factor, at::ScalarType dtype);

}  // namespace fastpeft::gpu

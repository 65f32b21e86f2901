// The LoRA op on CPU tensors: what backends/native.py calls.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "weight.h"

namespace fastpeft {

// The adapters of one call, as ops.py describes them, with dropout's factor 1 / (1 - p) made part of `scaling` and p
// turned into the mask's threshold.
struct Adapters {
    std::vector<at::Tensor> A, B;  // [r, K], [N, r]
    std::vector<at::Tensor> c;     // DoRA: [N], float32, contiguous, one an adapter; empty for LoRA
    std::vector<double> scaling;
    std::vector<int64_t> thresholds;  // 0: nothing is dropped
    std::optional<at::Tensor> seed, index;
};

// How a call is computed; backends/native.py chooses from measurements.
enum class Plan {
    dots,             // dot products with the rows of W: a few tokens, contiguous tensors, forward alone
    vendor_first,     // the vendor's product, the low-rank part added onto it
    vendor_last,      // the vendor's product added onto the low-rank part
    vendor_float32,   // vendor_first in float32, stripe by stripe of W: processors without float16 products, 4-bit W
    one_accumulator,  // both in the same accumulators (cpu/base_product.h): bfloat16
};

// y [..., N], u [M, Σ r] in float32, and with keep_z each DoRA adapter's z [M, N].
using Forward = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;
Forward lora_linear(const at::Tensor& x, const Weight& weight, const std::optional<at::Tensor>& bias,
                    const Adapters& adapters, bool keep_z, Plan plan);

// The gradients of x, weight, bias, *A, *B, *c that `needs` asks for, in this order.
std::vector<at::Tensor> lora_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                             const Weight& weight, const Adapters& adapters,
                                             const std::optional<at::Tensor>& u, const std::vector<at::Tensor>& z,
                                             const std::vector<bool>& needs, Plan plan);

// DoRA's norm of each row of W + s B A [N, K]: [N] in float32; s B A is computed in `dtype`.
at::Tensor dora_norm(const Weight& weight, const at::Tensor& A, const at::Tensor& B, double scaling,
                     at::ScalarType dtype);

// 64 bits that depend on every `every`-th element of a contiguous tensor and on its place.
uint64_t fingerprint(const at::Tensor& t, int64_t every);

// Boolean [rows, columns], true where an element is kept: the mask that the kernels draw.
at::Tensor dropout_keep(int64_t seed, int64_t rows, int64_t columns, int64_t threshold);

}  // namespace fastpeft

// The ops on CPU tensors; ../ops.h says what they compute.
#pragma once
#include "plan.h"

namespace fastpeft::cpu {

Forward lora_linear(const at::Tensor& x, const Weight& weight, const std::optional<at::Tensor>& bias,
                    const Adapters& adapters, bool keep_z);

std::vector<at::Tensor> lora_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                             const Weight& weight, const Adapters& adapters, const Kept& kept,
                                             const Needs& needs);

// Of layers that read the same x; whether their plans leave anything to share.
bool shares(const at::Tensor& x, const Layers& layers);
Shared lora_shared_linear(const at::Tensor& x, const Layers& layers);
std::vector<at::Tensor> lora_shared_linear_backward(const std::vector<at::Tensor>& dy,
                                                    const std::optional<at::Tensor>& x, const Layers& layers,
                                                    const std::optional<at::Tensor>& u, const Needs& needs);

// Of experts; offsets [E + 1] ascend from 0 to T. One stride of each W must be 1.
Forward lora_grouped_linear(const at::Tensor& x, const std::vector<int64_t>& offsets, const Weight& weight,
                            const std::optional<at::Tensor>& bias, const Adapters& adapters, bool keep_z);
std::vector<at::Tensor> lora_grouped_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                                     const std::vector<int64_t>& offsets, const Weight& weight,
                                                     const Adapters& adapters, const Kept& kept, const Needs& needs);

// A 4-bit W begins at the element `first`, as one of a stack does.
at::Tensor dora_norm(const Weight& weight, const at::Tensor& A, const at::Tensor& B, double scaling,
                     at::ScalarType dtype, int64_t first = 0);

// The memory of a large tensor is divided into so many parts, each of lines from all over it.
constexpr int64_t kFingerprintParts = 32;

// Numbers that depend on all bytes of contiguous tensors and on their places: one of the small ones together, then for
// each of the large ones `count` numbers, of its parts from `first` on.
std::vector<uint64_t> fingerprint(const std::vector<at::Tensor>& small, const std::vector<at::Tensor>& large,
                                  int64_t first, int64_t count);

// Boolean [rows, columns], true where an element is kept: the mask that the kernels draw.
at::Tensor dropout_keep(int64_t seed, int64_t rows, int64_t columns, int64_t threshold);

}  // namespace fastpeft::cpu

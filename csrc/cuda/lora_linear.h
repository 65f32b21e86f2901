// The ops on a GPU, made of torch's products and the kernels of kernels/; ../ops.h says what they compute. The seed
// stays on the GPU.
#pragma once
#include "../call.h"
#include "kernels/launchers.h"

namespace fastpeft::gpu {

struct Gpu {
    const cuda::Launchers& launchers;
    cuda::Place place;  // of the tensors, with torch's current stream
};

Forward lora_linear(const Gpu& gpu, const at::Tensor& x, const Weight& weight, const std::optional<at::Tensor>& bias,
                    const Adapters& adapters, bool keep_z);

// With `onto` [M, K], dx is added onto it.
std::vector<at::Tensor> lora_linear_backward(const Gpu& gpu, const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                             const Weight& weight, const Adapters& adapters, const Kept& kept,
                                             const Needs& needs, const at::Tensor& onto = {});

// Of layers that read the same x.
Shared lora_shared_linear(const Gpu& gpu, const at::Tensor& x, const Layers& layers);
std::vector<at::Tensor> lora_shared_linear_backward(const Gpu& gpu, const std::vector<at::Tensor>& dy,
                                                    const std::optional<at::Tensor>& x, const Layers& layers,
                                                    const std::optional<at::Tensor>& u, const Needs& needs);

at::Tensor dora_norm(const Gpu& gpu, const Weight& weight, const at::Tensor& A, const at::Tensor& B, double scaling,
                     at::ScalarType dtype);

}  // namespace fastpeft::gpu

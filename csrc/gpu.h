// The LoRA op on a GPU, put together out of torch's products and the launchers of cuda/: what backends/cuda.py calls.
// Notation and arguments as in lora_linear.h; the seed stays on the GPU.
#pragma once
#include "cuda/launchers.h"
#include "lora_linear.h"

namespace fastpeft::gpu {

struct Gpu {
    const cuda::Launchers& launchers;
    cuda::Place place;  // of the tensors, with torch's current stream
};

Forward lora_linear(const Gpu& gpu, const at::Tensor& x, const Weight& weight, const std::optional<at::Tensor>& bias,
                    const Adapters& adapters, bool keep_z);

std::vector<at::Tensor> lora_linear_backward(const Gpu& gpu, const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                             const Weight& weight, const Adapters& adapters,
                                             const std::optional<at::Tensor>& u, const std::vector<at::Tensor>& z,
                                             const std::vector<bool>& needs);

at::Tensor dora_norm(const Gpu& gpu, const Weight& weight, const at::Tensor& A, const at::Tensor& B, double scaling,
                     at::ScalarType dtype);

}  // namespace fastpeft::gpu

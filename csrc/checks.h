// Checks before a kernel is given pointers: each operand has the shape that the others call for, and memory for it.
#pragma once
#include "call.h"

namespace fastpeft {

// Raises where a tensor has less memory than its shape says.
void check_memory(const char* name, const at::Tensor& t);

// Raises where an operand has not the shape that the others call for, or less memory than its shape says: a tensor kept
// for the backward pass may have been given other data since. `tokens`: rows of x and dy.
void check_operands(const std::optional<at::Tensor>& x, const Weight& weight, const std::optional<at::Tensor>& bias,
                    const Adapters& adapters, int64_t tokens);
void check_kept(const at::Tensor& dy, const Weight& weight, const Adapters& adapters, const Kept& kept, int64_t tokens);

// The same of layers that read the same x.
void check_layers(const std::optional<at::Tensor>& x, const Layers& layers, int64_t tokens);
void check_kept(const std::vector<at::Tensor>& dy, const Layers& layers, const std::optional<at::Tensor>& u,
                int64_t tokens);

// The same of stacked experts; then for T rows, and their offsets, once they ascend from 0 to T.
void check_stacks(const Weight& weight, const Adapters& adapters);
std::vector<int64_t> check_experts(const std::optional<at::Tensor>& x, const at::Tensor& offsets, const Weight& weight,
                                   const std::optional<at::Tensor>& bias, const Adapters& adapters, int64_t tokens);

// Whether a tensor's memory does not hold its values: it is lazily negated, or zeros without memory.
bool is_lazy(const at::Tensor& t);
bool is_lazy(const std::optional<at::Tensor>& t);
bool is_lazy(const std::vector<at::Tensor>& some);
bool is_lazy(const Weight& weight);
bool is_lazy(const Adapters& adapters);
bool is_lazy(const Layers& layers);

// The same values in memory.
at::Tensor in_memory(const at::Tensor& t);
std::optional<at::Tensor> in_memory(const std::optional<at::Tensor>& t);
std::vector<at::Tensor> in_memory(const std::vector<at::Tensor>& some);
Weight in_memory(const Weight& weight);
Adapters in_memory(const Adapters& adapters);
Layers in_memory(const Layers& layers);

}  // namespace fastpeft

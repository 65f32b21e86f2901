// The call that nearly every layer makes: one adapter, dense tensors of the usual dtypes that fit each other, nobody
// who has to see the op. It is told apart, and computed, in one step from Python: the checks of fastpeft/checks.py and
// the way through fastpeft/ops.py take as long as a small layer.
#pragma once
#include <torch/extension.h>

#include <optional>

#include "call.h"
#include "ops.h"

namespace fastpeft {

// Python's arguments, whatever they are: a weight's tensors and (N, K) apart, and the tuple of call.py's Adapters.
struct Arguments {
    pybind11::handle x, weight;
    std::vector<at::Tensor> quant;
    int64_t blocksize;
    std::optional<std::pair<int64_t, int64_t>> shape;  // of a 4-bit weight, which its data does not tell
    pybind11::handle bias;
    pybind11::tuple adapters;
    pybind11::handle training;
    pybind11::function draw_seeds;  // fastpeft/dropout.py::dropout_seeds
};

// Whether the arguments are right beyond doubt; if not, the checks know what is wrong, or what else is right.
bool is_usual(const Arguments& arguments);

// y of a usual call, with its autograd node; none where the call is not usual, or a tracer, a mode or a profiler has to
// see the op, or autocast casts.
std::optional<at::Tensor> usual_lora_linear(const Arguments& arguments, const Where& where);

// The y of usual calls on the same x, LoRA's and with frozen weights, computed together, with one autograd node; none
// where one of them is not usual, as above, where there is nothing to share, or where saved tensors go through hooks.
std::vector<at::Tensor> usual_lora_shared_linear(const std::vector<Arguments>& all, const Where& where);

}  // namespace fastpeft

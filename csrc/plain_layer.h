// A PEFT layer of the plainest kind, read in one step: what fastpeft/peft/operands.py, base_layers.py and readers.py
// look at one by one in Python takes as long as the product of one token, most of it waiting for memory.
#pragma once
#include <torch/extension.h>

#include <vector>

namespace fastpeft {

// A class's function as the class's own module defines it: fastpeft/peft/stock.py.
struct Function {
    pybind11::object owner, name, function;
};

// Python's classes and objects by which a plain layer is told.
struct PlainLayers {
    pybind11::object linear, module_dict, parameter_dict, identity, dropout, dora_variant, dora_magnitude;
    std::vector<pybind11::object> global_hooks;  // the dicts of torch.nn.modules.module
    std::vector<Function> stock, dora_stock;     // that PEFT's path would call, of DoRA beside the others
};

// Of a layer's __dict__ (weight, bias, A, B, scaling, dropout_p, magnitude, the adapter's name) where it is torch's
// Linear with one active LoRA or DoRA adapter that is torch's, too, with torch's dropout or none, all in tensors of no
// subclass: nothing merged, disabled, hooked or traced. The magnitude is None for LoRA. None where any of that is
// otherwise or in doubt.
pybind11::object read_plain_lora(const PlainLayers& plain, pybind11::dict state);

// The same of AdaLoRA's layer: (weight, bias, A, B, E, ranknum, scaling, dropout_p).
pybind11::object read_plain_adalora(const PlainLayers& plain, pybind11::dict state);

}  // namespace fastpeft

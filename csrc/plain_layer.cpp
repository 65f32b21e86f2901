#include "plain_layer.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <optional>

namespace fastpeft {

using pybind11::handle;

namespace {

// A name that dicts find by its address.
handle interned(const char* name) { return PyUnicode_InternFromString(name); }

// The value under a key; null where `dict` is no dict or has none.
handle item(handle dict, handle key) {
    return dict && PyDict_Check(dict.ptr()) ? PyDict_GetItemWithError(dict.ptr(), key.ptr()) : nullptr;
}

bool is_empty_dict(handle dict) { return dict && PyDict_Check(dict.ptr()) && PyDict_GET_SIZE(dict.ptr()) == 0; }

bool is_exactly(handle object, handle type) {
    return object && reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr();
}

// The __dict__ of an object of exactly this class, which keeps it; null otherwise.
handle state_of(handle object, handle type) {
    if (!is_exactly(object, type)) return {};
    PyObject* state = PyObject_GenericGetDict(object.ptr(), nullptr);
    if (!state) throw pybind11::error_already_set();
    Py_DECREF(state);
    return state;
}

struct Names {
    const handle modules = interned("_modules"), parameters = interned("_parameters"), forward = interned("forward"),
                 base_layer = interned("base_layer"), lora_A = interned("lora_A"), lora_B = interned("lora_B"),
                 lora_E = interned("lora_E"), ranknum = interned("ranknum"), lora_dropout = interned("lora_dropout"),
                 weight = interned("weight"), bias = interned("bias"), p = interned("p"),
                 training = interned("training"), scaling = interned("scaling"),
                 lora_variant = interned("lora_variant"), active = interned("_active_adapter"),
                 disabled = interned("_disable_adapters"), merged = interned("merged_adapters"),
                 casts = interned("cast_input_dtype_enabled"), magnitudes = interned("lora_magnitude_vector");
    const handle hooks[4] = {interned("_forward_hooks"), interned("_forward_pre_hooks"), interned("_backward_hooks"),
                             interned("_backward_pre_hooks")};
};

const Names& names() {
    static const Names all;
    return all;
}

// Whether calling a module does no more than its class's forward.
bool is_bare(handle state) {
    if (!state) return false;
    for (const handle hooks : names().hooks)
        if (!is_empty_dict(item(state, hooks))) return false;
    return !item(state, names().forward);
}

// The name of the one active adapter; null where there are others, or none.
handle only_active(handle state) {
    const handle active = item(state, names().active);
    if (!active) return {};
    if (PyList_CheckExact(active.ptr()) && PyList_GET_SIZE(active.ptr()) == 1) return PyList_GET_ITEM(active.ptr(), 0);
    return PyUnicode_CheckExact(active.ptr()) ? active : handle();
}

bool are_stock(const std::vector<Function>& functions) {
    return std::all_of(functions.begin(), functions.end(), [](const Function& known) {
        const auto now =
            pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(known.owner.ptr(), known.name.ptr()));
        if (!now) throw pybind11::error_already_set();
        return now.ptr() == known.function.ptr();
    });
}

// A tensor of no subclass and of a dtype that layers are computed in; null for anything else.
const at::Tensor* tensor(handle value) {
    if (!THPVariable_CheckTypeExact(Py_TYPE(value.ptr()))) return nullptr;
    const at::Tensor& t = THPVariable_Unpack(value.ptr());
    const auto dtype = t.scalar_type();
    const bool computes = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
    return computes ? &t : nullptr;
}

bool have_one_dtype(handle a, handle b) {
    const at::Tensor *first = tensor(a), *last = tensor(b);
    return first && last && first->scalar_type() == last->scalar_type();
}

// What layers of every method have.
struct Layer {
    handle modules, name, weight, bias, scaling;
    double dropout_p = 0.0;
};

// The adapter's own module in one of the layer's dicts of modules.
handle part_of(const PlainLayers& plain, const Layer& layer, handle kind) {
    return item(item(state_of(item(layer.modules, kind), plain.module_dict), names().modules), layer.name);
}

std::optional<Layer> read_layer(const PlainLayers& plain, pybind11::dict state) {
    const Names& n = names();
    if (torch::jit::tracer::isTracing()) return {};
    for (const handle hooks : plain.global_hooks)
        if (!is_empty_dict(hooks)) return {};
    if (!are_stock(plain.stock)) return {};
    const handle merged = item(state, n.merged), disabled = item(state, n.disabled), casts = item(state, n.casts);
    Layer layer{.modules = item(state, n.modules), .name = only_active(state)};
    const bool bare = merged && PyList_CheckExact(merged.ptr()) && PyList_GET_SIZE(merged.ptr()) == 0 && disabled &&
                      disabled.ptr() == Py_False && layer.name;
    if (!bare || !casts || casts.ptr() != Py_True) return {};

    const handle base = state_of(item(layer.modules, n.base_layer), plain.linear);
    if (!is_bare(base)) return {};
    const handle dropout = part_of(plain, layer, n.lora_dropout);
    if (const handle drops = state_of(dropout, plain.dropout); drops) {
        const handle p = item(drops, n.p), training = item(drops, n.training);
        if (!is_bare(drops) || !p || !PyFloat_CheckExact(p.ptr()) || !training || !PyBool_Check(training.ptr()))
            return {};
        if (training.ptr() == Py_True) layer.dropout_p = PyFloat_AS_DOUBLE(p.ptr());
        if (layer.dropout_p >= 1.0) return {};
    } else if (!is_bare(state_of(dropout, plain.identity))) {
        return {};
    }

    const handle parts = item(base, n.parameters);
    layer.weight = item(parts, n.weight);
    layer.bias = item(parts, n.bias);
    layer.scaling = item(item(state, n.scaling), layer.name);
    if (!layer.weight || !layer.bias || !layer.scaling || !tensor(layer.weight)) return {};
    if (!layer.bias.is_none() && !have_one_dtype(layer.bias, layer.weight)) return {};
    return layer;
}

}  // namespace

pybind11::object read_plain_lora(const PlainLayers& plain, pybind11::dict state) {
    const Names& n = names();
    const pybind11::none no;
    const std::optional<Layer> layer = read_layer(plain, state);
    if (!layer || !PyFloat_CheckExact(layer->scaling.ptr())) return no;
    const handle variants = item(state, n.lora_variant);
    if (!variants || !PyDict_Check(variants.ptr())) return no;
    const handle variant = item(variants, layer->name);
    if (variant && (!is_exactly(variant, plain.dora_variant) || !are_stock(plain.dora_stock))) return no;

    const handle A = state_of(part_of(plain, *layer, n.lora_A), plain.linear),
                 B = state_of(part_of(plain, *layer, n.lora_B), plain.linear);
    if (!is_bare(A) || !is_bare(B)) return no;
    const handle A_parts = item(A, n.parameters), B_parts = item(B, n.parameters);
    const handle A_weight = item(A_parts, n.weight), B_weight = item(B_parts, n.weight);
    const handle A_bias = item(A_parts, n.bias), B_bias = item(B_parts, n.bias);
    if (!A_weight || !B_weight || !A_bias || !B_bias || !A_bias.is_none() || !B_bias.is_none()) return no;
    if (!have_one_dtype(A_weight, B_weight)) return no;
    handle magnitude = Py_None;
    double dropout_p = layer->dropout_p;
    if (variant) {
        const handle holder = state_of(part_of(plain, *layer, n.magnitudes), plain.dora_magnitude),
                     trains = item(state, n.training);
        if (!is_bare(holder) || !trains || !PyBool_Check(trains.ptr())) return no;
        magnitude = item(item(holder, n.parameters), n.weight);
        if (!magnitude || !tensor(magnitude) || tensor(magnitude)->device() != tensor(layer->weight)->device())
            return no;
        if (trains.ptr() != Py_True) dropout_p = 0.0;  // whether DoRA drops anything, PEFT asks the layer, too
    }
    return pybind11::make_tuple(layer->weight, layer->bias, A_weight, B_weight, layer->scaling, dropout_p, magnitude,
                                layer->name);
}

pybind11::object read_plain_adalora(const PlainLayers& plain, pybind11::dict state) {
    const Names& n = names();
    const pybind11::none no;
    const std::optional<Layer> layer = read_layer(plain, state);
    if (!layer || !(PyFloat_CheckExact(layer->scaling.ptr()) || PyLong_CheckExact(layer->scaling.ptr()))) return no;
    handle found[4];
    const handle kinds[4] = {n.lora_A, n.lora_B, n.lora_E, n.ranknum};
    for (size_t i = 0; i < 4; ++i) {
        const handle holder = state_of(item(layer->modules, kinds[i]), plain.parameter_dict);
        found[i] = item(item(holder, n.parameters), layer->name);
        if (!found[i] || !tensor(found[i])) return no;
    }
    const auto [A, B, E, ranknum] = found;
    if (!have_one_dtype(A, B) || !have_one_dtype(A, E) || tensor(A)->size(0) == 0) return no;
    return pybind11::make_tuple(layer->weight, layer->bias, A, B, E, ranknum, layer->scaling, layer->dropout_p);
}

}  // namespace fastpeft

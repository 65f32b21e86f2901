#include "plain_layer.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>

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
                 lora_dropout = interned("lora_dropout"), weight = interned("weight"), bias = interned("bias"),
                 p = interned("p"), training = interned("training"), scaling = interned("scaling"),
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

}  // namespace

pybind11::object read_plain_lora(const PlainLayers& plain, pybind11::dict state) {
    const Names& n = names();
    const pybind11::none no;
    if (torch::jit::tracer::isTracing()) return no;
    for (const handle hooks : plain.global_hooks)
        if (!is_empty_dict(hooks)) return no;
    if (!are_stock(plain.stock)) return no;
    const handle merged = item(state, n.merged), disabled = item(state, n.disabled), name = only_active(state);
    const bool bare = merged && PyList_CheckExact(merged.ptr()) && PyList_GET_SIZE(merged.ptr()) == 0 && disabled &&
                      disabled.ptr() == Py_False && name;
    const handle casts = item(state, n.casts);
    if (!bare || !casts || casts.ptr() != Py_True) return no;
    const handle variants = item(state, n.lora_variant);
    if (!variants || !PyDict_Check(variants.ptr())) return no;
    const handle variant = item(variants, name);
    if (variant && (!is_exactly(variant, plain.dora_variant) || !are_stock(plain.dora_stock))) return no;

    const handle modules = item(state, n.modules);
    const handle base = state_of(item(modules, n.base_layer), plain.linear);
    // The adapter's own module in one of the layer's dicts of modules.
    const auto part = [&](handle kind) {
        return item(item(state_of(item(modules, kind), plain.module_dict), n.modules), name);
    };
    const handle A = state_of(part(n.lora_A), plain.linear), B = state_of(part(n.lora_B), plain.linear);
    if (!is_bare(base) || !is_bare(A) || !is_bare(B)) return no;
    const handle dropout = part(n.lora_dropout);
    double dropout_p = 0.0;
    if (const handle drops = state_of(dropout, plain.dropout); drops) {
        const handle p = item(drops, n.p), training = item(drops, n.training);
        if (!is_bare(drops) || !p || !PyFloat_CheckExact(p.ptr()) || !training || !PyBool_Check(training.ptr()))
            return no;
        if (training.ptr() == Py_True) dropout_p = PyFloat_AS_DOUBLE(p.ptr());
        if (dropout_p >= 1.0) return no;
    } else if (!is_bare(state_of(dropout, plain.identity))) {
        return no;
    }

    const handle base_parts = item(base, n.parameters), A_parts = item(A, n.parameters),
                 B_parts = item(B, n.parameters);
    const handle weight = item(base_parts, n.weight), bias = item(base_parts, n.bias),
                 scaling = item(item(state, n.scaling), name);
    const handle A_weight = item(A_parts, n.weight), B_weight = item(B_parts, n.weight);
    const handle A_bias = item(A_parts, n.bias), B_bias = item(B_parts, n.bias);
    if (!weight || !bias || !scaling || !A_weight || !B_weight || !A_bias || !B_bias) return no;
    if (!A_bias.is_none() || !B_bias.is_none() || !PyFloat_CheckExact(scaling.ptr())) return no;
    if (!have_one_dtype(A_weight, B_weight) || !tensor(weight)) return no;
    if (!bias.is_none() && !have_one_dtype(bias, weight)) return no;
    handle magnitude = Py_None;
    if (variant) {
        const handle holder = state_of(part(n.magnitudes), plain.dora_magnitude), trains = item(state, n.training);
        if (!is_bare(holder) || !trains || !PyBool_Check(trains.ptr())) return no;
        magnitude = item(item(holder, n.parameters), n.weight);
        if (!magnitude || !tensor(magnitude) || tensor(magnitude)->device() != tensor(weight)->device()) return no;
        if (trains.ptr() != Py_True) dropout_p = 0.0;  // whether DoRA drops anything, PEFT asks the layer, too
    }
    return pybind11::make_tuple(weight, bias, A_weight, B_weight, scaling, dropout_p, magnitude, name);
}

}  // namespace fastpeft

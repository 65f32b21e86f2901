#include "usual.h"

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/profiler/api.h>

#include <cmath>

#include "ops.h"
#include "tensors.h"

namespace fastpeft {

using at::Tensor;
using pybind11::handle;

namespace {

// A tensor of no subclass; null for anything else.
const Tensor* plain(handle value) {
    return THPVariable_CheckTypeExact(Py_TYPE(value.ptr())) ? &THPVariable_Unpack(value.ptr()) : nullptr;
}

// What a list or tuple of one element holds; null for anything else.
handle only(handle some) {
    if (PyList_CheckExact(some.ptr()) && PyList_GET_SIZE(some.ptr()) == 1) return PyList_GET_ITEM(some.ptr(), 0);
    if (PyTuple_CheckExact(some.ptr()) && PyTuple_GET_SIZE(some.ptr()) == 1) return PyTuple_GET_ITEM(some.ptr(), 0);
    return {};
}

bool is_empty(handle some) { return PyList_CheckExact(some.ptr()) && PyList_GET_SIZE(some.ptr()) == 0; }

bool has_usual_dtype(const Tensor& t) {
    return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}

// Dense, with memory of its own, on the device.
bool is_dense(const Tensor& t, c10::Device device) {
    return t.layout() == at::kStrided && !t.is_nested() && t.device() == device;
}

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
    return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

struct Usual {
    Tensor x;
    Weight weight;
    std::optional<Tensor> bias;
    Tensor A, B;
    std::vector<Tensor> c;
    double scaling, dropout_p;
    bool training;
};

std::optional<Usual> read(const Arguments& call) {
    const Tensor *x = plain(call.x), *weight = plain(call.weight);
    if (!x || !weight || call.adapters.size() != 7 || !PyBool_Check(call.training.ptr())) return {};
    handle given[7];
    for (size_t i = 0; i < 7; ++i) given[i] = PyTuple_GET_ITEM(call.adapters.ptr(), i);
    const handle a = only(given[0]), b = only(given[1]), c = only(given[2]), s = only(given[3]), p = only(given[4]);
    if (!a || !b || !(c || is_empty(given[2])) || !s || !p || !given[5].is_none() || !given[6].is_none()) return {};
    const Tensor *A = plain(a), *B = plain(b);
    if (!A || !B || !PyFloat_CheckExact(s.ptr()) || !PyFloat_CheckExact(p.ptr())) return {};
    Usual usual{.x = *x,
                .A = *A,
                .B = *B,
                .scaling = PyFloat_AS_DOUBLE(s.ptr()),
                .dropout_p = PyFloat_AS_DOUBLE(p.ptr()),
                .training = call.training.ptr() == Py_True};
    if (!std::isfinite(usual.scaling) || !(usual.dropout_p >= 0.0 && usual.dropout_p < 1.0)) return {};

    const c10::Device device = x->device();
    if (device.is_meta() || !has_usual_dtype(*x) || !is_dense(*x, device) || x->dim() == 0) return {};
    if (!call.shape && weight->dim() != 2) return {};
    const auto [N, K] = call.shape ? *call.shape : std::pair(weight->size(0), weight->size(1));
    usual.weight = {*weight, call.quant, call.blocksize, N, K};
    if (!is_dense(*weight, device) || (!call.shape && weight->scalar_type() != x->scalar_type())) return {};
    if (N == 0 || K == 0 || x->size(-1) != K) return {};
    for (const Tensor* factor : {A, B})
        if (!has_usual_dtype(*factor) || !is_dense(*factor, device) || factor->dim() != 2) return {};
    const int64_t rank = A->size(0);
    if (rank == 0 || !is_matrix(*A, rank, K) || !is_matrix(*B, N, rank)) return {};
    if (!call.bias.is_none()) {
        const Tensor* bias = plain(call.bias);
        if (!bias || !is_dense(*bias, device) || bias->scalar_type() != x->scalar_type() || bias->dim() != 1 ||
            bias->size(0) != N)
            return {};
        usual.bias = *bias;
    }
    if (c) {
        const Tensor* factor = plain(c);
        if (!factor || !is_dense(*factor, device) || factor->scalar_type() != at::kFloat || factor->dim() != 1 ||
            factor->size(0) != N)
            return {};
        usual.c.push_back(factor->contiguous());
    }
    return usual;
}

// Whether anything has to see the op itself, or to cast its input first.
bool is_watched(c10::DeviceType device) {
    return c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing() ||
           torch::profiler::impl::profilerEnabled() || at::autocast::is_autocast_enabled(device);
}

// The adapter, with a fresh seed where it drops anything.
Adapters adapter_of(const Usual& call, const Arguments& arguments) {
    Adapters adapter{{call.A}, {call.B}, call.c, {call.scaling}, {0}, {}, {}};
    if (call.training && call.dropout_p > 0) {
        adapter.thresholds[0] = dropout_threshold(call.dropout_p);
        adapter.scaling[0] *= dropout_scale(adapter.thresholds[0]);
        adapter.seed = arguments.draw_seeds(1, call.x.device()).cast<Tensor>();
    }
    return adapter;
}

bool trains(const std::optional<Tensor>& t) { return t && t->requires_grad(); }

}  // namespace

bool is_usual(const Arguments& arguments) { return read(arguments).has_value(); }

std::optional<Tensor> usual_lora_linear(const Arguments& arguments, const Where& where) {
    const Tensor* x = plain(arguments.x);
    if (!x || is_watched(x->device().type())) return {};
    const std::optional<Usual> call = read(arguments);
    if (!call) return {};
    const Adapters adapters = adapter_of(*call, arguments);
    const pybind11::gil_scoped_release release;
    const bool keep_z = at::GradMode::is_enabled() && adapters.dora() && adapters.c[0].requires_grad();
    return lora_linear_with_gradient(where, call->x, call->weight, call->bias, adapters, keep_z);
}

std::vector<Tensor> usual_lora_shared_linear(const std::vector<Arguments>& all, const Where& where) {
    const Tensor* x = plain(all[0].x);
    if (!x || is_watched(x->device().type())) return {};
    // A checkpoint computes again what each layer keeps: it has to be the same whoever else reads x.
    if (at::GradMode::is_enabled() && at::SavedTensorDefaultHooks::get_hooks()) return {};
    Layers layers;
    std::vector<Usual> calls;
    for (const Arguments& arguments : all) {
        const std::optional<Usual> call = read(arguments);
        if (!call || !call->c.empty() || trains(call->weight.data) || trains(call->bias)) return {};
        layers.push_back({call->weight, call->bias, {{call->A}, {call->B}, {}, {1.0}, {0}, {}, {}}});
        calls.push_back(*call);
    }
    if (!shares(where, *x, layers)) return {};
    for (size_t i = 0; i < all.size(); ++i) layers[i].adapter = adapter_of(calls[i], all[i]);
    const pybind11::gil_scoped_release release;
    return lora_shared_linear_with_gradient(where, *x, layers);
}

}  // namespace fastpeft

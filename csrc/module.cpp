// The pybind11 module fastpeft._C: thin. Python's nouns (fastpeft/call.py) come as the tuples that they are.
#include <torch/extension.h>

#include <array>

#include "cpu/base_product.h"
#include "cpu/lora_linear.h"
#include "ops.h"
#include "plain_layer.h"
#include "tensors.h"
#include "usual.h"

namespace {

using at::Tensor;
using fastpeft::cpu::Plan;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;
using Flags = std::vector<bool>;
using MaybeTensor = std::optional<Tensor>;

using PyWhere = std::tuple<int64_t, int64_t, int64_t>;
using PyWeight = std::tuple<Tensor, Tensors, int64_t>;
using PyAdapters = std::tuple<Tensors, Tensors, Tensors, Numbers, Numbers, MaybeTensor, MaybeTensor>;
using PyKept = std::tuple<MaybeTensor, Tensors>;
using Functions = std::vector<std::array<pybind11::object, 3>>;
using PyNeeds = std::tuple<bool, bool, bool, Flags, Flags, Flags>;

fastpeft::Where where_of(const PyWhere& where) { return std::make_from_tuple<fastpeft::Where>(where); }

// The adapters know the shape that a 4-bit weight does not.
fastpeft::Weight weight_of(const PyWeight& weight, const Tensor& A, const Tensor& B) {
    const auto& [data, quant, blocksize] = weight;
    return {data, quant, blocksize, B.size(-2), A.size(-1)};
}

fastpeft::Adapters adapters_of(const PyAdapters& adapters) {
    const auto& [A, B, c, scaling, dropout_p, seed, index] = adapters;
    fastpeft::Adapters call{A, B, {}, scaling, std::vector<int64_t>(A.size()), seed, index};
    for (const Tensor& each : c) call.c.push_back(each.contiguous());
    for (size_t i = 0; seed && i < A.size(); ++i) {
        call.thresholds[i] = fastpeft::dropout_threshold(dropout_p[i]);
        if (call.thresholds[i]) call.scaling[i] *= fastpeft::dropout_scale(call.thresholds[i]);
    }
    return call;
}

// `rest` is what the function takes beside the call's arguments.
template <auto Function, typename... Rest>
auto of_arguments(pybind11::handle x, pybind11::handle weight, const Tensors& quant, int64_t blocksize,
                  const std::optional<std::pair<int64_t, int64_t>>& shape, pybind11::handle bias,
                  pybind11::tuple adapters, pybind11::handle training, pybind11::function draw_seeds,
                  const Rest&... rest) {
    return Function({x, weight, quant, blocksize, shape, bias, std::move(adapters), training, std::move(draw_seeds)},
                    rest...);
}

MaybeTensor usual_lora_linear(const fastpeft::Arguments& arguments, const PyWhere& where) {
    return fastpeft::usual_lora_linear(arguments, where_of(where));
}

using PyArguments =
    std::tuple<pybind11::handle, pybind11::handle, Tensors, int64_t, std::optional<std::pair<int64_t, int64_t>>,
               pybind11::handle, pybind11::tuple, pybind11::handle, pybind11::function>;

Tensors usual_lora_shared_linear(const std::vector<PyArguments>& all, const PyWhere& where) {
    std::vector<fastpeft::Arguments> calls;
    for (const PyArguments& arguments : all) calls.push_back(std::make_from_tuple<fastpeft::Arguments>(arguments));
    return fastpeft::usual_lora_shared_linear(calls, where_of(where));
}

fastpeft::PlainLayers plain_layers(pybind11::object linear, pybind11::object module_dict,
                                   pybind11::object parameter_dict, pybind11::object identity, pybind11::object dropout,
                                   pybind11::object dora_variant, pybind11::object dora_magnitude,
                                   std::vector<pybind11::object> global_hooks, const Functions& stock,
                                   const Functions& dora_stock) {
    const auto known = [](const Functions& functions) {
        std::vector<fastpeft::Function> all;
        for (const auto& [owner, name, function] : functions) all.push_back({owner, name, function});
        return all;
    };
    return {std::move(linear),  std::move(module_dict),  std::move(parameter_dict), std::move(identity),
            std::move(dropout), std::move(dora_variant), std::move(dora_magnitude), std::move(global_hooks),
            known(stock),       known(dora_stock)};
}

fastpeft::Forward lora_linear(const PyWhere& where, const Tensor& x, const PyWeight& weight, const MaybeTensor& bias,
                              const PyAdapters& adapters, bool keep_z) {
    const fastpeft::Adapters call = adapters_of(adapters);
    return fastpeft::lora_linear(where_of(where), x, weight_of(weight, call.A[0], call.B[0]), bias, call, keep_z);
}

Tensor lora_linear_with_gradient(const PyWhere& where, const Tensor& x, const PyWeight& weight, const MaybeTensor& bias,
                                 const PyAdapters& adapters, bool keep_z) {
    const fastpeft::Adapters call = adapters_of(adapters);
    return fastpeft::lora_linear_with_gradient(where_of(where), x, weight_of(weight, call.A[0], call.B[0]), bias, call,
                                               keep_z);
}

Tensors lora_linear_backward(const PyWhere& where, const Tensor& dy, const MaybeTensor& x, const PyWeight& weight,
                             const PyAdapters& adapters, const PyKept& kept, const PyNeeds& needs) {
    const fastpeft::Adapters call = adapters_of(adapters);
    return fastpeft::lora_linear_backward(where_of(where), dy, x, weight_of(weight, call.A[0], call.B[0]), call,
                                          std::make_from_tuple<fastpeft::Kept>(kept),
                                          std::make_from_tuple<fastpeft::Needs>(needs));
}

fastpeft::Forward lora_grouped_linear(const Tensor& x, const Tensor& offsets, const PyWeight& weight,
                                      const MaybeTensor& bias, const PyAdapters& adapters, bool keep_z) {
    const fastpeft::Adapters call = adapters_of(adapters);
    return fastpeft::lora_grouped_linear(x, offsets, weight_of(weight, call.A[0], call.B[0]), bias, call, keep_z);
}

Tensors lora_grouped_linear_backward(const Tensor& dy, const MaybeTensor& x, const Tensor& offsets,
                                     const PyWeight& weight, const PyAdapters& adapters, const PyKept& kept,
                                     const PyNeeds& needs) {
    const fastpeft::Adapters call = adapters_of(adapters);
    return fastpeft::lora_grouped_linear_backward(dy, x, offsets, weight_of(weight, call.A[0], call.B[0]), call,
                                                  std::make_from_tuple<fastpeft::Kept>(kept),
                                                  std::make_from_tuple<fastpeft::Needs>(needs));
}

Tensor dora_norm(const PyWhere& where, const PyWeight& weight, const Tensor& A, const Tensor& B, double scaling,
                 at::ScalarType dtype) {
    return fastpeft::dora_norm(where_of(where), weight_of(weight, A, B), A, B, scaling, dtype);
}

Tensor dora_grouped_norm(const PyWeight& weight, const Tensor& A, const Tensor& B, double scaling,
                         at::ScalarType dtype) {
    return fastpeft::dora_grouped_norm(weight_of(weight, A, B), A, B, scaling, dtype);
}

Plan plan_of(const Tensor& x, const PyWeight& weight, const PyAdapters& adapters, bool backward) {
    const fastpeft::Adapters call = adapters_of(adapters);
    const auto choose = backward ? fastpeft::cpu::backward_plan : fastpeft::cpu::forward_plan;
    return choose(x, weight_of(weight, call.A[0], call.B[0]), call);
}

// As bytes, eight a number: what Python compares at once.
pybind11::bytes fingerprint(const Tensors& small, const Tensors& large, int64_t first, int64_t count) {
    std::vector<uint64_t> prints;
    {
        const pybind11::gil_scoped_release release;
        prints = fastpeft::cpu::fingerprint(small, large, first, count);
    }
    return {reinterpret_cast<const char*>(prints.data()), prints.size() * sizeof(uint64_t)};
}

// Where tensors' memory is and what they are, as bytes: equal as long as the storages live and nothing wrote to a
// tensor that counts its versions.
pybind11::bytes identity(const Tensors& tensors) {
    std::vector<int64_t> key;
    for (const Tensor& t : tensors) {
        key.push_back(reinterpret_cast<int64_t>(t.storage().unsafeGetStorageImpl()));
        key.push_back(t.storage_offset());
        key.push_back(t.dim());
        key.insert(key.end(), t.sizes().begin(), t.sizes().end());
        key.insert(key.end(), t.strides().begin(), t.strides().end());
        key.push_back(static_cast<int64_t>(t.scalar_type()));
        key.push_back(static_cast<int64_t>(t._version()));
    }
    return {reinterpret_cast<const char*>(key.data()), key.size() * sizeof(int64_t)};
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const char* const* name = fastpeft::cpu::available_kernels(); *name; ++name) names.emplace_back(*name);
    return names;
}

void set_isa(const std::string& name) {
    TORCH_CHECK_VALUE(fastpeft::cpu::set_kernels(name.c_str()), "name must be \"auto\" or one of isas(), got \"", name,
                      "\"");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using pybind11::arg;
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("lora_linear", &lora_linear, release());
    m.def("lora_linear_with_gradient", &lora_linear_with_gradient, release());
    m.def("is_usual", &of_arguments<fastpeft::is_usual>);
    m.def("usual_lora_linear", &of_arguments<usual_lora_linear, PyWhere>);
    m.def("usual_lora_shared_linear", &usual_lora_shared_linear);
    pybind11::class_<fastpeft::PlainLayers>(m, "PlainLayers")
        .def(pybind11::init(&plain_layers), arg("linear"), arg("module_dict"), arg("parameter_dict"), arg("identity"),
             arg("dropout"), arg("dora_variant"), arg("dora_magnitude"), arg("global_hooks"), arg("stock"),
             arg("dora_stock"))
        .def("read_lora", &fastpeft::read_plain_lora, arg("state"))
        .def("read_adalora", &fastpeft::read_plain_adalora, arg("state"));
    m.def("lora_linear_backward", &lora_linear_backward, release());
    m.def("lora_grouped_linear", &lora_grouped_linear, release());
    m.def("lora_grouped_linear_backward", &lora_grouped_linear_backward, release());
    m.def("dora_norm", &dora_norm, release());
    m.def("dora_grouped_norm", &dora_grouped_norm, release());
    m.def("fingerprint", &fingerprint, arg("small"), arg("large"), arg("first"), arg("count"));
    m.def("identity", &identity, arg("tensors"));
    m.def("dropout_keep", &fastpeft::cpu::dropout_keep, release(), arg("seed"), arg("rows"), arg("columns"),
          arg("threshold"), "Boolean [rows, columns], true where kept.");
    m.def("isa", [] { return fastpeft::cpu::kernels().name; }, "The instruction set whose kernels run.");
    m.def("isas", &isas, "The instruction sets that this processor has kernels for, fastest first.");
    m.def("set_isa", &set_isa, arg("name"), "Overrides the choice for tests: a name of isas(), or \"auto\".");
    pybind11::enum_<Plan>(m, "Plan", "How a product with W and the low-rank part are computed on the CPU.")
        .value("dots", Plan::dots)
        .value("base_first", Plan::base_first)
        .value("low_rank_first", Plan::low_rank_first)
        .value("one_accumulator", Plan::one_accumulator);
    m.def("plan", &plan_of, arg("x"), arg("weight"), arg("adapters"), arg("backward"), "The plan of a call.");
    m.def("force_plan", &fastpeft::cpu::force_plan, arg("plan"), "A plan for tests and benches; None: the choice.");
    m.def(
        "multiplies_pairs",
        [] { return fastpeft::cpu::multiplies_pairs(fastpeft::cpu::kernels(), fastpeft::DType::bf16, 2); },
        "Whether Plan.one_accumulator computes bfloat16 in pairs here, with the kernels of isa(), or in float32.");
}

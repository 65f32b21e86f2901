// The pybind11 module fastpeft._C: thin.
#include <torch/extension.h>

#include "autograd.h"
#include "cpu/base_product.h"
#include "cpu/kernels.h"
#include "gpu.h"
#include "lora_linear.h"

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

using fastpeft::PlainDispatch;

// The adapters know the shape that a 4-bit weight does not.
fastpeft::Weight weight_of(const Tensor& data, const Tensors& quant, int64_t blocksize, const Tensor& A,
                           const Tensor& B) {
    return {data, quant, blocksize, B.size(0), A.size(1)};
}

fastpeft::Forward lora_linear(const Tensor& x, const Tensor& weight, const Tensors& quant, int64_t blocksize,
                              const MaybeTensor& bias, const Tensors& A, const Tensors& B, const Tensors& c,
                              const std::vector<double>& scaling, const std::vector<int64_t>& thresholds,
                              const MaybeTensor& seed, const MaybeTensor& adapter_index, bool keep_z,
                              fastpeft::Plan plan) {
    const PlainDispatch plain;
    return fastpeft::lora_linear(x, weight_of(weight, quant, blocksize, A[0], B[0]), bias,
                                 {A, B, c, scaling, thresholds, seed, adapter_index}, keep_z, plan);
}

Tensors lora_linear_backward(const Tensor& dy, const MaybeTensor& x, const Tensor& weight, const Tensors& quant,
                             int64_t blocksize, const Tensors& A, const Tensors& B, const Tensors& c,
                             const MaybeTensor& u, const Tensors& z, const std::vector<double>& scaling,
                             const std::vector<int64_t>& thresholds, const MaybeTensor& seed,
                             const MaybeTensor& adapter_index, const std::vector<bool>& needs, fastpeft::Plan plan) {
    const PlainDispatch plain;
    return fastpeft::lora_linear_backward(dy, x, weight_of(weight, quant, blocksize, A[0], B[0]),
                                          {A, B, c, scaling, thresholds, seed, adapter_index}, u, z, needs, plan);
}

Tensor lora_linear_with_gradient(const Tensor& x, const Tensor& weight, const Tensors& quant, int64_t blocksize,
                                 const MaybeTensor& bias, const Tensors& A, const Tensors& B, const Tensors& c,
                                 const std::vector<double>& scaling, const std::vector<int64_t>& thresholds,
                                 const MaybeTensor& seed, const MaybeTensor& adapter_index, bool keep_z,
                                 fastpeft::Plan forward, fastpeft::Plan backward) {
    return fastpeft::with_gradient({0, 0, 0, static_cast<int64_t>(forward), static_cast<int64_t>(backward)}, x,
                                   weight_of(weight, quant, blocksize, A[0], B[0]), bias,
                                   {A, B, c, scaling, thresholds, seed, adapter_index}, keep_z);
}

Tensor dora_norm(const Tensor& weight, const Tensors& quant, int64_t blocksize, const Tensor& A, const Tensor& B,
                 double scaling, at::ScalarType dtype) {
    const PlainDispatch plain;
    return fastpeft::dora_norm(weight_of(weight, quant, blocksize, A, B), A, B, scaling, dtype);
}

// Where a call runs on a GPU: what fastpeft._cuda.launchers() gives, the GPU's index and torch's current stream there.
using GpuPlace = std::tuple<uintptr_t, int, uintptr_t>;

fastpeft::gpu::Gpu gpu_of(const GpuPlace& place) {
    const auto& [table, device, stream] = place;
    const auto& launchers = *reinterpret_cast<const fastpeft::cuda::Launchers*>(table);
    TORCH_CHECK(launchers.layout == fastpeft::cuda::kLayout,
                "fastpeft._cuda and fastpeft._C were built from different sources: run `python -m fastpeft build`");
    return {launchers, {device, reinterpret_cast<void*>(stream)}};
}

fastpeft::Forward gpu_lora_linear(const GpuPlace& place, const Tensor& x, const Tensor& weight, const Tensors& quant,
                                  int64_t blocksize, const MaybeTensor& bias, const Tensors& A, const Tensors& B,
                                  const Tensors& c, const std::vector<double>& scaling,
                                  const std::vector<int64_t>& thresholds, const MaybeTensor& seed,
                                  const MaybeTensor& adapter_index, bool keep_z) {
    const PlainDispatch plain;
    return fastpeft::gpu::lora_linear(gpu_of(place), x, weight_of(weight, quant, blocksize, A[0], B[0]), bias,
                                      {A, B, c, scaling, thresholds, seed, adapter_index}, keep_z);
}

Tensors gpu_lora_linear_backward(const GpuPlace& place, const Tensor& dy, const MaybeTensor& x, const Tensor& weight,
                                 const Tensors& quant, int64_t blocksize, const Tensors& A, const Tensors& B,
                                 const Tensors& c, const MaybeTensor& u, const Tensors& z,
                                 const std::vector<double>& scaling, const std::vector<int64_t>& thresholds,
                                 const MaybeTensor& seed, const MaybeTensor& adapter_index,
                                 const std::vector<bool>& needs) {
    const PlainDispatch plain;
    return fastpeft::gpu::lora_linear_backward(gpu_of(place), dy, x, weight_of(weight, quant, blocksize, A[0], B[0]),
                                               {A, B, c, scaling, thresholds, seed, adapter_index}, u, z, needs);
}

Tensor gpu_lora_linear_with_gradient(const GpuPlace& place, const Tensor& x, const Tensor& weight, const Tensors& quant,
                                     int64_t blocksize, const MaybeTensor& bias, const Tensors& A, const Tensors& B,
                                     const Tensors& c, const std::vector<double>& scaling,
                                     const std::vector<int64_t>& thresholds, const MaybeTensor& seed,
                                     const MaybeTensor& adapter_index, bool keep_z) {
    gpu_of(place);  // checks the table
    const auto [table, device, stream] = place;
    return fastpeft::with_gradient({static_cast<int64_t>(table), device, static_cast<int64_t>(stream), 0, 0}, x,
                                   weight_of(weight, quant, blocksize, A[0], B[0]), bias,
                                   {A, B, c, scaling, thresholds, seed, adapter_index}, keep_z);
}

Tensor gpu_dora_norm(const GpuPlace& place, const Tensor& weight, const Tensors& quant, int64_t blocksize,
                     const Tensor& A, const Tensor& B, double scaling, at::ScalarType dtype) {
    const PlainDispatch plain;
    return fastpeft::gpu::dora_norm(gpu_of(place), weight_of(weight, quant, blocksize, A, B), A, B, scaling, dtype);
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
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    pybind11::enum_<fastpeft::Plan>(m, "Plan", "How the base product and the low-rank part are computed.")
        .value("dots", fastpeft::Plan::dots)
        .value("vendor_first", fastpeft::Plan::vendor_first)
        .value("vendor_last", fastpeft::Plan::vendor_last)
        .value("vendor_float32", fastpeft::Plan::vendor_float32)
        .value("one_accumulator", fastpeft::Plan::one_accumulator);
    m.def("lora_linear", &lora_linear, release());
    m.def("lora_linear_backward", &lora_linear_backward, release());
    m.def("lora_linear_with_gradient", &lora_linear_with_gradient, release());
    m.def("dora_norm", &dora_norm, release());
    m.def("gpu_lora_linear", &gpu_lora_linear, release());
    m.def("gpu_lora_linear_backward", &gpu_lora_linear_backward, release());
    m.def("gpu_lora_linear_with_gradient", &gpu_lora_linear_with_gradient, release());
    m.def("gpu_dora_norm", &gpu_dora_norm, release());
    m.def("fingerprint", &fastpeft::fingerprint, release(), pybind11::arg("tensor"), pybind11::arg("every"));
    m.def("dropout_keep", &fastpeft::dropout_keep, release(), pybind11::arg("seed"), pybind11::arg("rows"),
          pybind11::arg("columns"), pybind11::arg("threshold"), "Boolean [rows, columns], true where kept.");
    m.def(
        "has_base_product", [] { return fastpeft::cpu::has_base_product(fastpeft::cpu::kernels()); },
        "Whether Plan.one_accumulator runs here, with the instruction set of isa().");
    m.def("isa", [] { return fastpeft::cpu::kernels().name; }, "The instruction set whose kernels run.");
    m.def("isas", &isas, "The instruction sets that this processor has kernels for, fastest first.");
    m.def("set_isa", &set_isa, pybind11::arg("name"), "Overrides the choice for tests: a name of isas(), or \"auto\".");
}

// The pybind11 module fastpeft._cuda, thin: pointers and strides as integers, so that it needs no torch and serves any.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "launchers.h"
#ifndef FASTPEFT_EMULATE
#include <cuda_runtime_api.h>
#else
#include "emulation.h"
#endif

const char* fastpeft::cuda::error_string(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

namespace {

namespace py = pybind11;
using namespace fastpeft::cuda;
using fastpeft::DType;
using fastpeft::FourBit;
using fastpeft::Matrix;
using Address = uintptr_t;  // 0: there is no such tensor

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Place place(int device, Address stream) { return {device, at<void>(stream)}; }

void check(const char* kernel, int device, Error error) {
    if (error)
        throw std::runtime_error(std::string(kernel) + " on GPU " + std::to_string(device) + ": " +
                                 error_string(error));
}

const Launchers launchers{kLayout,  &error_string,   &four_bit_decode, &four_bit_linear, &lora_down,   &lora_up,
                          &dropout, &lora_down_many, &lora_gradient,   &has_lora_linear, &lora_linear, &dora_norm};

Matrix matrix(Address data, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    return {at<void>(data), dtype, rows, columns, row_stride, column_stride};
}

FourBit four_bit(Address packed, Address code, Address absmax, Address q, Address code2, Address absmax2,
                 Address offset, int block_bits) {
    return {at<uint8_t>(packed), at<float>(code),    at<float>(absmax), at<uint8_t>(q),
            at<float>(code2),    at<float>(absmax2), at<float>(offset), block_bits};
}

Tail tail(Address q, int64_t q_stride, int64_t rank, const Matrix& right, float scale, uint32_t threshold, Address seed,
          Address c, Address z, bool z_is_float, const Matrix& bias) {
    return {at<float>(q),      q_stride,     rank,        right,      scale, threshold,
            at<int64_t>(seed), at<float>(c), at<void>(z), z_is_float, bias};
}

}  // namespace

PYBIND11_MODULE(FASTPEFT_CUDA_MODULE, m) {
    using release = py::call_guard<py::gil_scoped_release>;
    const py::module_local local;  // an emulated module may be loaded beside the real one
    py::enum_<DType>(m, "DType", local).value("f32", DType::f32).value("bf16", DType::bf16).value("f16", DType::f16);
    py::class_<Matrix>(m, "Matrix", local).def(py::init(&matrix));
    py::class_<FourBit>(m, "FourBit", local).def(py::init(&four_bit));
    py::class_<Tail>(m, "Tail", local).def(py::init(&tail));
    m.attr("FEW_TOKENS") = kFewTokens;
    m.attr("DOWN_TOKENS") = kDownTokens;
    m.attr("GROUP") = kGroup;
    m.def("has_lora_linear", &has_lora_linear, "Whether lora_linear has kernels for a GPU.");
    m.def("launchers", [] { return reinterpret_cast<Address>(&launchers); }, "Their table, for fastpeft._C.");
    m.def(
        "four_bit_decode",
        [](const FourBit& weight, int64_t elements, Address out, DType dtype, int device, Address stream) {
            check("four_bit_decode", device,
                  four_bit_decode(weight, elements, at<void>(out), dtype, place(device, stream)));
        },
        release());
    m.def(
        "four_bit_linear",
        [](Address x, const FourBit& weight, Address y, int64_t M, int64_t N, int64_t K, const Tail& tail, DType dtype,
           int device, Address stream) {
            check("four_bit_linear", device,
                  four_bit_linear(at<void>(x), weight, at<void>(y), M, N, K, tail, dtype, place(device, stream)));
        },
        release());
    m.def(
        "lora_down",
        [](Address x, int64_t x_stride, const Matrix& A, Address u, int64_t u_stride, Address index, int adapter,
           int64_t M, int64_t K, int64_t rank, DType dtype, int device, Address stream) {
            check("lora_down", device,
                  lora_down(at<void>(x), x_stride, A, at<float>(u), u_stride, at<int32_t>(index), adapter, M, K, rank,
                            dtype, place(device, stream)));
        },
        release());
    m.def(
        "lora_down_many",
        [](Address x, int64_t x_stride, const Matrix& A, uint32_t threshold, Address seed, Address u, int64_t u_stride,
           int64_t M, int64_t K, int64_t rank, DType dtype, int device, Address stream) {
            const DownOperands operands{at<void>(x), x_stride, A, nullptr, threshold, at<int64_t>(seed),
                                        nullptr,     0,        M, K,       rank};
            check("lora_down", device,
                  lora_down_many(operands, {at<float>(u), u_stride, nullptr, 0, 1.0f, 1.0f}, {}, dtype,
                                 place(device, stream)));
        },
        release());
    m.def(
        "lora_gradient",
        [](Address x, int64_t x_stride, const Matrix& q, uint32_t threshold, Address seed, const Matrix& sums,
           int64_t M, int64_t columns, int64_t rank, DType dtype, int device, Address stream) {
            const GradientOperands operands{at<void>(x), x_stride, q, 1.0f,    threshold, at<int64_t>(seed),
                                            nullptr,     nullptr,  M, columns, rank};
            const GradientOutputs outputs{const_cast<void*>(sums.data), sums.dtype, sums.row_stride,
                                          sums.column_stride,           nullptr,    nullptr};
            check("lora_gradient", device, lora_gradient(operands, outputs, dtype, place(device, stream)));
        },
        release());
    m.def(
        "lora_linear",
        [](Address x, int64_t x_stride, const Matrix& weight, Address q, int64_t q_stride, Address y, int64_t y_stride,
           int64_t M, int64_t N, int64_t K, const Tail& tail, DType dtype, int device, Address stream) {
            const LinearOperands operands{at<void>(x), x_stride, weight, at<void>(q), q_stride,
                                          at<void>(y), y_stride, M,      N,           K};
            check("lora_linear", device, lora_linear(operands, tail, dtype, place(device, stream)));
        },
        release());
    m.def(
        "lora_up",
        [](Address base, int64_t base_stride, Address second, Address y, int64_t y_stride, int64_t M, int64_t N,
           const Tail& tail, DType dtype, int device, Address stream) {
            check("lora_up", device,
                  lora_up(at<void>(base), base_stride, at<void>(second), at<void>(y), y_stride, M, N, tail, dtype,
                          place(device, stream)));
        },
        release());
    m.def(
        "dropout",
        [](const Matrix& x, Address out, int64_t M, int64_t K, uint32_t threshold, float factor, Address seed,
           int device, Address stream) {
            check("dropout", device,
                  dropout(x, at<void>(out), M, K, threshold, factor, at<int64_t>(seed), place(device, stream)));
        },
        release());
    m.def(
        "dora_norm",
        [](const Matrix& weight, const Matrix& A, Address B, int64_t B_stride, float scale, Address norm, int64_t N,
           int64_t K, int64_t rank, DType dtype, int device, Address stream) {
            check("dora_norm", device,
                  dora_norm(weight, A, at<float>(B), B_stride, scale, at<float>(norm), N, K, rank, dtype,
                            place(device, stream)));
        },
        release());
#ifdef FASTPEFT_EMULATE
    m.def("set_backwards", [](bool backwards) { emulation::backwards = backwards; });
    m.def("set_has_lora_linear", [](bool has) { emulation::has_lora_linear = has; });
    m.def("launches", [] { return emulation::launches; });
#endif
}

// The pybind11 module fastpeft._cuda, thin: pointers and strides as integers, so that it needs no torch and serves any.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace {

namespace py = pybind11;
using namespace fastpeft::cuda;
using Address = uintptr_t;  // 0: there is no such tensor

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Runs a launcher on the tensors' GPU, and leaves the current one as it was.
template <typename Launch>
void on(int device, const char* kernel, Launch launch) {
    int current = 0;
    const auto check = [&](cudaError_t error) {
        if (error != cudaSuccess)
            throw std::runtime_error(std::string(kernel) + " on GPU " + std::to_string(device) + ": " +
                                     cudaGetErrorString(error));
    };
    check(cudaGetDevice(&current));
    if (current != device) check(cudaSetDevice(device));
    const cudaError_t error = launch();
    if (current != device) check(cudaSetDevice(current));
    check(error);
}

Matrix matrix(Address data, DType dtype, int64_t row_stride, int64_t column_stride) {
    return {at<void>(data), dtype, row_stride, column_stride};
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
    m.attr("GROUP") = kGroup;
    m.def(
        "four_bit_decode",
        [](const FourBit& weight, int64_t elements, Address out, DType dtype, int device, Address stream) {
            on(device, "four_bit_decode",
               [&] { return four_bit_decode(weight, elements, at<void>(out), dtype, at<CUstream_st>(stream)); });
        },
        release());
    m.def(
        "four_bit_linear",
        [](Address x, const FourBit& weight, Address y, int64_t M, int64_t N, int64_t K, const Tail& tail, DType dtype,
           int device, Address stream) {
            on(device, "four_bit_linear", [&] {
                return four_bit_linear(at<void>(x), weight, at<void>(y), M, N, K, tail, dtype, at<CUstream_st>(stream));
            });
        },
        release());
    m.def(
        "lora_down",
        [](Address x, int64_t x_stride, const Matrix& A, Address u, int64_t u_stride, Address index, int adapter,
           int64_t M, int64_t K, int64_t rank, DType dtype, int device, Address stream) {
            on(device, "lora_down", [&] {
                return lora_down(at<void>(x), x_stride, A, at<float>(u), u_stride, at<int32_t>(index), adapter, M, K,
                                 rank, dtype, at<CUstream_st>(stream));
            });
        },
        release());
    m.def(
        "lora_up",
        [](Address base, int64_t base_stride, Address second, Address y, int64_t y_stride, int64_t M, int64_t N,
           const Tail& tail, DType dtype, int device, Address stream) {
            on(device, "lora_up", [&] {
                return lora_up(at<void>(base), base_stride, at<void>(second), at<void>(y), y_stride, M, N, tail, dtype,
                               at<CUstream_st>(stream));
            });
        },
        release());
    m.def(
        "dropout",
        [](const Matrix& x, Address out, int64_t M, int64_t K, uint32_t threshold, float factor, Address seed,
           int device, Address stream) {
            on(device, "dropout", [&] {
                return dropout(x, at<void>(out), M, K, threshold, factor, at<int64_t>(seed), at<CUstream_st>(stream));
            });
        },
        release());
    m.def(
        "dora_norm",
        [](const Matrix& weight, const std::optional<FourBit>& four_bit, const Matrix& A, Address B, int64_t B_stride,
           float scale, Address norm, int64_t N, int64_t K, int64_t rank, DType dtype, int device, Address stream) {
            on(device, "dora_norm", [&] {
                return dora_norm(weight, four_bit ? &*four_bit : nullptr, A, at<float>(B), B_stride, scale,
                                 at<float>(norm), N, K, rank, dtype, at<CUstream_st>(stream));
            });
        },
        release());
#ifdef FASTPEFT_EMULATE
    m.def("set_backwards", [](bool backwards) { emulation::backwards = backwards; });
#endif
}

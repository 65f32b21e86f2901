"""What proves the CUDA kernels without a GPU is itself right, and notices what it is there for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cuda_emulation
import pytest
import torch

KERNELS = """
#include <pybind11/pybind11.h>

#include "elements.cuh"

using namespace fastpeft::cuda;

const Place here{0, nullptr};

template <typename T>
__global__ void product_kernel(const T* a, const T* b, float* d) {  // a [16, 16], b [8, 16], d [16, 8]
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto word = [](const T* at) { return *reinterpret_cast<const uint32_t*>(at); };
    const uint32_t left[4] = {word(a + g * 16 + 2 * t), word(a + (g + 8) * 16 + 2 * t), word(a + g * 16 + 2 * t + 8),
                              word(a + (g + 8) * 16 + 2 * t + 8)};
    const uint32_t right[2] = {word(b + g * 16 + 2 * t), word(b + g * 16 + 2 * t + 8)};
    float sums[4] = {};
    mma_16x8x16<T>(sums, left, right);
    for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sums[i];
}

template <typename T>
__global__ void round_kernel(const float* in, T* out) { out[threadIdx.x] = Convert<T>::from(in[threadIdx.x]); }

__global__ void reverse_kernel(float* data, bool with_barrier) {
    __shared__ float kept[64];
    kept[threadIdx.x] = data[threadIdx.x];
    if (with_barrier) __syncthreads();
    data[threadIdx.x] = kept[63 - threadIdx.x];
}

__global__ void same_place_kernel(float* data) { data[threadIdx.x] = blockIdx.x; }

__global__ void skipping_kernel(float* data, int which) {
    if (which == 0 && threadIdx.x != 3) __syncthreads();
    if (which == 1 && threadIdx.x != 3) data[threadIdx.x] = __shfl_sync(kAllLanes, data[threadIdx.x], 0);
    if (which == 2 && threadIdx.x < 32) __syncthreads(); else __shfl_sync(kAllLanes, 0.0f, 0);
}

template <typename T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

PYBIND11_MODULE(FASTPEFT_CUDA_MODULE, m) {
    m.def("product", [](uintptr_t a, uintptr_t b, uintptr_t d, bool bf16) {
        if (bf16)
            FASTPEFT_LAUNCH(product_kernel<__nv_bfloat16>, 1, 32, here, at<__nv_bfloat16>(a), at<__nv_bfloat16>(b),
                            at<float>(d));
        else
            FASTPEFT_LAUNCH(product_kernel<__half>, 1, 32, here, at<__half>(a), at<__half>(b), at<float>(d));
    });
    m.def("round", [](uintptr_t in, uintptr_t out, bool bf16) {
        if (bf16)
            FASTPEFT_LAUNCH(round_kernel<__nv_bfloat16>, 1, 64, here, at<float>(in), at<__nv_bfloat16>(out));
        else
            FASTPEFT_LAUNCH(round_kernel<__half>, 1, 64, here, at<float>(in), at<__half>(out));
    });
    m.def("reverse", [](uintptr_t data, bool with_barrier) {
        FASTPEFT_LAUNCH(reverse_kernel, 1, 64, here, at<float>(data), with_barrier);
    });
    m.def("same_place", [](uintptr_t data) { FASTPEFT_LAUNCH(same_place_kernel, 3, 32, here, at<float>(data)); });
    m.def("skip", [](uintptr_t data, int which) {
        FASTPEFT_LAUNCH(skipping_kernel, 1, 64, here, at<float>(data), which);
    });
    m.def("set_backwards", [](bool backwards) { emulation::backwards = backwards; });
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "kernels.cpp"
    source.write_text(KERNELS)
    return cuda_emulation.compiled(folder, [source], "_emulated_kernels", folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_matrix_product_is_right(kernels: ModuleType, dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.empty(16, 8)
    kernels.product(a.data_ptr(), b.data_ptr(), d.data_ptr(), dtype == torch.bfloat16)
    torch.testing.assert_close(d.double(), a.double() @ b.double().t(), rtol=0, atol=16 * 2.0**-20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_rounds_them(kernels: ModuleType, dtype: torch.dtype) -> None:
    ties = torch.arange(16).mul(2.0**-9).add(1)  # half way between neighbours in bfloat16
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e38, 1e-40, 65519.0])
    numbers = torch.cat((ties, special, torch.randn(40) * torch.logspace(-8, 8, 40)))
    rounded = torch.empty(64, dtype=dtype)
    kernels.round(numbers.data_ptr(), rounded.data_ptr(), dtype == torch.bfloat16)
    torch.testing.assert_close(rounded, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_race_shows_in_one_order_of_the_threads(kernels: ModuleType, backwards: bool) -> None:
    kernels.set_backwards(backwards)
    data = torch.arange(64.0)
    kernels.reverse(data.data_ptr(), True)
    assert torch.equal(data, torch.arange(64.0).flip(0))
    kernels.reverse(data.data_ptr(), False)
    assert not torch.equal(data, torch.arange(64.0))
    kernels.set_backwards(False)


def test_blocks_that_write_to_one_place_show_in_their_order(kernels: ModuleType) -> None:
    data = torch.empty(32)
    for backwards in (False, True):
        kernels.set_backwards(backwards)
        kernels.same_place(data.data_ptr())
        assert torch.equal(data, torch.full((32,), 0.0 if backwards else 2.0))
    kernels.set_backwards(False)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["barrier", "exchange", "different ones"])
def test_threads_that_wait_in_vain_are_noticed(kernels: ModuleType, which: int) -> None:
    data = torch.zeros(64)
    with pytest.raises(RuntimeError, match="not all threads came to a barrier, or not all lanes to an exchange"):
        kernels.skip(data.data_ptr(), which)


def test_a_byte_beyond_a_fence_ends_the_process() -> None:
    command = (
        "import cuda_emulation, ctypes, torch\n"
        "with cuda_emulation.fences() as fenced:\n"
        "    t = fenced(torch.ones(8))\n"
        "    print(ctypes.string_at(t.data_ptr(), 32) == b'\\0\\0\\x80?' * 8, flush=True)\n"
        "    ctypes.string_at(t.data_ptr(), 33)\n"
    )
    ran = subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ran.stdout == "True\n"
    assert ran.returncode < 0

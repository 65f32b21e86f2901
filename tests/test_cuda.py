"""The CUDA backend: on a GPU where there is one, else its kernels run on CPU tensors, see cuda_emulation.py. Oracle and
eager compute on the CPU."""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import cuda_emulation
import pytest
import torch
from cases import in_layout
from devices import DEVICE, DTYPES, moved_to, run
from gpu_suite import GpuSuite
from oracle import LoraInputs, assert_close_as_eager, make_inputs
from test_dora_norm import eager as eager_norm

import fastpeft
from fastpeft import dispatch, extension, four_bit, ops
from fastpeft.backends.gpu import cuda as backend
from fastpeft.backends.gpu.cuda_kernels import CudaKernels
from fastpeft.backends.gpu.kernel_set import Mask, Tail
from fastpeft.call import Weight
from fastpeft.dropout import dropout_threshold


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> CudaKernels:
    """Without a GPU the backend takes calls on CPU tensors."""
    return cuda_emulation.use(monkeypatch) if DEVICE == "cpu" else CudaKernels(extension.cuda())


without_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="about the emulation")


class TestCuda(GpuSuite):
    name = "cuda"


def by_cuda(inputs: LoraInputs) -> dict[str, torch.Tensor]:
    return run(inputs, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "row_stride", "column_stride"])
@pytest.mark.parametrize("shape", [(33, 104), (70, 257)], ids=str)
def test_the_norm_of_any_strides_is_as_close_as_eager(shape: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    made = make_inputs((1, shape[1]), shape[0], (16,), dtype)
    weight, A, B = moved_to(DEVICE, (in_layout(made.weight, layout), made.A[0], made.B[0]))
    norm = ops.dora_norm(*Weight.of(weight), A, B, 0.75, dtype, "cuda").cpu()
    exact = eager_norm(made.weight.double(), made.A[0].double(), made.B[0].double(), 0.75)
    assert_close_as_eager(norm, exact, eager_norm(made.weight, made.A[0], made.B[0], 0.75))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [("nf4", 64, True), ("fp4", 32, False), ("nf4", 4096, False)])
@pytest.mark.parametrize("shape", [(40, 8), (33, 104), (70, 257), (8, 600)], ids=str)
def test_the_norm_over_4_bits_is_as_close_as_eager(
    shape: tuple[int, int], form: tuple[str, int, bool], dtype: torch.dtype
) -> None:
    made = make_inputs((1, shape[1]), shape[0], (8,), dtype)
    packed = four_bit.quantize(made.weight, *form)
    A, B, weight = moved_to(DEVICE, (made.A[0], made.B[0], packed))
    norm = ops.dora_norm(*Weight.of(weight), A, B, 0.75, dtype, "cuda").cpu()
    weight = packed.dequantize(dtype)
    exact = eager_norm(weight.double(), made.A[0].double(), made.B[0].double(), 0.75)
    assert_close_as_eager(norm, exact, eager_norm(weight, made.A[0], made.B[0], 0.75))


def calls(dtype: torch.dtype, device: str = DEVICE) -> dict[str, tuple[str, list[torch.Tensor]]]:
    """For every kernel the method that launches it, and tensors whose sizes end within its tiles."""
    draw = torch.Generator().manual_seed(1)

    def drawn(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.rand(shape, generator=draw).to(device, of)

    f32, half = torch.float32, torch.float16 if dtype == torch.float16 else torch.bfloat16
    packed = four_bit.quantize(torch.randn(66, 192, generator=draw), "nf4", 64, True)
    codes = [packed.packed.to(device), *(t.to(device) for t in packed.quant)]
    return {
        "lora_down": ("lora_down", [drawn(11, 190), drawn(5, 190, of=f32), drawn(11, 5, of=f32)]),
        "lora_down_many": ("lora_down_many", [drawn(70, 190, of=half), drawn(5, 190, of=f32), drawn(70, 5, of=f32)]),
        "lora_gradient": ("lora_gradient", [drawn(70, 90, of=half), drawn(70, 6, of=half), drawn(6, 90, of=f32)]),
        "lora_up": ("lora_up", [drawn(70, 90), drawn(70, 6, of=f32), drawn(90, 6), drawn(90, of=f32), drawn(90)]),
        "dropout": ("dropout", [drawn(70, 90), torch.tensor(7, device=device)]),
        "dora_norm": ("dora_norm", [drawn(66, 192), drawn(6, 192), drawn(66, 6, of=f32)]),
        "dora_norm, 4 bits": ("dora_norm", [drawn(0), drawn(6, 192), drawn(66, 6, of=f32), *codes]),
        "four_bit_decode": ("four_bit_decode", codes),
        "four_bit_linear": ("four_bit_linear", [drawn(5, 192), drawn(5, 6, of=f32), drawn(66, 6), *codes]),
    }


def launched(kernels: CudaKernels, method: str, tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """What the kernel writes; memory that it leaves out stays NaN."""
    first, *rest = tensors
    match method:
        case "lora_down":
            A, u = rest
            kernels.lora_down(first, [A], u.fill_(torch.nan), [Mask(0, 1.0, None)], None)
            return u
        case "lora_down_many" | "lora_gradient":
            other, result = rest
            mask = Mask(dropout_threshold(0.3), 1.0, torch.tensor(7, device=first.device))
            getattr(kernels, method)(first, other, result.fill_(torch.nan), mask)
            return result
        case "lora_up":
            q, right, c, bias = rest
            y, z = (first.new_empty(first.shape).fill_(torch.nan) for _ in range(2))
            kernels.lora_up(first, first, y, Tail(q, right, 1.5, c=c, z=z, bias=bias))
            return torch.stack((y, z))
        case "dropout":
            return kernels.dropout(first, Mask(dropout_threshold(0.3), 1.5, rest[0]))
        case "dora_norm" if len(rest) == 2:
            return kernels.dora_norm(Weight.of(first), *rest, 0.75, dtype)
        case "dora_norm":
            A, B, packed, *quant = rest
            return kernels.dora_norm(Weight(packed, quant, 64), A, B, 0.75, dtype)
        case "four_bit_decode":
            return kernels.four_bit_decode(Weight(first, rest, 64), 66, 192, dtype)
        case "four_bit_linear":
            q, right, packed, *quant = rest
            y = first.new_empty((first.shape[0], 66)).fill_(torch.nan)
            kernels.four_bit_linear(first, Weight(packed, quant, 64), y, Tail(q, right, 1.5))
            return y
    raise ValueError(method)


@without_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", calls(torch.float32, "cpu"))
def test_the_order_of_the_threads_changes_no_bit(name: str, dtype: torch.dtype, kernels: CudaKernels) -> None:
    """Where one thread reads what another one writes without a barrier, it does."""
    method, tensors = calls(dtype)[name]
    forwards = launched(kernels, method, tensors, dtype).clone()
    cuda_emulation.library().set_backwards(True)
    try:
        backwards = launched(kernels, method, tensors, dtype)
    finally:
        cuda_emulation.library().set_backwards(False)
    assert forwards.isfinite().all()
    assert torch.equal(forwards, backwards)


@without_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", calls(torch.float32, "cpu"))
def test_nothing_beyond_a_tensor_is_touched(
    name: str, dtype: torch.dtype, kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor, read or written, ends where memory does: one byte more (up to its alignment) would end the
    process."""
    method, tensors = calls(dtype)[name]
    outside = launched(kernels, method, tensors, dtype).clone()
    new_empty, made = torch.Tensor.new_empty, []
    with cuda_emulation.fences() as fenced:

        def fenced_empty(like: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
            made.append(fenced(new_empty(like, *args, **settings)))
            return made[-1]

        monkeypatch.setattr(torch.Tensor, "new_empty", fenced_empty)
        result = launched(kernels, method, [fenced(t) for t in tensors], dtype)
        assert made or method.startswith(("lora_down", "lora_gradient"))  # which write to an argument
        assert torch.equal(result, outside)


def test_a_launch_that_fails_raises_and_leaves_no_error_pending(kernels: CudaKernels) -> None:
    seed = torch.tensor(7, device=DEVICE)
    x, nowhere = torch.ones(2, 3, device=DEVICE), 1000
    library = kernels.library
    with pytest.raises(RuntimeError, match="dropout on GPU 1000: invalid device ordinal"):
        library.dropout(kernels._matrix(x), x.data_ptr(), 2, 3, 9, 1.0, seed.data_ptr(), nowhere, 0)
    assert kernels.dropout(x, Mask(9, 1.0, seed)).isfinite().all()


@without_gpu
def test_info_says_how_each_gpu_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (8, 0)][device])
    assert dispatch.named("cuda").detail() == (
        "x Wᵀ with the low-rank part in the same sums, from 129 tokens on, "
        "the vendor's x Wᵀ, the low-rank part added in one pass"
    )


@without_gpu
def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight, A, B = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    x = torch.randn(3, 6)
    with pytest.raises(fastpeft.BackendRefusal, match="backend='cuda' cannot run lora_linear: it runs on NVIDIA GPUs"):
        fastpeft.functional.lora_linear(x, weight, None, A, B, 1.0, backend="cuda")

    def missing() -> ModuleType:
        raise ImportError("No module named 'fastpeft._cuda'")

    monkeypatch.setattr(extension, "cuda", missing)
    monkeypatch.setattr(extension, "cuda_missing", extension.cuda_missing.__wrapped__)
    reason = "the CUDA extension is not built (No module named 'fastpeft._cuda'); `python -m fastpeft build` builds it"
    assert dispatch.named("cuda").unavailable() == f"{reason} where nvcc is found"


def test_a_table_of_launchers_from_other_sources_is_refused(
    kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (ctypes.c_int64 * 8)(0)
    monkeypatch.setattr(backend, "launchers", lambda: ctypes.addressof(other))
    x, weight, A, B = (torch.ones(shape, device=DEVICE) for shape in ((3, 8), (4, 8), (2, 8), (4, 2)))
    with pytest.raises(RuntimeError, match="were built from different sources: run `python -m fastpeft build`"):
        fastpeft.functional.lora_linear(x, weight, None, A, B, 1.0, backend="cuda")

"""The CUDA backend: NVIDIA GPUs, with the kernels of csrc/cuda and the vendor's products, put together in C++
(csrc/gpu.cpp): Python would take longer with its launches than the GPU does with most layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import gpu, native
from .gpu import Mask, Tail, parts_of
from .operands import backward_in_cpp, forward_in_cpp

NAME = "cuda"
DEVICE = "cuda"  # where the self-check runs it
ALIGNED = 16  # bytes
HOPPER = (9, 0)


def unavailable() -> str | None:
    """Why this backend cannot run on this machine at all; None when it can."""
    return _missing() or (None if torch.cuda.is_available() else "torch finds no NVIDIA GPU")


def detail() -> str:
    """What ``fastpeft info`` says of it where it is available."""
    return ", ".join(_products(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count()))


def refuses(op: str, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> str | None:
    """Why this backend cannot take this call; None when it can. ``x`` stands for ``dy`` in a backward op."""
    if x.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and x is on {x.device}"
    return _missing() or gpu.refusal(x, weight, A, B)


def worth_a_warning(x: Tensor) -> bool:
    """Whether a user should hear once that calls like this one are refused: Triton's kernels serve them, too."""
    return False


def describe(K: int, N: int, dtype: torch.dtype, device: torch.device) -> str:
    """How a layer ``[N, K]`` would be computed, for ``explain``."""
    hopper = dtype != torch.float32 and device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    return _products(HOPPER if hopper else (0, 0))


def _products(capability: tuple[int, int]) -> str:
    if capability == HOPPER:
        return "x Wᵀ with the low-rank part in the same sums, from 129 tokens on"
    return "the vendor's x Wᵀ, the low-rank part added in one pass"


def lora_linear(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See ops.py."""
    return _cpp().gpu_lora_linear(_where(args[0]), *forward_in_cpp(*args))


def with_gradient(*args: Any) -> Tensor:
    """``y`` of :func:`lora_linear` with an autograd node in C++."""
    return _cpp().gpu_lora_linear_with_gradient(_where(args[0]), *forward_in_cpp(*args))


def lora_linear_backward(*args: Any) -> list[Tensor]:
    """See ops.py."""
    return _cpp().gpu_lora_linear_backward(_where(args[0]), *backward_in_cpp(*args))


def dora_norm(*args: Any) -> Tensor:
    """See ops.py."""
    return _cpp().gpu_dora_norm(_where(args[0]), *args)


class CudaKernels:
    """The kernels one by one, as methods of :class:`fastpeft.backends.gpu.Kernels`: what tests and benches call.

    Args:
        library: ``fastpeft._cuda``, or its emulation.
    """

    def __init__(self, library: ModuleType) -> None:
        self.library = library
        types = library.DType
        self._dtypes = {torch.float32: types.f32, torch.bfloat16: types.bf16, torch.float16: types.f16}
        self._no_matrix = library.Matrix(0, types.f32, 0, 0)

    def lora_down(self, x: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask], index: Tensor | None) -> None:
        """A few tokens without a mask, see csrc/cuda/launchers.h; of many, :meth:`lora_down_many`."""
        M, K = x.shape
        x, chosen = _with_rows(x), None if index is None else index.to(torch.int32).contiguous()
        for i, (a, out) in enumerate(zip(A, parts_of(u, A), strict=True)):
            operands = x.data_ptr(), x.stride(0), self._matrix(a), out.data_ptr(), out.stride(0), _address(chosen), i
            self.library.lora_down(*operands, M, K, a.shape[0], self._dtypes[x.dtype], *_place(x))

    def lora_down_many(self, x: Tensor, A: Tensor, u: Tensor, mask: Mask) -> None:
        """``u [M, r] = keep ∘ x Aᵀ`` of one adapter, in a low precision."""
        operands = x.data_ptr(), x.stride(0), self._matrix(A), mask.threshold, _address(mask.seed)
        sizes = *x.shape, A.shape[0]
        self.library.lora_down_many(*operands, u.data_ptr(), u.stride(0), *sizes, self._dtypes[x.dtype], *_place(x))

    def lora_gradient(self, x: Tensor, q: Tensor, sums: Tensor, mask: Mask) -> None:
        """``sums [r, C] = qᵀ (keep ∘ x)`` of ``x [M, C]`` in a low precision."""
        operands = x.data_ptr(), x.stride(0), self._matrix(q), mask.threshold, _address(mask.seed)
        sizes = *x.shape, q.shape[1]
        self.library.lora_gradient(*operands, self._matrix(sums), *sizes, self._dtypes[x.dtype], *_place(x))

    def lora_linear(self, x: Tensor, weight: Tensor, y: Tensor, tail: Tail) -> None:
        """``x Wᵀ`` with its tail, for sm_90a; ``tail.q`` and ``right`` in the dtype of ``x``, the scale 1."""
        operands = x.data_ptr(), x.stride(0), self._matrix(weight), tail.q.data_ptr(), tail.q.stride(0)
        sizes = y.data_ptr(), y.stride(0), *y.shape, x.shape[1]
        self.library.lora_linear(*operands, *sizes, self._tail(tail), self._dtypes[x.dtype], *_place(x))

    def lora_up(self, base: Tensor, second: Tensor | None, y: Tensor, tail: Tail) -> None:
        operands = base.data_ptr(), base.stride(0), _address(second), y.data_ptr(), y.stride(0), *base.shape
        self.library.lora_up(*operands, self._tail(tail), self._dtypes[base.dtype], *_place(base))

    def dropout(self, x: Tensor, mask: Mask) -> Tensor:
        assert mask.seed is not None
        out = x.new_empty(x.shape)
        settings = mask.threshold, mask.factor, mask.seed.data_ptr()
        self.library.dropout(self._matrix(x), out.data_ptr(), *x.shape, *settings, *_place(x))
        return out

    def dora_norm(
        self,
        weight: Tensor,
        quant: Sequence[Tensor],
        blocksize: int,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        N, K = B.shape[0], A.shape[1]
        if quant:
            weight = self.four_bit_decode(weight, quant, blocksize, N, K, dtype)
        norm, left = A.new_empty(N, dtype=torch.float32), B.float().contiguous()
        operands = self._matrix(weight), self._matrix(A), left.data_ptr(), left.stride(0), scaling, norm.data_ptr()
        self.library.dora_norm(*operands, N, K, A.shape[0], self._dtypes[dtype], *_place(weight))
        return norm

    def four_bit_decode(
        self, packed: Tensor, quant: Sequence[Tensor], blocksize: int, N: int, K: int, dtype: torch.dtype
    ) -> Tensor:
        out = packed.new_empty((N, K), dtype=dtype)
        weight = self._four_bit(packed, quant, blocksize)
        self.library.four_bit_decode(weight, N * K, out.data_ptr(), self._dtypes[dtype], *_place(packed))
        return out

    def four_bit_linear(
        self, x: Tensor, packed: Tensor, quant: Sequence[Tensor], blocksize: int, y: Tensor, tail: Tail
    ) -> None:
        x, packed = _aligned(x.contiguous()), _aligned(packed)
        operands = x.data_ptr(), self._four_bit(packed, quant, blocksize), y.data_ptr()
        sizes = x.shape[0], y.shape[1], x.shape[1]
        self.library.four_bit_linear(*operands, *sizes, self._tail(tail), self._dtypes[x.dtype], *_place(x))

    def _matrix(self, t: Tensor) -> Any:
        return self.library.Matrix(t.data_ptr(), self._dtypes[t.dtype], *t.stride())

    def _four_bit(self, packed: Tensor, quant: Sequence[Tensor], blocksize: int) -> Any:
        code, absmax, *nested = (tensor.data_ptr() for tensor in quant)
        statistics = (0, absmax, *nested) if nested else (absmax, 0, 0, 0, 0)
        return self.library.FourBit(packed.data_ptr(), code, *statistics, blocksize.bit_length() - 1)

    def _tail(self, tail: Tail) -> Any:
        bias = tail.bias
        bias_row = self._no_matrix if bias is None else self._matrix(bias.unsqueeze(0))
        operands = tail.q.data_ptr(), tail.q.stride(0), tail.q.shape[1], self._matrix(tail.right), tail.scale
        ending = tail.threshold, _address(tail.seed), _address(tail.c), _address(tail.z)
        return self.library.Tail(*operands, *ending, tail.z is not None and tail.z.dtype == torch.float32, bias_row)


@lru_cache
def library() -> ModuleType:
    """Loaded at the first look: importing fastpeft leaves CUDA alone."""
    return import_module("fastpeft._cuda")


@lru_cache
def _not_built() -> str | None:
    """The reason where there is no library; looked for once, as every call asks."""
    try:
        library()
    except ImportError as error:
        return f"the CUDA extension is not built ({error}); `python -m fastpeft build` builds it where nvcc is found"
    return None


def _missing() -> str | None:
    if native._C is None:
        return "the C++ extension is not built, `python -m fastpeft build` builds it"
    return _not_built()


@lru_cache
def launchers() -> int:
    """The address of their table, for C++."""
    return library().launchers()


def _cpp() -> ModuleType:
    assert native._C is not None
    return native._C


def _where(x: Tensor) -> tuple[int, int, int]:
    """What C++ launches by: the table of launchers, the GPU, its current stream."""
    return launchers(), *_place(x)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _place(tensor: Tensor) -> tuple[int, int]:
    """The GPU and its current stream; the emulation has neither."""
    if not tensor.is_cuda:
        return 0, 0
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNED == 0 else tensor.clone()

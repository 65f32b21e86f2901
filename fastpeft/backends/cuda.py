"""The CUDA backend: NVIDIA GPUs, with the kernels of csrc/cuda.

Calls that take the GPU no longer than Python takes to put them together are put together in C++ (csrc/gpu.cpp), with
torch's skinny products. In larger ones Triton's kernels do what this backend has none for: skinny products of many
tokens, the fused products with W. Where there is no Triton, all is C++, and without the C++ extension all is Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import gpu, gpu_plans, native, triton
from .gpu import DyGradients, Kernels, Mask, Tail, parts_of
from .gpu_plans import Plan
from .operands import backward_in_cpp, forward_in_cpp

NAME = "cuda"
DEVICE = "cuda"  # where the self-check runs it
RUN = 8  # elements that a thread decodes: within one row, and within one block
ALIGNED = 16  # bytes
# Multiply-adds of the product with W, for each multiprocessor, that take no longer than Python and the launches of
# Triton do. Reckoned, not measured: python -m fastpeft.bench.gpu_compositions measures it.
HOST_BOUND = 300_000_000


def unavailable() -> str | None:
    """Why this backend cannot run on this machine at all; None when it can."""
    return _missing() or (None if torch.cuda.is_available() else "torch finds no NVIDIA GPU")


def detail() -> str:
    """What ``fastpeft info`` says of it where it is available."""
    if not triton.is_installed():
        return "composed in C++, Triton is not installed"
    if native._C is None:
        return "composed in Python, the C++ extension is not built; skinny products by Triton"
    return "small calls composed in C++; skinny products of large ones by Triton"


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
    if kernels().others is None:
        return "composed in C++ (epilogue)"
    plans = gpu_plans.describe(K, N, dtype, device, triton.fused_plans(device, dtype))
    if native._C is None:
        return plans
    tokens = HOST_BOUND * triton.multiprocessors(device) // (K * N)
    return f"up to {tokens} tokens composed in C++ (epilogue); above, {plans}"


def lora_linear(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See ops.py."""
    x, _, _, _, _, A, B, *_ = args
    if not _is_composed(x, A, B):
        return gpu.lora_linear(kernels(), *args)
    return _cpp().gpu_lora_linear(_where(x), *forward_in_cpp(*args))


def with_gradient(*args: Any) -> Tensor | None:
    """``y`` of :func:`lora_linear` with an autograd node in C++; None where the call is not put together there."""
    x, _, _, _, _, A, B, *_ = args
    if not _is_composed(x, A, B):
        return None
    return _cpp().gpu_lora_linear_with_gradient(_where(x), *forward_in_cpp(*args))


def lora_linear_backward(*args: Any) -> list[Tensor]:
    """See ops.py."""
    dy, _, _, _, _, A, B, *_ = args
    if not _is_composed(dy, A, B):
        return gpu.lora_linear_backward(kernels(), *args)
    return _cpp().gpu_lora_linear_backward(_where(dy), *backward_in_cpp(*args))


def dora_norm(*args: Any) -> Tensor:
    """See ops.py."""
    return gpu.dora_norm(kernels(), *args)


class CudaKernels:
    """A :class:`fastpeft.backends.gpu.Kernels`.

    Args:
        library: ``fastpeft._cuda``, or its emulation.
        others: Triton's kernels, for what the library has none for; None: it is not asked for that.
    """

    def __init__(self, library: ModuleType, others: Kernels | None) -> None:
        self.library, self.others = library, others
        self.launchers: int = library.launchers()
        types = library.DType
        self._dtypes = {torch.float32: types.f32, torch.bfloat16: types.bf16, torch.float16: types.f16}
        self._no_matrix = library.Matrix(0, types.f32, 0, 0)

    def lora_down(self, x: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask], index: Tensor | None) -> None:
        M, K = x.shape
        if M > self.library.DOWN_TOKENS or any(mask.threshold for mask in masks):
            assert self.others is not None
            return self.others.lora_down(x, A, u, masks, index)
        x, chosen = _with_rows(x), None if index is None else index.to(torch.int32).contiguous()
        for i, (a, out) in enumerate(zip(A, parts_of(u, A), strict=True)):
            operands = x.data_ptr(), x.stride(0), self._matrix(a), out.data_ptr(), out.stride(0), _address(chosen), i
            self.library.lora_down(*operands, M, K, a.shape[0], self._dtypes[x.dtype], *_place(x))
        return None

    def lora_dy(self, *args: Any) -> DyGradients:
        assert self.others is not None
        return self.others.lora_dy(*args)

    def lora_dA(self, x: Tensor, v: Tensor, mask: Mask) -> Tensor:
        assert self.others is not None
        return self.others.lora_dA(x, v, mask)

    def lora_up(self, base: Tensor, second: Tensor | None, y: Tensor, tail: Tail) -> None:
        operands = base.data_ptr(), base.stride(0), _address(second), y.data_ptr(), y.stride(0), *base.shape
        self.library.lora_up(*operands, self._tail(tail), self._dtypes[base.dtype], *_place(base))

    def fused_plans(self, x: Tensor, weight: Tensor, rank: int) -> tuple[Plan, ...]:
        return () if self.others is None else self.others.fused_plans(x, weight, rank)

    def lora_linear(
        self, plan: Plan, x: Tensor, weight: Tensor, y: Tensor, tail: Tail, input_factor: float = 0.0
    ) -> None:
        assert self.others is not None
        self.others.lora_linear(plan, x, weight, y, tail, input_factor)

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
        packed = None
        if quant and K % RUN == 0 and weight.data_ptr() % ALIGNED == 0:
            packed = self._four_bit(weight, quant, blocksize)
        elif quant:
            weight = self.four_bit_decode(weight, quant, blocksize, N, K, dtype)
        norm = A.new_empty(N, dtype=torch.float32)
        left = B.float().contiguous()
        dense = self._no_matrix if packed is not None else self._matrix(weight)
        operands = dense, packed, self._matrix(A), left.data_ptr(), left.stride(0), scaling, norm.data_ptr()
        self.library.dora_norm(*operands, N, K, A.shape[0], self._dtypes[dtype], *_place(weight))
        return norm

    def four_bit_decode(
        self, packed: Tensor, quant: Sequence[Tensor], blocksize: int, N: int, K: int, dtype: torch.dtype
    ) -> Tensor:
        out = packed.new_empty((N, K), dtype=dtype)
        weight = self._four_bit(packed, quant, blocksize)
        self.library.four_bit_decode(weight, N * K, out.data_ptr(), self._dtypes[dtype], *_place(packed))
        return out

    def decodes_in_loop(self, M: int, K: int, blocksize: int) -> bool:
        if self._few_tokens(M, K, blocksize):
            return True
        return self.others is not None and self.others.decodes_in_loop(M, K, blocksize)

    def four_bit_linear(
        self, x: Tensor, packed: Tensor, quant: Sequence[Tensor], blocksize: int, y: Tensor, tail: Tail
    ) -> None:
        shape = x.shape[0], y.shape[1], x.shape[1]
        if not self._few_tokens(shape[0], shape[2], blocksize):
            assert self.others is not None
            return self.others.four_bit_linear(x, packed, quant, blocksize, y, tail)
        x, packed = _aligned(x.contiguous()), _aligned(packed)
        weight = self._four_bit(packed, quant, blocksize)
        operands = x.data_ptr(), weight, y.data_ptr(), *shape, self._tail(tail), self._dtypes[x.dtype]
        return self.library.four_bit_linear(*operands, *_place(x))

    def _few_tokens(self, M: int, K: int, blocksize: int) -> bool:
        library = self.library
        return M <= library.FEW_TOKENS and K % library.GROUP == 0 and blocksize >= library.GROUP

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
    if not triton.is_installed() and native._C is None:
        return "neither Triton is installed nor the C++ extension built, `python -m fastpeft build` builds it"
    return _not_built()


@lru_cache
def kernels() -> CudaKernels:
    return CudaKernels(library(), triton.kernels() if triton.is_installed() else None)


def _is_composed(x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> bool:
    """Whether a call is put together in C++; ``x`` stands for ``dy`` in a backward op."""
    if kernels().others is None:
        return True
    multiply_adds = x.shape[:-1].numel() * A[0].shape[1] * B[0].shape[0]
    return native._C is not None and multiply_adds <= HOST_BOUND * triton.multiprocessors(x.device)


def _cpp() -> ModuleType:
    assert native._C is not None
    return native._C


def _where(x: Tensor) -> tuple[int, int, int]:
    """What C++ launches by: the table of launchers, the GPU, its current stream."""
    return kernels().launchers, *_place(x)


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

"""The CUDA kernels one by one, named and called as in :class:`fastpeft.backends.gpu.kernel_set.Kernels`: for tests and
benches. The ops call them from C++ (csrc/cuda/launch.h)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...call import Weight
from .compose import parts_of
from .cuda import place_of
from .kernel_set import Mask, Tail

ALIGNED = 16  # bytes


class CudaKernels:
    """The kernels of ``fastpeft._cuda`` one by one, on tensors.

    Args:
        library: ``fastpeft._cuda``, or its emulation.
    """

    def __init__(self, library: ModuleType) -> None:
        self.library = library
        types = library.DType
        self._dtypes = {torch.float32: types.f32, torch.bfloat16: types.bf16, torch.float16: types.f16}
        self._no_matrix = library.Matrix(0, types.f32, 0, 0, 0, 0)

    def lora_down(self, x: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask], index: Tensor | None) -> None:
        """A few tokens without a mask, see csrc/cuda/kernels/launchers.h; of many, :meth:`lora_down_many`."""
        M, K = x.shape
        x, chosen = _with_rows(x), None if index is None else index.to(torch.int32).contiguous()
        for i, (a, out) in enumerate(zip(A, parts_of(u, A), strict=True)):
            operands = x.data_ptr(), x.stride(0), self._matrix(a), out.data_ptr(), out.stride(0), address(chosen), i
            self.library.lora_down(*operands, M, K, a.shape[0], self._dtypes[x.dtype], *_place(x))

    def lora_down_many(self, x: Tensor, A: Tensor, u: Tensor, mask: Mask) -> None:
        """``u [M, r] = keep ∘ x Aᵀ`` of one adapter, in a low precision."""
        operands = x.data_ptr(), x.stride(0), self._matrix(A), mask.threshold, address(mask.seed)
        sizes = *x.shape, A.shape[0]
        self.library.lora_down_many(*operands, u.data_ptr(), u.stride(0), *sizes, self._dtypes[x.dtype], *_place(x))

    def lora_gradient(self, x: Tensor, q: Tensor, sums: Tensor, mask: Mask) -> None:
        """``sums [r, C] = qᵀ (keep ∘ x)`` of ``x [M, C]`` in a low precision."""
        operands = x.data_ptr(), x.stride(0), self._matrix(q), mask.threshold, address(mask.seed)
        sizes = *x.shape, q.shape[1]
        self.library.lora_gradient(*operands, self._matrix(sums), *sizes, self._dtypes[x.dtype], *_place(x))

    def lora_linear(self, x: Tensor, weight: Tensor, y: Tensor, tail: Tail) -> None:
        """``x Wᵀ`` with its tail, for sm_90a; ``tail.q`` and ``right`` in the dtype of ``x``, the scale 1."""
        operands = x.data_ptr(), x.stride(0), self._matrix(weight), tail.q.data_ptr(), tail.q.stride(0)
        sizes = y.data_ptr(), y.stride(0), *y.shape, x.shape[1]
        self.library.lora_linear(*operands, *sizes, self._tail(tail), self._dtypes[x.dtype], *_place(x))

    def lora_up(self, base: Tensor, second: Tensor | None, y: Tensor, tail: Tail) -> None:
        operands = base.data_ptr(), base.stride(0), address(second), y.data_ptr(), y.stride(0), *base.shape
        self.library.lora_up(*operands, self._tail(tail), self._dtypes[base.dtype], *_place(base))

    def dropout(self, x: Tensor, mask: Mask) -> Tensor:
        assert mask.seed is not None
        out = x.new_empty(x.shape)
        settings = mask.threshold, mask.factor, mask.seed.data_ptr()
        self.library.dropout(self._matrix(x), out.data_ptr(), *x.shape, *settings, *_place(x))
        return out

    def dora_norm(self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        N, K = B.shape[0], A.shape[1]
        dense = self.four_bit_decode(weight, N, K, dtype) if weight.quant else weight.data
        norm, left = A.new_empty(N, dtype=torch.float32), B.float().contiguous()
        operands = self._matrix(dense), self._matrix(A), left.data_ptr(), left.stride(0), scaling, norm.data_ptr()
        self.library.dora_norm(*operands, N, K, A.shape[0], self._dtypes[dtype], *_place(dense))
        return norm

    def four_bit_decode(self, weight: Weight, N: int, K: int, dtype: torch.dtype) -> Tensor:
        out = weight.data.new_empty((N, K), dtype=dtype)
        codes = self._four_bit(weight)
        self.library.four_bit_decode(codes, N * K, out.data_ptr(), self._dtypes[dtype], *_place(out))
        return out

    def four_bit_linear(self, x: Tensor, weight: Weight, y: Tensor, tail: Tail) -> None:
        x, weight = _aligned(x.contiguous()), weight._replace(data=_aligned(weight.data))
        operands = x.data_ptr(), self._four_bit(weight), y.data_ptr()
        sizes = x.shape[0], y.shape[1], x.shape[1]
        self.library.four_bit_linear(*operands, *sizes, self._tail(tail), self._dtypes[x.dtype], *_place(x))

    def _matrix(self, t: Tensor) -> Any:
        return self.library.Matrix(t.data_ptr(), self._dtypes[t.dtype], *t.shape, *t.stride())

    def _four_bit(self, weight: Weight) -> Any:
        code, absmax, *nested = (tensor.data_ptr() for tensor in weight.quant)
        statistics = (0, absmax, *nested) if nested else (absmax, 0, 0, 0, 0)
        return self.library.FourBit(weight.data.data_ptr(), code, *statistics, weight.blocksize.bit_length() - 1)

    def _tail(self, tail: Tail) -> Any:
        bias = tail.bias
        bias_row = self._no_matrix if bias is None else self._matrix(bias.unsqueeze(0))
        operands = tail.q.data_ptr(), tail.q.stride(0), tail.q.shape[1], self._matrix(tail.right), tail.scale
        ending = tail.threshold, address(tail.seed), address(tail.c), address(tail.z)
        return self.library.Tail(*operands, *ending, tail.z is not None and tail.z.dtype == torch.float32, bias_row)


def address(tensor: Tensor | None) -> int:
    """Where its memory begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _place(tensor: Tensor) -> tuple[int, int]:
    """The GPU and its current stream; the emulation has neither."""
    return place_of(tensor) if tensor.is_cuda else (0, 0)


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNED == 0 else tensor.clone()

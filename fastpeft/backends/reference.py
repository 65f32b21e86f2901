"""The reference backend: reference.py with masks made by dropout.py. It takes every call on every device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..call import Adapters, Kept, Needs, Weight
from ..dropout import dropout_keep, dropout_scale
from ..four_bit import dequantize
from ..reference import (
    Adapter,
    dora_norm_reference,
    lora_grouped_linear_backward_reference,
    lora_grouped_linear_reference,
    lora_linear_backward_reference,
    lora_linear_reference,
    wide_dtype,
)
from .base import Backend, Forward


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Products are in the dtype that they are written in: autocast, whose dtype the operands have by now, would make
    those of float32 narrow, too."""
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


class ReferenceBackend(Backend):
    """Torch's own operations."""

    name = "reference"
    device = "cpu"

    def lora_linear(self, x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool) -> Forward:
        y, u, z = forward(x, weight, bias, adapters)
        return y, u, z if keep_z else []

    def lora_linear_backward(
        self, dy: Tensor, x: Tensor | None, weight: Weight, adapters: Adapters, kept: Kept, needs: Needs
    ) -> list[Tensor]:
        K = adapters.shape[1]
        dy2, x2 = _matrix(dy), None if x is None else _matrix(x)
        dense, terms = _dense(weight, adapters, dy.dtype), _terms(adapters, dy2.shape[0], K)
        with without_autocast(dy):
            grads = lora_linear_backward_reference(dy2, x2, dense, *kept, terms, needs.flat)
        if needs.x:
            grads[0] = grads[0].view(*dy.shape[:-1], K)
        return grads

    def lora_grouped_linear(
        self, x: Tensor, offsets: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool
    ) -> Forward:
        """On a GPU it waits once, for the offsets."""
        y, u, z = grouped(x, offsets, weight, bias, adapters)
        return y, u, z if keep_z else []

    def lora_grouped_linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        offsets: Tensor,
        weight: Weight,
        adapters: Adapters,
        kept: Kept,
        needs: Needs,
    ) -> list[Tensor]:
        grads = iter(grouped_backward(dy, x, offsets, weight, adapters, kept, needs))
        first = [next(grads)] if needs.x else []
        like = [weight.data, None, *adapters.factors, *(None for _ in adapters.c)]
        wanted = [t for t, need in zip(like, needs.flat[1:], strict=True) if need]
        return first + [g if t is None else torch.empty_like(t).copy_(g) for t, g in zip(wanted, grads, strict=True)]

    def dora_norm(self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        dense = _dense(weight, Adapters([A], [B], [], [scaling], [0.0]), dtype)
        assert dense is not None
        with without_autocast(A):
            return dora_norm_reference(dense, A, B, scaling).to(wide_dtype(dtype))


def forward(x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters) -> Forward:
    """``y``, ``u`` and each ``z`` by operations that torch can differentiate, transform and trace."""
    x2 = _matrix(x)
    dense, terms = _dense(weight, adapters, x.dtype), _terms(adapters, x2.shape[0], x2.shape[1])
    with without_autocast(x):
        y, u, z = lora_linear_reference(x2, dense, bias, terms)
    # No view: users may change y in place.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]]), u, z


def grouped(x: Tensor, offsets: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters) -> Forward:
    """The same of stacked experts."""
    experts = _experts(weight, adapters, x.dtype)
    with without_autocast(x):
        return lora_grouped_linear_reference(x, offsets, experts, bias, _terms(adapters, *x.shape))


def grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    offsets: Tensor,
    weight: Weight,
    adapters: Adapters,
    kept: Kept,
    needs: Needs,
) -> list[Tensor]:
    """The gradients of stacked experts, each contiguous: operations that torch can batch."""
    experts, terms = _experts(weight, adapters, dy.dtype), _terms(adapters, dy.shape[0], adapters.shape[1])
    with without_autocast(dy):
        return lora_grouped_linear_backward_reference(dy, x, offsets, experts, *kept, terms, needs.flat)


def _dense(weight: Weight, adapters: Adapters, dtype: torch.dtype) -> Tensor | None:
    data, quant, blocksize = weight
    if weight.is_absent:
        return None
    return dequantize(data, quant, blocksize, adapters.shape, dtype) if quant else data


class _Decoded(Sequence[Tensor]):
    """Experts in 4 bits, each decoded when it is asked for, and by itself."""

    def __init__(self, weight: Weight, adapters: Adapters, dtype: torch.dtype) -> None:
        self._weight, self._count, self._shape, self._dtype = weight, len(adapters.A[0]), adapters.shape, dtype

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, e: Any) -> Any:
        return self._weight.expert(e, self._shape, self._dtype)


def _experts(weight: Weight, adapters: Adapters, dtype: torch.dtype) -> Tensor | Sequence[Tensor]:
    return _Decoded(weight, adapters, dtype) if weight.quant else weight.data


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _terms(adapters: Adapters, rows: int, columns: int) -> list[Adapter]:
    """Each adapter with the mask and the tokens of its own."""
    A, B, c, scaling, ps, seed, index = adapters
    return [
        Adapter(
            *(A[i], B[i], scaling[i]),
            c=c[i] if c else None,
            keep=None if seed is None or not ps[i] else dropout_keep(seed[i], rows, columns, ps[i]),
            factor=1.0 if seed is None else dropout_scale(ps[i]),
            select=None if index is None else index.reshape(-1) == i,
        )
        for i in range(len(adapters.A))
    ]

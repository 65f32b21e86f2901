"""The reference backend: reference.py with masks made by dropout.py. It takes every call on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dropout import dropout_keep, dropout_scale
from ..nf4 import dequantize
from ..reference import dora_norm_reference, lora_linear_backward_reference, lora_linear_reference, wide_dtype

NAME = "reference"
DEVICE = "cpu"  # where the self-check runs it


def unavailable() -> str | None:
    """Why this backend cannot run on this machine at all; None when it can."""
    return None


def detail() -> str:
    """What ``fastpeft info`` says of it where it is available."""
    return ""


def refuses(op: str, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> str | None:
    """Why this backend cannot take this call; None when it can."""
    return None


def worth_a_warning(x: Tensor) -> bool:
    """Whether a user should hear once that calls like this one are refused."""
    return False


def lora_linear(
    x: Tensor,
    weight: Tensor,
    quant: Sequence[Tensor],
    blocksize: int,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    keep_z: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See ops.py."""
    x2 = _matrix(x)
    weight = _dense(weight, quant, blocksize, A[0], B[0], x.dtype)
    keep, factor = _masks(x2.shape[0], x2.shape[1], dropout_p, seed)
    selects = _selects(len(A), adapter_index)
    y, u, z = lora_linear_reference(x2, weight, bias, A, B, c, scaling, keep, factor, selects)
    return y.view(*x.shape[:-1], weight.shape[0]), u, z if keep_z else []


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant: Sequence[Tensor],
    blocksize: int,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[Tensor],
    u: Tensor | None,
    z: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See ops.py."""
    weight = _dense(weight, quant, blocksize, A[0], B[0], dy.dtype)
    K = weight.shape[1]
    dy2 = _matrix(dy)
    x2 = None if x is None else _matrix(x)
    keep, factor = _masks(dy2.shape[0], K, dropout_p, seed)
    selects = _selects(len(A), adapter_index)
    grads = lora_linear_backward_reference(dy2, x2, weight, A, B, c, u, z, scaling, keep, factor, selects, needs)
    if needs[0]:
        grads[0] = grads[0].view(*dy.shape[:-1], K)
    return grads


def dora_norm(
    weight: Tensor,
    quant: Sequence[Tensor],
    blocksize: int,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ops.py."""
    weight = _dense(weight, quant, blocksize, A, B, dtype)
    return dora_norm_reference(weight, A, B, scaling).to(wide_dtype(dtype))


def _dense(weight: Tensor, quant: Sequence[Tensor], blocksize: int, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, quant, blocksize, (B.shape[0], A.shape[1]), dtype) if quant else weight


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _masks(
    rows: int, columns: int, dropout_p: Sequence[float], seed: Tensor | None
) -> tuple[list[Tensor | None], list[float]]:
    if seed is None:
        return [None] * len(dropout_p), [1.0] * len(dropout_p)
    keep = [dropout_keep(seed[i], rows, columns, p) if p > 0 else None for i, p in enumerate(dropout_p)]
    return keep, [dropout_scale(p) for p in dropout_p]


def _selects(count: int, adapter_index: Tensor | None) -> list[Tensor | None]:
    if adapter_index is None:
        return [None] * count
    return [adapter_index.reshape(-1) == i for i in range(count)]

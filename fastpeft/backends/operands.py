"""What the compiled backends take, on whatever device, and how C++ is given it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dropout import dropout_scale, dropout_threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operand_refusal(x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> str | None:
    """Why none of them can take a call with such operands; None when they can."""
    if x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 or float16, and x is {x.dtype}"
    if weight.numel() == 0:
        return f"weight is empty, {list(weight.shape)}"
    if weight.dtype not in DTYPES and weight.dtype != torch.uint8:  # the bytes of a 4-bit weight
        return f"it takes a weight in float32, bfloat16, float16 or 4 bits, and it is {weight.dtype}"
    for tensor in (*A, *B):
        if tensor.dtype not in DTYPES:
            return f"it takes adapters in float32, bfloat16 or float16, and one is {tensor.dtype}"
    return None


def forward_in_cpp(
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
) -> tuple[Any, ...]:
    """The arguments of an op's ``lora_linear`` as the extension takes them."""
    folded = _folded_dropout(scaling, dropout_p, seed)
    return x, weight, quant, blocksize, bias, A, B, contiguous(c), *folded, seed, adapter_index, keep_z


def backward_in_cpp(
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
) -> tuple[Any, ...]:
    """The same of ``lora_linear_backward``."""
    folded = _folded_dropout(scaling, dropout_p, seed)
    return dy, x, weight, quant, blocksize, A, B, contiguous(c), u, z, *folded, seed, adapter_index, needs


def contiguous(vectors: Sequence[Tensor]) -> list[Tensor]:
    """DoRA's factors as every kernel reads them."""
    return [vector.contiguous() for vector in vectors]


def _folded_dropout(
    scaling: Sequence[float], dropout_p: Sequence[float], seed: Tensor | None
) -> tuple[Sequence[float], list[int]]:
    """The scalings with dropout's factor 1 / (1 - p) in them, and the masks' thresholds."""
    if seed is None:
        return scaling, [0] * len(scaling)
    factors = [s * dropout_scale(p) for s, p in zip(scaling, dropout_p, strict=True)]
    return factors, [dropout_threshold(p) for p in dropout_p]

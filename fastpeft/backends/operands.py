"""What the compiled backends take, on whatever device, and how C++ is given it."""

from __future__ import annotations

from collections.abc import Sequence

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


def folded_dropout(
    scaling: Sequence[float], dropout_p: Sequence[float], seed: Tensor | None
) -> tuple[list[int], Sequence[float]]:
    """The masks' thresholds, and the scalings with dropout's factor 1 / (1 - p) in them."""
    if seed is None:
        return [0] * len(scaling), scaling
    thresholds = [dropout_threshold(p) for p in dropout_p]
    return thresholds, [s * dropout_scale(p) for s, p in zip(scaling, dropout_p, strict=True)]

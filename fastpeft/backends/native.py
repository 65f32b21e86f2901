"""The native backend: the C++ extension on CPU. Its capability checks and its thresholds live here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

_C: ModuleType | None = None
_load_error = ""
try:
    _C = import_module("fastpeft._C")
except ImportError as error:
    _load_error = str(error)

NAME = "native"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why this backend cannot run on this machine at all; None when it can."""
    if _C is None:
        return f"the C++ extension is not built ({_load_error}); `python -m fastpeft build` builds it"
    return None


def refuses(op: str, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> str | None:
    """Why this backend cannot take this call; None when it can. ``x`` stands for ``dy`` in a backward op."""
    if _C is None:
        return unavailable()
    if x.device.type != "cpu":
        return f"it runs on CPU, and x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 or float16, and x is {x.dtype}"
    for tensor in (*A, *B):
        if tensor.dtype not in DTYPES:
            return f"it takes adapters in float32, bfloat16 or float16, and one is {tensor.dtype}"
    return None


def worth_a_warning(x: Tensor) -> bool:
    """Whether a user should hear once that calls like this one are refused."""
    return _C is None and x.device.type == "cpu" and x.dtype in DTYPES


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    assert _C is not None
    return _C.lora_linear(x, weight, bias, A, B, scaling, dropout_p, seed, adapter_index)

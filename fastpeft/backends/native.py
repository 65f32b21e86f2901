"""The native backend: the C++ extension on CPU. Its capability checks and its thresholds live here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .operands import DTYPES, backward_in_cpp, forward_in_cpp, operand_refusal

_C: ModuleType | None = None
_load_error = ""
try:
    _C = import_module("fastpeft._C")
except ImportError as error:
    _load_error = str(error)

NAME = "native"
DEVICE = "cpu"  # where the self-check runs it

# Up to so many tokens, while they fit half a first-level cache, dot products with the rows of W beat any other plan.
FEW_TOKENS = {torch.bfloat16: 4, torch.float32: 8, torch.float16: 16}
FEW_TOKENS_BYTES = 16384
FEW_TOKENS_FOUR_BIT = 8  # the same of a 4-bit W, at any size: each weight is decoded once for all of them
# Where the base product and the low-rank part share their accumulators (docs/kernels.md): at every measured shape.
ONE_ACCUMULATOR = ("avx512",)
# With AMX the vendor's bfloat16 product adds onto the low-rank part at no cost.
LOW_RANK_FIRST = ("amx", "emulated_amx")


@lru_cache
def _float16_products() -> bool:
    """Whether the vendor's float16 product is fast here; without the instructions it is slower than float32's."""
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def unavailable() -> str | None:
    """Why this backend cannot run on this machine at all; None when it can."""
    if _C is None:
        return f"the C++ extension is not built ({_load_error}); `python -m fastpeft build` builds it"
    return None


def detail() -> str:
    """What ``fastpeft info`` says of it where it is available."""
    assert _C is not None
    return f"{_C.isa()} kernels (this machine runs: {', '.join(_C.isas())})"


def refuses(op: str, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> str | None:
    """Why this backend cannot take this call; None when it can. ``x`` stands for ``dy`` in a backward op."""
    if _C is None:
        return unavailable()
    if x.device.type != "cpu":
        return f"it runs on CPU, and x is on {x.device}"
    return operand_refusal(x, weight, A, B)


def worth_a_warning(x: Tensor) -> bool:
    """Whether a user should hear once that calls like this one are refused."""
    return _C is None and x.device.type == "cpu" and x.dtype in DTYPES


def lora_linear(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See ops.py."""
    assert _C is not None
    return _C.lora_linear(*forward_in_cpp(*args), _forward_plan(*args))


def with_gradient(*args: Any) -> Tensor:
    """``y`` of :func:`lora_linear` with an autograd node in C++."""
    assert _C is not None
    x, weight, quant, _, _, _, B, c, *_ = args
    plans = _forward_plan(*args), _plan(x.dtype, weight, quant, B[0].shape[0], bool(c))
    return _C.lora_linear_with_gradient(*forward_in_cpp(*args), *plans)


def lora_linear_backward(*args: Any) -> list[Tensor]:
    """See ops.py."""
    assert _C is not None
    dy, _, weight, quant, _, _, B, c, *_ = args
    return _C.lora_linear_backward(*backward_in_cpp(*args), _plan(dy.dtype, weight, quant, B[0].shape[0], bool(c)))


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
    assert _C is not None
    return _C.dora_norm(weight, quant, blocksize, A, B, scaling, dtype)


def fingerprint(tensor: Tensor, every: int = 1) -> int | None:
    """64 bits that depend on the values of every n-th element (rows one after the other); None where nothing reads
    them cheaply. Version counters do not see what is written through ``.data`` or through another view's storage."""
    if _C is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return _C.fingerprint(tensor, every)


def _few_tokens(x: Tensor, weight: Tensor, quant: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor]) -> bool:
    """Whether one sweep of dot products over the rows of W serves the call best: generation."""
    rows = x.numel() // A[0].shape[1]
    if quant:
        fits = rows <= FEW_TOKENS_FOUR_BIT
    else:
        fits = rows == 1 or (rows <= FEW_TOKENS[x.dtype] and x.numel() * x.itemsize <= FEW_TOKENS_BYTES)
    return rows > 0 and fits and all(t.is_contiguous() for t in (weight, *A, *B))


def _forward_plan(*args: Any) -> object:
    """How ``lora_linear`` with these arguments is computed."""
    assert _C is not None
    x, weight, quant, _, _, A, B, c, _, _, seed, *_ = args
    if _few_tokens(x, weight, quant, A, B) and (not c or (len(c) == 1 and seed is None)):
        return _C.Plan.dots
    return _plan(x.dtype, weight, quant, A[0].shape[1], bool(c))


def _plan(dtype: torch.dtype, weight: Tensor, quant: Sequence[Tensor], contracted: int, dora: bool) -> object:
    """How the product with W, contracted over so many elements, and the low-rank part are computed."""
    assert _C is not None
    isa = _C.isa()
    if dtype == torch.bfloat16:
        fits = contracted % 2 == 0 and (quant or 1 in weight.stride()) and _C.has_base_product()
        if fits and (quant or isa in ONE_ACCUMULATOR):
            return _C.Plan.one_accumulator
    if quant:
        return _C.Plan.vendor_float32
    if dtype == torch.bfloat16 and isa in LOW_RANK_FIRST and not dora:  # DoRA scales the base product: it comes first
        return _C.Plan.vendor_last
    if dtype == torch.float16 and not _float16_products():
        return _C.Plan.vendor_float32
    return _C.Plan.vendor_first

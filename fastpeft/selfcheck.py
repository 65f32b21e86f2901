"""Whether each backend computes what the equations say on this machine: a short check that ``fastpeft info`` shows.

Each result is compared with the reference in float64 and passes by the rule of judge.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import ops
from .call import Adapters, ForwardCall, GroupedCall, Weight
from .dispatch import BACKENDS, named
from .dropout import dropout_keep, dropout_scale, dropout_seeds
from .judge import allowed_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens M, outputs N, inputs K, rank r, dropout: an even shape, an odd one, a long sum over K, a long sum over M.
CASES = ((40, 96, 64, 8, 0.0), (33, 100, 257, 3, 0.1), (64, 64, 4096, 16, 0.0), (4096, 64, 64, 16, 0.0))
# The rows of each expert, N, K, r, dropout: some and none, then few rows of long sums. Sizes are such as GPUs take.
EXPERTS = (((9, 0, 40, 1), 96, 64, 8, 0.1), ((2, 5, 0, 1, 8), 64, 1024, 16, 0.0))
SCALING = 2.0
_FLOATING = ("x", "weight", "bias", "A", "B", "dy")


@dataclass(frozen=True)
class Verdict:
    """One backend in one dtype.

    Attributes:
        share: the worst error over all cases and results as a share of the error that is allowed; above 1 is wrong.
        failure: why the backend did not compute anything; empty when it did.
        no_experts: why it leaves experts to another backend; empty where it takes them.
    """

    backend: str
    dtype: torch.dtype
    share: float
    failure: str = ""
    no_experts: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.share <= 1.0


@dataclass(frozen=True)
class _Call:
    """Of one layer, or of experts whose weights are stacked, with the bounds of their rows."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor
    dropout_p: float
    seed: Tensor | None
    offsets: Tensor | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> _Call:
        moved: dict[str, Any] = {name: getattr(self, name).to(device, dtype) for name in _FLOATING}
        for name in ("seed", "offsets"):
            tensor = getattr(self, name)
            moved[name] = tensor if tensor is None else tensor.to(device)
        return replace(self, **moved)


def self_check() -> list[Verdict]:
    """A verdict for each backend that is available here and each dtype. Leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = [_make_call(*case) for case in (*CASES, *EXPERTS)]
    available = [backend for backend in BACKENDS if backend.unavailable() is None]
    return [
        _verdict(backend.name, backend.device, dtype, [call.to(dtype) for call in calls])
        for backend in available
        for dtype in DTYPES
    ]


def _make_call(rows: int | Sequence[int], N: int, K: int, r: int, p: float) -> _Call:
    """Of a layer with so many rows, or of experts with so many each."""
    counts = () if isinstance(rows, int) else rows
    stack, M = (len(counts),) if counts else (), rows if isinstance(rows, int) else sum(counts)
    return _Call(
        x=torch.randn(M, K),
        weight=torch.randn(*stack, N, K) / K**0.5,
        bias=torch.randn(*stack, N),
        A=torch.randn(*stack, r, K) / K**0.5,
        B=torch.randn(*stack, N, r) / r**0.5,
        dy=torch.randn(M, N),
        dropout_p=p,
        seed=dropout_seeds(1, torch.device("cpu")) if p else None,
        offsets=torch.tensor([0, *accumulate(counts)]) if counts else None,
    )


def _verdict(backend: str, device: str, dtype: torch.dtype, calls: list[_Call]) -> Verdict:
    """The oracle computes on the CPU, eager where the backend does: the vendor's products differ."""

    def fused(call: _Call) -> Tensor:
        return _op(call, backend)

    def oracle(call: _Call) -> Tensor:
        return _op(call, "reference")

    share, no_experts = 0.0, ""
    for call in calls:
        try:
            there = call.to(dtype, device)
            refused = call.offsets is not None and named(backend).refuses(there.x, there.weight, [there.A, there.B])
            if refused:
                no_experts = refused
                continue
            results = _results(fused, there)
        except Exception as failure:
            return Verdict(backend, dtype, share, f"{type(failure).__name__}: {failure}")
        expected = _results(oracle, call.to(torch.float64))
        for result, truth, eager in zip(results, expected, _results(_eager, there), strict=True):
            allowed = allowed_error((eager - truth).abs().max(), truth.abs().max(), dtype)
            error = (result - truth).abs().max()
            share = max(share, (error / allowed).nan_to_num(torch.inf, torch.inf).item())
    return Verdict(backend, dtype, share, no_experts=no_experts)


def _results(function: Callable[[_Call], Tensor], call: _Call) -> list[Tensor]:
    """``y`` and the gradients of x, bias, A and B, on the CPU."""
    leaves = {name: getattr(call, name).detach().requires_grad_() for name in ("x", "bias", "A", "B")}
    y = function(replace(call, **leaves))
    grads = torch.autograd.grad(y, list(leaves.values()), call.dy)
    return [result.detach().cpu() for result in (y, *grads)]


def _op(call: _Call, backend: str) -> Tensor:
    adapters = Adapters([call.A], [call.B], [], [SCALING], [call.dropout_p], call.seed)
    weight = Weight.of(call.weight)
    if call.offsets is None:
        return ops.lora_linear(*ForwardCall(call.x, weight, call.bias, adapters, False).flat(), backend)[0]
    return ops.lora_grouped_linear(
        *GroupedCall(call.x, call.offsets, weight, call.bias, adapters, False).flat(), backend
    )[0]


def _eager(call: _Call) -> Tensor:
    """As PEFT writes it, of experts one by one."""
    dropped = call.x
    if call.seed is not None:
        rows, columns = call.x.shape
        dropped = dropped * dropout_keep(call.seed[0], rows, columns, call.dropout_p) * dropout_scale(call.dropout_p)
    if call.offsets is None:
        return _eager_layer(call.x, dropped, call.weight, call.bias, call.A, call.B)
    counts = call.offsets.diff().tolist()
    experts = zip(call.x.split(counts), dropped.split(counts), call.weight, call.bias, call.A, call.B, strict=True)
    return torch.cat([_eager_layer(*expert) for expert in experts])


def _eager_layer(x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return linear(x, weight, bias) + linear(linear(dropped, A), B) * SCALING

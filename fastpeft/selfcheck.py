"""Whether each backend computes what the equations say on this machine: a short check that ``fastpeft info`` shows.

Each result is compared with the reference in float64 and passes by the rule of judge.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import ops
from .call import Adapters, ForwardCall, Weight
from .dispatch import BACKENDS
from .dropout import dropout_keep, dropout_scale, dropout_seeds
from .judge import allowed_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens M, outputs N, inputs K, rank r, dropout: an even shape, an odd one, a long sum over K, a long sum over M.
CASES = ((40, 96, 64, 8, 0.0), (33, 100, 257, 3, 0.1), (64, 64, 4096, 16, 0.0), (4096, 64, 64, 16, 0.0))
SCALING = 2.0


@dataclass(frozen=True)
class Verdict:
    """One backend in one dtype.

    Attributes:
        share: the worst error over all cases and results as a share of the error that is allowed; above 1 is wrong.
        failure: why the backend did not compute anything; empty when it did.
    """

    backend: str
    dtype: torch.dtype
    share: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.share <= 1.0


@dataclass(frozen=True)
class _Call:
    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor
    dropout_p: float
    seed: Tensor | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> _Call:
        tensors = {name: getattr(self, name).to(device, dtype) for name in ("x", "weight", "bias", "A", "B", "dy")}
        return replace(self, **tensors, seed=None if self.seed is None else self.seed.to(device))


def self_check() -> list[Verdict]:
    """A verdict for each backend that is available here and each dtype. Leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = [_make_call(*case) for case in CASES]
    available = [backend for backend in BACKENDS if backend.unavailable() is None]
    return [
        _verdict(backend.name, backend.device, dtype, [call.to(dtype) for call in calls])
        for backend in available
        for dtype in DTYPES
    ]


def _make_call(M: int, N: int, K: int, r: int, p: float) -> _Call:
    return _Call(
        x=torch.randn(M, K),
        weight=torch.randn(N, K) / K**0.5,
        bias=torch.randn(N),
        A=torch.randn(r, K) / K**0.5,
        B=torch.randn(N, r) / r**0.5,
        dy=torch.randn(M, N),
        dropout_p=p,
        seed=dropout_seeds(1, torch.device("cpu")) if p else None,
    )


def _verdict(backend: str, device: str, dtype: torch.dtype, calls: list[_Call]) -> Verdict:
    """The oracle computes on the CPU, eager where the backend does: the vendor's products differ."""

    def fused(call: _Call) -> Tensor:
        return _op(call, backend)

    def oracle(call: _Call) -> Tensor:
        return _op(call, "reference")

    share = 0.0
    for call in calls:
        try:
            there = call.to(dtype, device)
            results = _results(fused, there)
        except Exception as failure:
            return Verdict(backend, dtype, share, f"{type(failure).__name__}: {failure}")
        expected = _results(oracle, call.to(torch.float64))
        for result, truth, eager in zip(results, expected, _results(_eager, there), strict=True):
            allowed = allowed_error((eager - truth).abs().max(), truth.abs().max(), dtype)
            error = (result - truth).abs().max()
            share = max(share, (error / allowed).nan_to_num(torch.inf, torch.inf).item())
    return Verdict(backend, dtype, share)


def _results(function: Callable[[_Call], Tensor], call: _Call) -> list[Tensor]:
    """``y`` and the gradients of x, bias, A and B, on the CPU."""
    leaves = {name: getattr(call, name).detach().requires_grad_() for name in ("x", "bias", "A", "B")}
    y = function(replace(call, **leaves))
    grads = torch.autograd.grad(y, list(leaves.values()), call.dy)
    return [result.detach().cpu() for result in (y, *grads)]


def _op(call: _Call, backend: str) -> Tensor:
    adapters = Adapters([call.A], [call.B], [], [SCALING], [call.dropout_p], call.seed)
    return ops.lora_linear(*ForwardCall(call.x, Weight.of(call.weight), call.bias, adapters, False).flat(), backend)[0]


def _eager(call: _Call) -> Tensor:
    """As PEFT writes it."""
    x = call.x
    if call.seed is not None:
        x = x * dropout_keep(call.seed[0], x.shape[0], x.shape[1], call.dropout_p) * dropout_scale(call.dropout_p)
    return linear(call.x, call.weight, call.bias) + linear(linear(x, call.A), call.B) * SCALING

"""Who is measured (the frozen base, PEFT, fastpeft, …): each turns a case's frozen base into a model of its own and
offers its phases (forward, a whole step) to the clock.

A new one is a new :class:`Contestant` in :data:`CONTESTANTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.experiments.four_bit import to_four_bit
from fastpeft.experiments.models import FOUR_BIT_METHODS, adapter_config

from .cases import DTYPES, SEED, Case


@dataclass(frozen=True)
class Contestant:
    """``adapt`` puts adapters into the frozen base; the flags say how the result is called.

    ``shares``: its layers share inputs, and would not while what they keep goes through hooks that count it.
    """

    name: str
    label: str
    adapt: Callable[[nn.Module, Case], nn.Module]
    autocast: bool = False
    compiled: bool = False
    float32: bool = False
    shares: bool = False

    def refuses(self, case: Case) -> str | None:
        """Why this contestant has no place in ``case``; None when it has."""
        if self.autocast and case.dtype == "fp32":
            return "autocast computes in a low precision, and the case is fp32"
        return None

    def setup(self, case: Case) -> Runner:
        """A fresh model on the case's inputs."""
        case = replace(case, dtype="fp32") if self.float32 else case  # type: ignore[type-var]
        return Runner(case, self.adapt(case.base(), case), autocast=self.autocast, compiled=self.compiled)


class Runner:
    """One contestant's model on one case's inputs. Its phases are what the clock times.

    ``forward``: training mode, with autograd. ``step``: forward and backward; the frozen base computes ``dx`` alone,
    the others the gradients of A and B too. ``generate``: one token, eval mode, no autograd.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        *,
        autocast: bool = False,
        compiled: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``dtype``: what the case's floating inputs are converted to, where it is not the case's own."""
        self.case, self.model = case, model
        entry = case.entry(model)
        self.entry: nn.Module = torch.compile(entry, dynamic=False) if compiled else entry  # type: ignore[assignment]
        self.x, self.dy = case.inputs()
        if dtype is not None and self.x.is_floating_point():
            self.x = self.x.detach().to(dtype).requires_grad_()
            self.dy = None if self.dy is None else self.dy.to(dtype)
        self.adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._autocast = DTYPES[case.dtype] if autocast else None

    def phase(self, name: str) -> Callable[[], Any]:
        """Puts the model into the phase's mode and returns what to time."""
        self.model.train(name != "generate")
        return {"forward": self.forward, "step": self.step, "generate": self.generate}[name]

    def forward(self) -> Tensor:
        with self._context():
            return self.case.train(self.entry, self.x)

    def step(self) -> None:
        self.x.grad = None
        for parameter in self.adapters.values():
            parameter.grad = None
        self.forward().backward(self.dy)
        torch.autograd.graph.increment_version(self.adapters.values())  # as an optimizer does: DoRA's norm is stale

    def generate(self) -> Tensor:
        with torch.no_grad():
            return self.predict(self.case.token(self.x))

    def predict(self, x: Tensor) -> Tensor:
        """Outputs for ``x`` in the mode that the model is in."""
        with self._context():
            return self.case.predict(self.entry, x)

    def _context(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.x.device.type, dtype=self._autocast)


def frozen(base: nn.Module, case: Case) -> nn.Module:
    """The base as it is."""
    return base


def with_peft(base: nn.Module, case: Case, *, dense: bool = False) -> nn.Module:
    """PEFT as it comes: float32 adapters, bitsandbytes' layers for 4-bit weights (the base beside it stays dense).

    B is random and AdaLoRA's E is 1, so that every gradient is worth comparing and DoRA's magnitude is not the norm
    any more.

    Args:
        dense: 4-bit weights are decoded into dense ones, for the oracle.
    """
    from peft import get_peft_model

    if case.method in FOUR_BIT_METHODS:
        to_four_bit(base, lambda name: name in case.target_modules, decoded=dense)
    settings = {"lora_dropout": case.dropout, "target_modules": list(case.target_modules)}
    config = adapter_config(case.method, case.rank, {"total_step": 1}, **settings)
    torch.manual_seed(SEED)
    model: nn.Module = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "lora_E" in name:
            nn.init.ones_(parameter)
    return model


def with_fastpeft(base: nn.Module, case: Case) -> nn.Module:
    """The same PEFT model, patched.

    Raises:
        RuntimeError: a layer was left to PEFT, so that its time would be PEFT's.
    """
    import fastpeft

    model = with_peft(base, case)
    report = fastpeft.patch(model)
    if report.left_to_peft:
        raise RuntimeError(f"fastpeft did not fuse every layer of {case.shape}:\n{report}")
    return model


def with_shared_inputs(base: nn.Module, case: Case) -> nn.Module:
    """The same, patched so that layers that read the same x compute together; they are known after the first step."""
    import fastpeft

    model = with_fastpeft(base, case)
    fastpeft.patch(model, share_inputs=True)
    return model


BASE = Contestant("base", "base", frozen)
PEFT = Contestant("peft", "PEFT", with_peft)
PEFT_AUTOCAST = Contestant("peft-autocast", "PEFT, autocast", with_peft, autocast=True)
PEFT_COMPILED = Contestant("peft-compiled", "PEFT, compiled", with_peft, compiled=True)
FASTPEFT = Contestant("fastpeft", "fastpeft", with_fastpeft)
FASTPEFT_COMPILED = Contestant("fastpeft-compiled", "compiled fastpeft", with_fastpeft, compiled=True)
# Beside them in models of LoRA over dense or 4-bit weights, which alone share inputs.
FASTPEFT_SHARED = Contestant("fastpeft-shared", "shared inputs", with_shared_inputs, shares=True)
SHARING_METHODS = ("lora", "qlora")
# Beside them in bfloat16, where the CPU has no product of it: what the same layer takes in float32.
BASE_FLOAT32 = Contestant("base-float32", "base, float32", frozen, float32=True)
CONTESTANTS = (BASE, PEFT, PEFT_AUTOCAST, PEFT_COMPILED, FASTPEFT, FASTPEFT_COMPILED)

"""Which backend a layer would run on and why the others would not: the words that a user reads."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import dispatch
from .functional import compute_dtype
from .nf4 import FourBit, weight_operands
from .nn import LoRALinear

_PASSES = {"forward": "lora_linear", "backward": "lora_linear_backward"}
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` it. ``verdicts`` holds the text for each layer's name."""

    verdicts: dict[str, str]

    def __str__(self) -> str:
        return grouped(self.verdicts)


def explain(layer_or_model: nn.Module) -> Explanation:
    """For every LoRA layer: the backend that would run it and why each other one would not, or why PEFT runs it.

    The answer is for an input on the device of the layer's weight and in its dtype (in autocast's where that is on).

    Args:
        layer_or_model: a :class:`fastpeft.nn.LoRALinear`, a PEFT layer, or any module that holds some.

    Raises:
        TypeError: it is no module. ValueError: it holds no LoRA layer.
    """
    if not isinstance(layer_or_model, nn.Module):
        raise TypeError(f"layer_or_model must be a torch.nn.Module, got {type(layer_or_model).__name__}")
    verdicts = {}
    for name, module in layer_or_model.named_modules():
        verdict = _verdict_on(module)
        if verdict is not None:
            verdicts[name or type(module).__name__] = verdict
    if not verdicts:
        raise ValueError(
            "layer_or_model must be or hold a fastpeft.nn.LoRALinear or a PEFT layer, "
            f"got a {type(layer_or_model).__name__} without any"
        )
    return Explanation(verdicts)


def backend_refusals(
    op: str, weight: Tensor | FourBit, A: Sequence[Tensor], B: Sequence[Tensor]
) -> dict[str, str | None]:
    """:func:`fastpeft.dispatch.refusals` for one token in the dtype that a layer with this ``weight`` computes in."""
    x = torch.empty((1, weight.shape[1]), dtype=compute_dtype(weight), device=weight.device)
    return dispatch.refusals(op, x, weight_operands(weight)[0], A, B)


def grouped(texts: Mapping[str, str]) -> str:
    """The texts, each once, under the number and the names of the layers that it is about."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    return "\n".join(f"{len(group)} × {text}\n    {_listed(group)}" for text, group in names.items())


def _listed(names: Sequence[str]) -> str:
    hidden = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")


def _verdict_on(module: nn.Module) -> str | None:
    if isinstance(module, LoRALinear):
        return _backend_verdict(module.matrix(), [module.lora_A], [module.lora_B], module.backend)
    if "peft" not in sys.modules:  # then no module can be PEFT's
        return None
    from .peft import layers

    if not layers.is_peft_layer(module):
        return None
    operands = layers.operands_or_reason(module)
    if isinstance(operands, str):
        return f"PEFT: {operands}"
    if not isinstance(module, layers.FusedForward):
        return "PEFT: the layer is not patched; fastpeft.patch(model) would fuse it"
    return _backend_verdict(operands.weight, operands.A, operands.B, module.fastpeft_backend)


def _backend_verdict(weight: Tensor | FourBit, A: Sequence[Tensor], B: Sequence[Tensor], requested: str | None) -> str:
    refusals = {name: backend_refusals(op, weight, A, B) for name, op in _PASSES.items()}
    lines = {name: _choice(found, requested) for name, found in refusals.items()}
    text = "; ".join(f"{name} {line}" for name, line in lines.items())
    if len(set(lines.values())) == 1:
        text = lines["forward"]
    backend = requested or _chosen(refusals["forward"])
    plans = _plans(weight, backend) if refusals["forward"][backend] is None else ""
    return f"{text}; {plans}" if plans else text


def _plans(weight: Tensor | FourBit, backend: str) -> str:
    """What a backend that has several ways to compute a layer says of them."""
    describe = getattr(dispatch.named(backend), "describe", None)
    if describe is None:
        return ""
    return describe(weight.shape[1], weight.shape[0], compute_dtype(weight), weight.device)


def _chosen(refusals: Mapping[str, str | None]) -> str:
    return next(name for name, reason in refusals.items() if reason is None)


def _choice(refusals: Mapping[str, str | None], requested: str | None) -> str:
    if requested is not None:
        reason = refusals[requested]
        return f"{requested}: asked for by name" + ("" if reason is None else f", and raises: {reason}")
    chosen = _chosen(refusals)
    others = [
        f"{name} {'comes later in the order of preference' if reason is None else f'refuses: {reason}'}"
        for name, reason in refusals.items()
        if name != chosen
    ]
    return f"{chosen} runs it; {'; '.join(others)}"

"""The words for which backend would run a layer and why the others would not: what ``explain`` and the report print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import dispatch
from .call import Adapters, Weight
from .four_bit import FourBit
from .functional import compute_dtype

_NAMES_SHOWN = 3


def backend_refusals(weight: Tensor | FourBit, adapters: Adapters) -> dict[str, str | None]:
    """:func:`fastpeft.dispatch.refusals` for one token in the dtype that a layer with this ``weight`` computes in."""
    x = torch.empty((1, weight.shape[1]), dtype=compute_dtype(weight), device=weight.device)
    return dispatch.refusals(x, Weight.of(weight).data, adapters.factors)


def backend_verdict(weight: Tensor | FourBit, adapters: Adapters, requested: str | None) -> str:
    """The backend that would run a layer, why the others would not, and how it computes."""
    refusals = backend_refusals(weight, adapters)
    chosen = _first(refusals) if requested is None else dispatch.named(requested).name
    text = _choice(refusals, chosen) if requested is None else _request(requested, refusals[chosen])
    how = ""
    if refusals[chosen] is None:
        how = dispatch.named(chosen).describe(Weight.of(weight), adapters, compute_dtype(weight))
    return f"{text}; {how}" if how else text


def grouped(texts: Mapping[str, str]) -> str:
    """The texts, each once, under the number and the names of the layers that it is about."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    return "\n".join(f"{len(group)} × {text}\n    {_listed(group)}" for text, group in names.items())


def _listed(names: Sequence[str]) -> str:
    hidden = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")


def _first(refusals: Mapping[str, str | None]) -> str:
    return next(name for name, reason in refusals.items() if reason is None)


def _request(requested: str, reason: str | None) -> str:
    return f"{requested}: asked for by name" + ("" if reason is None else f", and raises: {reason}")


def _choice(refusals: Mapping[str, str | None], chosen: str) -> str:
    others = [
        f"{name} {'comes later in the order of preference' if reason is None else f'refuses: {reason}'}"
        for name, reason in refusals.items()
        if name != chosen
    ]
    return f"{chosen} runs it; {'; '.join(others)}"

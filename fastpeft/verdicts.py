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


def backend_refusals(weight: Tensor | FourBit | None, adapters: Adapters) -> dict[str, str | None]:
    """:func:`fastpeft.dispatch.refusals` for one token in the dtype that a layer with this ``weight`` computes in;
    where the layer's base multiplies by itself, in the adapters'."""
    return dispatch.refusals(*_one_call(weight, adapters), adapters.factors)


def _one_call(weight: Tensor | FourBit | None, adapters: Adapters) -> tuple[Tensor, Tensor]:
    like = adapters.A[0] if weight is None else weight
    x = torch.empty((1, adapters.shape[1]), dtype=compute_dtype(like), device=like.device)
    return x, (Weight.none(x) if weight is None else Weight.of(weight)).data


def backend_verdict(weight: Tensor | FourBit | None, adapters: Adapters, requested: str | None) -> str:
    """The backend that would run a layer, why the others would not, and how it computes."""
    refusals = backend_refusals(weight, adapters)
    chosen = _first(refusals) if requested is None else dispatch.named(requested).name
    text = _choice(refusals, chosen) if requested is None else _request(requested, refusals[chosen])
    if weight is None:
        return f"{text}; the base layer multiplies by itself"
    how = ""
    if refusals[chosen] is None:
        how = dispatch.named(chosen).describe(Weight.of(weight), adapters, compute_dtype(weight))
    return f"{text}; {how}" if how else text


def runner(requested: str | None) -> str:
    """Who runs what has more than one call of a backend, in words."""
    return "the fastest backend that accepts the call" if requested is None else f"{requested}, asked for by name,"


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

"""Variants of PEFT's LoRA whose product is LoRA's, with an A that is made in each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.lora import variants
from torch import Tensor

from ..reference import wide_dtype
from .stock import Stock

Maker = Callable[[Any, str, Tensor], Tensor | str]
"""Of a layer, an adapter's name and its A: what is multiplied with in its place, or why PEFT has to run the adapter."""


def maker_of(variant: Any) -> Maker | None:
    """None of a variant that computes something else, or whose forward was replaced."""
    kind = type(variant)
    make = _MAKERS.get(kind.__qualname__)
    if make is None or getattr(variants, kind.__qualname__, None) is not kind:
        return None
    return make if _stocks.setdefault(kind, Stock((kind, "forward"))).replaced() is None else None


def _mica(layer: Any, name: str, A: Tensor) -> Tensor:
    """MiCA: an initialisation, and a B that does not learn."""
    return A


def _kasa(layer: Any, name: str, A: Tensor) -> Tensor | str:
    """KaSA (Wang et al., 2024): the learned singular values times A's rows."""
    if name in layer._lora_kasa_truncation_deferred:
        return "has yet to cut its base weight"
    wide = wide_dtype(A.dtype)
    return A.to(wide) * layer.lora_diag[name].to(wide).unsqueeze(1)


_MAKERS: dict[str, Maker] = {
    "MiCALinearVariant": _mica,
    "MiCAEmbeddingVariant": _mica,
    "KasaLinearVariant": _kasa,
}
_stocks: dict[type[Any], Stock] = {}

"""Layers of the plainest kind, read in one step in C++ (csrc/plain_layer.h): torch's Linear with one active LoRA, DoRA
or AdaLoRA adapter and nothing beside. To read such a layer piece by piece, as operands.py does for all kinds and with
reasons, takes as long as the product of one token."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import extension
from ..call import Adapters
from ..ops import is_transformed
from .base_layers import STOCK
from .operands import Operands, tokens_of
from .readers import DORA, Adapter, adalora_adapter, dora_factor, read_adalora
from .stock import Stock

_GLOBAL_HOOKS = [
    value for name, value in vars(torch_module).items() if name.startswith("_global_") and isinstance(value, dict)
]


def plain_layers(stock: Stock) -> Any:
    """What tells plain layers whose forward stands in for ``stock``; None where none can be told."""
    if extension.C is None or stock.replaced() or STOCK.replaced():
        return None
    DORA.replaced()  # what it finds replaced it does not know, and no layer of DoRA is plain then
    functions = [*stock.functions, *STOCK.functions]
    containers = nn.ModuleDict, nn.ParameterDict
    classes = nn.Linear, *containers, nn.Identity, nn.Dropout, DoraLinearVariant, DoraLinearLayer
    return extension.C.PlainLayers(*classes, _GLOBAL_HOOKS, functions, list(DORA.functions))


def read_plain(layer: Any, x: Any) -> Operands | None:
    """The operands of a call of a plain layer; None where the layer is another one, or a compiler or transform asks."""
    if torch.compiler.is_compiling() or layer.plain_layers is None or is_transformed():
        return None
    return _adalora(layer) if layer.method.read is read_adalora else _lora(layer, x)


def _adalora(layer: Any) -> Operands | None:
    found = layer.plain_layers.read_adalora(layer.__dict__)
    if found is None:
        return None
    weight, bias, A, B, E, ranknum, scaling, p = found
    A, B, factor, *_ = adalora_adapter(A, B, E, ranknum, scaling, p)
    return Operands(weight, bias, Adapters([A], [B], [], [factor], [p]))


def _lora(layer: Any, x: Any) -> Operands | None:
    found = layer.plain_layers.read_lora(layer.__dict__)
    if found is None:
        return None
    weight, bias, A, B, scaling, p, magnitude, name = found
    c: list[Tensor] = []
    if magnitude is not None:
        factor = dora_factor(layer, name, weight, Adapter(A, B, scaling, p), magnitude, tokens_of(x))
        if isinstance(factor, str):
            return None
        c.append(factor)
    return Operands(weight, bias, Adapters([A], [B], c, [scaling], [p]))

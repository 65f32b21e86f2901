"""Layers of the plainest kind, read and run in one step in C++ (csrc/plain_layer.h): torch's Linear with one active
LoRA adapter and nothing beside. To read such a layer piece by piece, as operands.py does for all kinds and with
reasons, takes as long as the product of one token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import extension, usual
from ..call import Adapters
from .base_layers import STOCK
from .stock import Stock

_GLOBAL_HOOKS = [getattr(torch_module, name) for name in vars(torch_module) if name.startswith("_global_")]


def plain_layers(stock: Stock) -> Any:
    """What tells plain layers whose forward stands in for ``stock``; None where none can be told."""
    if extension.C is None or stock.replaced() or STOCK.replaced():
        return None
    hooks = [hooks for hooks in _GLOBAL_HOOKS if isinstance(hooks, dict)]
    functions = [*stock.functions, *STOCK.functions]
    return extension.C.PlainLayers(nn.Linear, nn.ModuleDict, nn.Identity, nn.Dropout, hooks, functions)


def run(layer: Any, x: Any) -> Tensor | None:
    """PEFT's result of a plain layer's usual call; None where the layer has to be read, or the call is not usual."""
    operands = layer.plain_layers.read(layer.__dict__)
    if operands is None:
        return None
    weight, bias, A, B, scaling, p = operands
    return usual.lora_linear(x, weight, bias, Adapters([A], [B], [], [scaling], [p]), True, layer.fastpeft_backend)

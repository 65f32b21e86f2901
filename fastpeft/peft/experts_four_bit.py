"""Experts whose stacks bitsandbytes' ``replace_parameter_4bit`` has packed: a parametrization stands in the place of
the parameter, and makes a dense stack for whoever reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..four_bit import FourBit, from_bitsandbytes
from .base_layers import is_hooked

_PARAMETRIZE = "bitsandbytes.nn.parametrize"  # the module that puts it there


def packed_stack(module: Any, name: str) -> tuple[FourBit, torch.dtype] | str | None:
    """The 4 bits that bitsandbytes has put in a parameter's place, and the dtype that it decodes them to; or what is
    wrong with them."""
    making = _parametrizations(module).get(name)
    if making is None or len(making) != 1 or not _decodes(making[0]):
        return None
    state = making[0].quant_state
    try:
        packed = from_bitsandbytes(making.original, state)
    except (TypeError, ValueError) as error:
        return str(error)
    *experts, _, _ = packed.shape
    return (packed, state.dtype) if experts else f"their shape is {packed.shape}, of no stack"


def _parametrizations(module: Any) -> dict[str, Any]:
    found = module._modules.get("parametrizations")
    return {} if found is None else found._modules


def _decodes(making: nn.Module) -> bool:
    """Whether it is exactly bitsandbytes' parametrization of 4 bits."""
    kind = type(making)
    return kind.__module__ == _PARAMETRIZE and kind.__qualname__ == "Bnb4bitParametrization" and not is_hooked(making)


def holds_four_bits(module: Any) -> bool:
    """Whether bitsandbytes has packed a parameter of the experts."""
    return any(_decodes(each) for making in _parametrizations(module).values() for each in making)


def class_of(module: Any) -> type[Any]:
    """The experts' own, of which a parametrized one is a subclass that torch made."""
    kind = type(module)
    return kind.__bases__[0] if holds_four_bits(module) else kind


def calls_more_than_forward(module: Any) -> bool:
    """Whether calling the experts does more than their class's forward. Hooks of bitsandbytes' keep what it decodes as
    long as a call lasts, and do nothing else."""
    if type(module).forward is not class_of(module).forward:
        return True
    hooks = module._forward_pre_hooks, module._forward_hooks
    if not all(getattr(hook, "__module__", None) == _PARAMETRIZE for some in hooks for hook in some.values()):
        return True
    return bool(module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__)

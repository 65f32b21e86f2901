"""What one call of a PEFT layer computes with, read from the layer, or the reason why PEFT has to run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..call import Adapters
from ..four_bit import FourBit
from .base_layers import Base, read_base
from .methods import Method
from .readers import Adapter


class Operands(NamedTuple):
    """What a fused layer hands to :func:`fastpeft.functional.adapted_linear`, or to :func:`fastpeft.functional.update`
    where the base layer multiplies by itself: then there is no weight, and the bias is the adapters' own. The scalings
    may be tensors."""

    weight: Tensor | FourBit | None
    bias: Tensor | None
    adapters: Adapters


def read_operands(layer: Any, adapters: Sequence[str], method: Method, tokens: int) -> Operands | str:
    """The operands of one call of a PEFT layer with these adapters, or why PEFT has to run it."""
    reason = state_reason(layer)
    if reason is not None:
        return reason
    base = read_base(layer, method.base_multiplies)
    if isinstance(base, str):
        return base
    bias = base.bias
    found: list[Adapter] = []
    for name in adapters:
        adapter = method.read(layer, name, base, tokens)
        if isinstance(adapter, str):
            return f"its adapter {name!r} {adapter}"
        if adapter is None:  # it is one of other layers
            continue
        found.append(adapter)
        if adapter.bias is not None:
            bias = adapter.bias if bias is None else bias + adapter.bias
    if not found:
        return "none of the active adapters is in this layer"
    c = [adapter.c for adapter in found if adapter.c is not None]
    if c and len(found) > 1:
        reason = _chain_reason(layer, adapters, found, base)
        if reason is not None:
            return reason
    scalings, ps = [adapter.scaling for adapter in found], [adapter.dropout_p for adapter in found]
    return Operands(base.weight, bias, Adapters([a.A for a in found], [a.B for a in found], c, scalings, ps))


def tokens_of(x: Any) -> int:
    """Of an input ``[..., K]``."""
    return x.numel() // max(1, x.shape[-1]) if isinstance(x, Tensor) and x.dim() else 1


def state_reason(layer: Any) -> str | None:
    """Why PEFT has to run a layer, whatever its base and its adapters are."""
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the base weight"
    if _has_any_global_hook():
        return "a hook on all modules is registered"
    if _are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if not torch.compiler.is_compiling() and _get_tracing_state() is not None:
        return "torch.jit traces it"
    return None


def _chain_reason(layer: Any, adapters: Sequence[str], found: Sequence[Adapter], base: Base) -> str | None:
    """Of several active adapters, at least one with DoRA, each acts on the result of those before it, in a way that
    depends on its dropout: why PEFT has to run them."""
    if any(adapter.c is None for adapter in found):
        return "DoRA and LoRA adapters are active together"
    if base.weight is None:
        return f"several DoRA adapters are active, and {base.unread}"
    used = [layer.lora_dropout[name] for name in adapters if name in layer.lora_dropout]
    for dropout, adapter in zip(used, found, strict=True):
        if (type(dropout) is nn.Dropout and layer.training) != (adapter.dropout_p > 0):
            return "several DoRA adapters are active, and dropout is switched off in one of them alone"
    return None

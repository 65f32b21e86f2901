"""What all fused classes have in common, whichever class of PEFT's they stand in for."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..four_bit import FourBit
from .stock import Stock


class Fused:
    """A class with a ``forward`` of fastpeft's, and all the rest of PEFT's."""

    fastpeft_backend: str | None = None
    peft_class: type[Any]
    stock: Stock

    @classmethod
    def read(cls, layer: Any) -> Any:
        """What a call of ``layer``, fused or not yet, computes with; a string where PEFT has to run it says why."""
        raise NotImplementedError

    @classmethod
    def operands_or_reason(cls, layer: Any) -> Any:
        """The same, once nothing stands in the place of the layer's forward or of PEFT's."""
        return _replaced_on_the_layer(layer) or cls.stock.replaced() or cls.read(layer)

    def _by_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return result

    def _get_name(self) -> str:
        return self.peft_class.__name__  # repr shows PEFT's name, as state_dict keys and parameters are PEFT's

    def extra_repr(self) -> str:
        """Whether the layer is fused as it stands, or why not."""
        operands = self.operands_or_reason(self)
        return f"left to PEFT: {operands}" if isinstance(operands, str) else "fused by fastpeft"


def is_plain_input(x: Any, weight: Tensor | FourBit | None) -> bool:
    """False where PEFT computes something else than the op, or raises an error that is PEFT's to raise."""
    if not isinstance(x, Tensor) or x.is_nested or x.is_meta or x.layout is not torch.strided:
        return False
    if weight is None or isinstance(weight, FourBit):
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if x.dtype == weight.dtype:
        return True
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)


def _replaced_on_the_layer(layer: Any) -> str | None:
    """Whether calling the layer leads elsewhere than to its class's forward."""
    if "forward" not in layer.__dict__:
        return None
    called = layer.__dict__.get("_old_forward", layer.__dict__["forward"])
    own: Any = type(layer)
    if isinstance(called, MethodType) and called.__self__ is layer and called.__func__ is own.forward:
        return None
    return "its forward was replaced by another library"

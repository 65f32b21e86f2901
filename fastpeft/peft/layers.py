"""The classes that PEFT's layers are given: their forward is one call of :mod:`fastpeft.functional`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from peft.tuners.adalora.layer import SVDLinear as PeftSVDLinear
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..nf4 import FourBit
from .operands import Operands, class_name, read_operands

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as _Layer
else:
    _Layer = object  # which of PEFT's classes it is, each fused class says


class FusedForward(_Layer):
    """The forward of every fused class: one call of :mod:`fastpeft.functional` in the place of PEFT's."""

    fastpeft_backend: str | None = None
    peft_class: type[Any]
    mixes_batches = True  # whether PEFT's forward takes adapter_names

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's result, ``[..., K]`` to ``[..., N]``; from PEFT's own ``forward`` where the call cannot be fused."""
        adapter_names = kwargs.get("adapter_names")
        if args or len(kwargs) > (self.mixes_batches and adapter_names is not None):
            return super().forward(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed_batch(x, adapter_names)
        operands = read_operands(self, self.active_adapters)
        if (
            isinstance(operands, str)
            or not _is_plain_input(x, operands.weight)
            or (operands.c and x.dim() < 2)  # PEFT makes [1, N] of it
        ):
            return super().forward(x)
        return self._run(operands, x, None)

    def _run(self, operands: Operands, x: Tensor, adapter_index: Tensor | None) -> Tensor:
        if not isinstance(operands.weight, FourBit):
            return operands(x, adapter_index, self.fastpeft_backend)
        base: Any = self._modules["base_layer"]
        if not base.compute_type_is_set:  # as the first forward of bitsandbytes' layer does
            base.set_compute_type(x)
            base.compute_type_is_set = True
        if base.compute_dtype in (None, x.dtype):
            return operands(x, adapter_index, self.fastpeft_backend)
        return operands(x.to(base.compute_dtype), adapter_index, self.fastpeft_backend).to(x.dtype)

    def _forward_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """``adapter_names`` has a name for each sample of ``x [samples, ..., K]``; ``"__base__"`` is no adapter."""
        self._check_forward_args(x, adapter_names=adapter_names)
        served = [name for name in dict.fromkeys(adapter_names) if name in self.lora_A and name != "__base__"]
        operands = read_operands(self, served)
        if (
            isinstance(operands, str)
            or x.dim() < 2
            or operands.c  # then each token has factors of its own,
            or any(self.lora_bias[name] for name in served)  # or the bias differs from token to token
            or not _is_plain_input(x, operands.weight)
        ):
            return super().forward(x, adapter_names=adapter_names)
        position = {name: i for i, name in enumerate(served)}
        index = torch.tensor([position.get(name, -1) for name in adapter_names], device=x.device)
        adapter_index = index.view(-1, *(1,) * (x.dim() - 2)).expand(x.shape[:-1])
        return self._run(operands, x, adapter_index)

    def extra_repr(self) -> str:
        """Whether the layer is fused as it stands, or why not."""
        operands = read_operands(self, self.active_adapters)
        return f"left to PEFT: {operands}" if isinstance(operands, str) else "fused by fastpeft"

    def _get_name(self) -> str:
        return self.peft_class.__name__  # repr shows PEFT's name, as state_dict keys and parameters are PEFT's


class FusedLinear(FusedForward, PeftLinear):
    """``peft.tuners.lora.layer.Linear``, fused."""

    peft_class = PeftLinear


class FusedSVDLinear(FusedForward, PeftSVDLinear):
    """``peft.tuners.adalora.layer.SVDLinear``, fused."""

    peft_class = PeftSVDLinear
    mixes_batches = False


def operands_or_reason(layer: BaseTunerLayer) -> Operands | str:
    """The operands of a call with the active adapters, or why PEFT runs it and would even if ``layer`` were patched."""
    if not isinstance(layer, FusedForward) and fused_class(type(layer)) is None:
        return f"{class_name(layer)} is no class that fastpeft fuses"
    return read_operands(layer, layer.active_adapters)


def is_peft_layer(module: nn.Module) -> TypeGuard[BaseTunerLayer]:
    """Whether ``module`` is a layer that PEFT made, of any method."""
    return isinstance(module, BaseTunerLayer)


def fused_class(peft_class: type[Any]) -> type[Any] | None:
    """What a layer of PEFT's class becomes; None where fastpeft has nothing for it."""
    if peft_class is PeftLinear:
        return FusedLinear
    if peft_class is PeftSVDLinear:
        return FusedSVDLinear
    place = peft_class.__module__, peft_class.__qualname__
    if place in (("peft.tuners.lora.bnb", "Linear4bit"), ("peft.tuners.adalora.bnb", "SVDLinear4bit")):
        from . import four_bit_layers  # bitsandbytes is there, and takes long to import where it is not needed

        fused: type[Any] = getattr(four_bit_layers, f"Fused{peft_class.__name__}")
        return fused
    return None


def fuse(layer: nn.Module, backend: str | None) -> None:
    """Gives ``layer`` its fused class, if there is one."""
    fused = fused_class(type(layer))
    if fused is not None:
        layer.__class__ = fused
    if isinstance(layer, FusedForward):
        layer.fastpeft_backend = backend


def _is_plain_input(x: Tensor, weight: Tensor | FourBit) -> bool:
    """False where PEFT computes something else than the op, or raises an error that is PEFT's to raise."""
    if not isinstance(x, Tensor) or x.is_nested or x.is_meta:
        return False
    if isinstance(weight, FourBit):
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if x.dtype == weight.dtype:
        return True
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)

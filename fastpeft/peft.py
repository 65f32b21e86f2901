"""Hugging Face PEFT's LoRA layers through fastpeft, in place: parameters, names and state_dict keys stay PEFT's.

A layer is fused by giving it the class :class:`FusedLinear`, which overrides ``forward``. Each call reads the layer's
state anew, since PEFT's users change it at any time. What cannot be fused goes to PEFT's own ``forward``; the reason
is what :func:`patch` reports and ``fastpeft.explain`` shows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import peft
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .dispatch import BackendRefusal, check_backend_name
from .explain import backend_refusals, grouped
from .functional import compute_dtype, dora_linear, dora_norm, is_readable, lora_linear
from .nf4 import FourBit, from_bitsandbytes
from .norm_cache import NormCache

_4BIT_CLASSES = ("Linear4bit", "LinearNF4", "LinearFP4")


if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as _Layer
else:
    _Layer = object  # which of PEFT's classes it is, each fused class says


class Operands(NamedTuple):
    """What a fused layer hands to :mod:`fastpeft.functional`; ``magnitude`` and ``norm`` are DoRA's, else empty."""

    weight: Tensor | FourBit
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    scaling: list[float | Tensor]
    dropout_p: list[float]
    magnitude: list[Tensor]
    norm: list[Tensor]

    def __call__(self, x: Tensor, adapter_index: Tensor | None, backend: str | None) -> Tensor:
        if not self.magnitude:
            return lora_linear(x, *self[:6], adapter_index=adapter_index, backend=backend)
        weight, bias, A, B, scaling, dropout_p, magnitude, norm = self
        return dora_linear(x, weight, bias, A, B, magnitude, scaling, dropout_p, norm=norm, backend=backend)


class FusedForward(_Layer):
    """The forward of every fused class: one call of :mod:`fastpeft.functional` in the place of PEFT's."""

    fastpeft_backend: str | None = None
    peft_class: type[Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's result, ``[..., K]`` to ``[..., N]``; from PEFT's own ``forward`` where the call cannot be fused."""
        adapter_names = kwargs.get("adapter_names")
        if args or len(kwargs) > (adapter_names is not None):
            return super().forward(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed_batch(x, adapter_names)
        operands = operands_or_reason(self, self.active_adapters)
        if (
            isinstance(operands, str)
            or not _is_plain_input(x, operands.weight)
            or (operands.magnitude and x.dim() < 2)  # PEFT makes [1, N] of it
        ):
            return super().forward(x)
        return self._run(operands, x, None)

    def _run(self, operands: Operands, x: Tensor, adapter_index: Tensor | None) -> Tensor:
        if not isinstance(operands.weight, FourBit):
            return operands(x, adapter_index, self.fastpeft_backend)
        base: Any = self.base_layer
        if not base.compute_type_is_set:  # as the first forward of bitsandbytes' layer does
            base.set_compute_type(x)
            base.compute_type_is_set = True
        y = operands(x.to(base.compute_dtype or x.dtype), adapter_index, self.fastpeft_backend)
        return y.to(x.dtype)

    def _forward_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """``adapter_names`` has a name for each sample of ``x [samples, ..., K]``; ``"__base__"`` is no adapter."""
        self._check_forward_args(x, adapter_names=adapter_names)
        served = [name for name in dict.fromkeys(adapter_names) if name in self.lora_A and name != "__base__"]
        operands = operands_or_reason(self, served)
        if (
            isinstance(operands, str)
            or x.dim() < 2
            or operands.magnitude  # then each token has factors of its own,
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
        operands = operands_or_reason(self, self.active_adapters)
        return f"left to PEFT: {operands}" if isinstance(operands, str) else "fused by fastpeft"

    def _get_name(self) -> str:
        return self.peft_class.__name__  # repr shows PEFT's name, as state_dict keys and parameters are PEFT's


class FusedLinear(FusedForward, PeftLinear):
    """``peft.tuners.lora.layer.Linear``, fused."""

    peft_class = PeftLinear


@dataclass(frozen=True)
class Report:
    """What :func:`patch` found: the names of the fused layers, and those left to PEFT, each with its reason."""

    fused: list[str]
    left_to_peft: dict[str, str]

    def __str__(self) -> str:
        counts = f"fused: {len(self.fused)}, left to PEFT: {len(self.left_to_peft)}"
        return f"{counts}\n{grouped(self.left_to_peft)}" if self.left_to_peft else counts


def patch(model: nn.Module, *, backend: str | None = None) -> Report:
    """Fuses the LoRA layers of ``model`` in place; parameters, names and state_dict keys stay as they are.

    Patching twice is harmless; the last ``backend`` counts. A layer whose present state stands in the way (merged,
    disabled, hooked, another variant of LoRA) is reported as left to PEFT and is fused once the state allows it.

    Args:
        model: a PEFT model, or any module that holds PEFT layers.
        backend: ``"native"`` or ``"reference"`` for all its layers; None takes the fastest that accepts a call.

    Raises:
        TypeError: ``model`` is no module. ValueError: it holds no PEFT layer, or ``backend`` is unknown.
        fastpeft.BackendRefusal: ``backend`` was asked for by name and cannot run one of the layers.
    """
    check_backend_name(backend)
    layers = _peft_layers(model)
    if not layers:
        raise ValueError(
            f"model must hold at least one PEFT layer, got a {type(model).__name__} without any; "
            "peft.get_peft_model(model, config) adds them"
        )
    report = Report([], {})
    for name, layer in layers.items():
        operands = operands_or_reason(layer, layer.active_adapters)
        if isinstance(operands, str):
            report.left_to_peft[name] = operands
        else:
            _check_backend(name, operands, backend)
            report.fused.append(name)
    for layer in layers.values():
        _fuse(layer, backend)
    return report


def unpatch(model: nn.Module) -> None:
    """Gives every fused layer of ``model`` PEFT's class back.

    Raises:
        TypeError: ``model`` is no module.
    """
    for layer in _peft_layers(model).values():
        if isinstance(layer, FusedForward):
            layer.__class__ = layer.peft_class
            layer.__dict__.pop("fastpeft_backend", None)
            layer.__dict__.pop("_fastpeft_norms", None)


def get_peft_model(
    model: nn.Module, peft_config: peft.LoraConfig, *, backend: str | None = None, **kwargs: Any
) -> nn.Module:
    """``peft.get_peft_model(model, peft_config, **kwargs)``, then :func:`patch`.

    Raises:
        TypeError: ``peft_config`` is no ``peft.LoraConfig``. Else what the two functions raise.
    """
    if not isinstance(peft_config, peft.LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}")
    check_backend_name(backend)
    peft_model = peft.get_peft_model(model, peft_config, **kwargs)
    patch(peft_model, backend=backend)
    return peft_model


_switch_lock = threading.Lock()
_wanted_by: set[object] = set()
_PROCESS = object()
_create_peft_module = LoraModel._create_new_module


def _create_fused_module(
    lora_config: peft.LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
) -> nn.Module:
    """Stands for ``LoraModel._create_new_module``, through which all LoRA layers come into being."""
    layer = _create_peft_module(lora_config, adapter_name, target, **kwargs)
    _fuse(layer, None)
    return layer


def _switch(change: Callable[[object], None], who: object) -> None:
    with _switch_lock:
        change(who)
        create = _create_fused_module if _wanted_by else _create_peft_module
        LoraModel._create_new_module = staticmethod(create)


def enable() -> None:
    """From now on every LoRA layer that PEFT makes in this process is fused (Trainer, TRL, ``from_pretrained`` ...)."""
    _switch(_wanted_by.add, _PROCESS)


def disable() -> None:
    """Undoes :func:`enable`. Layers made before stay fused."""
    _switch(_wanted_by.discard, _PROCESS)


@contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for the length of a ``with`` block; blocks may be nested."""
    block = object()
    _switch(_wanted_by.add, block)
    try:
        yield
    finally:
        _switch(_wanted_by.discard, block)


def operands_or_reason(layer: BaseTunerLayer, adapters: Sequence[str]) -> Operands | str:
    """The operands of one call with these adapters, or why PEFT has to run it.

    Modules are read through ``_modules`` and ``_parameters``: this runs in every forward, and ``nn.Module``'s attribute
    look-up would take longer than all that is done here.
    """
    if not isinstance(layer, FusedForward) and _fused_class(type(layer)) is None:
        return f"{_class_name(layer)} is no class that fastpeft fuses"
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the base weight"
    if _has_any_global_hook():
        return "a hook on all modules is registered"
    if _are_functorch_transforms_active():
        return "a torch.func transform is active"
    modules: dict[str, Any] = layer._modules
    base = modules["base_layer"]
    matrix, dtype = _matrix(base)
    if isinstance(matrix, str):
        return matrix
    bias = base._parameters["bias"]
    lora_A, lora_B, lora_dropout = modules["lora_A"], modules["lora_B"], modules["lora_dropout"]
    if not type(lora_A) is type(lora_B) is type(lora_dropout) is nn.ModuleDict:
        return "the containers of its adapters are wrapped"
    As, Bs, scalings, ps = [], [], [], []
    magnitudes: list[Tensor] = []
    norms: list[Tensor] = []
    for name in adapters:
        A: Any = lora_A._modules.get(name)
        B: Any = lora_B._modules.get(name)
        dropout: Any = lora_dropout._modules.get(name)
        if A is None:  # an adapter of other layers
            continue
        scaling = layer.scaling.get(name)
        reason = _adapter_reason(layer, name, A, B, dropout, scaling, dtype)
        if reason is not None:
            return f"its adapter {name!r} {reason}"
        As.append(A._parameters["weight"])
        Bs.append(B._parameters["weight"])
        scalings.append(scaling)
        drops = type(dropout) is nn.Dropout and dropout.training
        if name in layer.lora_variant:  # of DoRA, PEFT asks the layer, too
            drops = drops and layer.training
        ps.append(dropout.p if drops else 0.0)
        lora_bias = B._parameters["bias"]
        if lora_bias is not None:
            bias = lora_bias * scaling if bias is None else bias + lora_bias * scaling
        if name in layer.lora_variant:
            found = _magnitude_and_norm(layer, name, matrix, As[-1], Bs[-1], scaling)
            if isinstance(found, str):
                return f"its adapter {name!r} {found}"
            magnitudes.append(found[0])
            norms.append(found[1])
    if not As:
        return "none of the active adapters is in this layer"
    if magnitudes and len(As) > 1:
        reason = _chain_reason(layer, adapters, ps, len(magnitudes))
        if reason is not None:
            return reason
    return Operands(matrix, bias, As, Bs, scalings, ps, magnitudes, norms)


def is_peft_layer(module: nn.Module) -> TypeGuard[BaseTunerLayer]:
    """Whether ``module`` is a layer that PEFT made, of any method."""
    return isinstance(module, BaseTunerLayer)


def _peft_layers(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return {name or type(layer).__name__: layer for name, layer in model.named_modules() if is_peft_layer(layer)}


def _fused_class(peft_class: type[Any]) -> type[Any] | None:
    """What a layer of PEFT's class becomes; None where fastpeft has nothing for it."""
    if peft_class is PeftLinear:
        return FusedLinear
    if (peft_class.__module__, peft_class.__qualname__) == ("peft.tuners.lora.bnb", "Linear4bit"):
        from .peft_bnb import FusedLinear4bit  # bitsandbytes is there, and takes long to import where it is not needed

        return FusedLinear4bit
    return None


def _fuse(layer: nn.Module, backend: str | None) -> None:
    fused = _fused_class(type(layer))
    if fused is not None:
        layer.__class__ = fused
    if isinstance(layer, FusedForward):
        layer.fastpeft_backend = backend


def _check_backend(name: str, operands: Operands, backend: str | None) -> None:
    if backend is None:
        return
    reason = backend_refusals("lora_linear", operands.weight, operands.A, operands.B)[backend]
    if reason is not None:
        raise BackendRefusal(f"backend={backend!r} cannot run {name}: {reason}")


def _matrix(base: Any) -> tuple[Tensor | FourBit | str, torch.dtype | None]:
    """The base layer's weight as ``[N, K]``, or why PEFT has to run it; and the dtype it computes in, if it has one."""
    four_bit = _is_4bit(base)
    if not four_bit and type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is a {_class_name(base)}", None
    if _is_hooked(base):
        return "its base layer has a hook or a forward of its own", None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if bias is not None and not _is_plain(bias):
        return (
            f"its base layer's weight is a {type(weight).__qualname__} and its bias a {type(bias).__qualname__}",
            None,
        )
    if four_bit:
        return four_bit_weight(base), base.compute_dtype
    if weight is None or not _is_plain(weight):
        return f"its base layer's weight is a {type(weight).__qualname__}", None
    if bias is not None and bias.dtype != weight.dtype:
        return f"its base layer's weight is {weight.dtype} and its bias {bias.dtype}", None
    return weight.t() if type(base) is Conv1D else weight, weight.dtype


def _is_4bit(base: nn.Module) -> bool:
    """Whether it is exactly one of bitsandbytes' 4-bit layers."""
    kind = type(base)
    return kind.__module__ == "bitsandbytes.nn.modules" and kind.__qualname__ in _4BIT_CLASSES


def four_bit_weight(base: Any) -> FourBit | str:
    """The weight of a bitsandbytes 4-bit layer, or what is wrong with it. FSDP may drop ``weight.quant_state``."""
    weight = base._parameters["weight"]
    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
    if state is None or type(weight).__qualname__ != "Params4bit":
        return "its 4-bit base weight is not quantized yet, or has lost what describes it"
    try:
        return from_bitsandbytes(weight, state)
    except (TypeError, ValueError) as error:
        return f"its 4-bit base weight cannot be read: {error}"


def _adapter_reason(
    layer: Any, name: str, A: Any, B: Any, dropout: Any, scaling: float | Tensor | None, dtype: torch.dtype | None
) -> str | None:
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"is a {type(variant).__name__}, neither LoRA nor DoRA"
    if variant is not None and B._parameters["bias"] is not None:
        return "has DoRA and a bias in lora_B"
    if not type(A) is type(B) is nn.Linear:
        return f"consists of {_class_name(A)} and {_class_name(B)}"
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"has {_class_name(dropout)} for dropout"
    if _is_hooked(A) or _is_hooked(B) or _is_hooked(dropout):
        return "has a module with a hook or a forward of its own"
    if type(dropout) is nn.Dropout and dropout.training and dropout.p >= 1:
        return f"drops everything (p = {dropout.p})"
    A_weight: Any = A._parameters["weight"]
    B_weight: Any = B._parameters["weight"]
    if not (_is_plain(A_weight) and _is_plain(B_weight)) or A._parameters["bias"] is not None:
        return f"has weights of {type(A_weight).__qualname__} and {type(B_weight).__qualname__}, or a bias in lora_A"
    if A_weight.dtype != B_weight.dtype:
        return f"is {A_weight.dtype} in lora_A and {B_weight.dtype} in lora_B"
    if A_weight.dtype != dtype and not layer.cast_input_dtype_enabled:
        return f"is {A_weight.dtype} where the base weight is {dtype}, and casting the input is switched off"
    if type(scaling) is not float and not _is_constant(scaling):
        return "has a scaling that is not one constant number"
    return None


def _magnitude_and_norm(
    layer: Any, name: str, weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float | Tensor
) -> tuple[Tensor, Tensor] | str:
    """Of a DoRA adapter, or why PEFT has to run it."""
    module = layer.lora_magnitude_vector._modules.get(name)
    if type(module) is not DoraLinearLayer or _is_hooked(module):
        return f"keeps its magnitude in a {_class_name(module)}, or in a module with a hook or a forward of its own"
    magnitude: Any = module._parameters["weight"]
    if not _is_plain(magnitude) or magnitude.device != weight.device:
        return f"has a magnitude that is a {type(magnitude).__qualname__} on {magnitude.device}"
    backend = layer.__dict__.get("fastpeft_backend")
    if torch.compiler.is_compiling():  # keeps nothing that a graph would depend on; the scaling may stay a tensor
        return magnitude, dora_norm(weight, A, B, scaling, backend)
    caches = layer.__dict__.setdefault("_fastpeft_norms", {})
    norm = caches.setdefault(name, NormCache()).get(weight, A, B, float(scaling), compute_dtype(weight), backend)
    if is_readable(norm) and not (magnitude / norm).isfinite().all():
        return "has a row whose norm is 0, or a magnitude that is not finite"
    return magnitude, norm


def _chain_reason(layer: Any, adapters: Sequence[str], ps: Sequence[float], doras: int) -> str | None:
    """Of several active adapters, at least one with DoRA, each acts on the result of those before it, in a way that
    depends on its dropout: why PEFT has to run them."""
    if doras < len(ps):
        return "DoRA and LoRA adapters are active together"
    used = [layer.lora_dropout[name] for name in adapters if name in layer.lora_dropout]
    for dropout, p in zip(used, ps, strict=True):
        if (type(dropout) is nn.Dropout and layer.training) != (p > 0):
            return "several DoRA adapters are active, and dropout is switched off in one of them alone"
    return None


def _is_constant(scaling: float | Tensor | None) -> bool:
    if isinstance(scaling, Tensor):
        return scaling.numel() == 1 and scaling.dim() <= 1 and not scaling.requires_grad
    return isinstance(scaling, (int, float))


def _is_plain_input(x: Tensor, weight: Tensor | FourBit) -> bool:
    """False where PEFT computes something else than the op, or raises an error that is PEFT's to raise."""
    if not isinstance(x, Tensor) or x.is_nested or x.is_meta:
        return False
    if isinstance(weight, FourBit):
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if x.dtype == weight.dtype:
        return True
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter or type(tensor) is Tensor


def _is_hooked(module: nn.Module) -> bool:
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state  # put there by accelerate, among others
    )


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"

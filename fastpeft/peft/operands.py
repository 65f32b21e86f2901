"""What one call of a PEFT layer computes with, read from the layer, or the reason why PEFT has to run it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ..functional import adapted_linear, compute_dtype, dora_norm, is_readable
from ..nf4 import FourBit, from_bitsandbytes
from ..norm_cache import NormCache

_4BIT_CLASSES = ("Linear4bit", "LinearNF4", "LinearFP4")
_ADALORA_EPSILON = 1e-5  # what PEFT adds to the number of ranks


class Operands(NamedTuple):
    """What a fused layer hands to :mod:`fastpeft.functional`; ``c`` has DoRA's factors ``m / norm``, else nothing."""

    weight: Tensor | FourBit
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    c: list[Tensor]
    scaling: list[float | Tensor]
    dropout_p: list[float]

    def __call__(self, x: Tensor, adapter_index: Tensor | None, backend: str | None) -> Tensor:
        return adapted_linear(x, *self, adapter_index=adapter_index, backend=backend)


class _Adapter(NamedTuple):
    A: Tensor
    B: Tensor
    scaling: float | Tensor
    dropout_p: float
    bias: Tensor | None = None
    c: Tensor | None = None


def read_operands(layer: Any, adapters: Sequence[str]) -> Operands | str:
    """The operands of one call of a PEFT layer with these adapters, or why PEFT has to run it.

    Modules are read through ``_modules`` and ``_parameters``: this runs in every forward, and ``nn.Module``'s attribute
    look-up would take longer than all that is done here.
    """
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the base weight"
    if _has_any_global_hook():
        return "a hook on all modules is registered"
    if _are_functorch_transforms_active():
        return "a torch.func transform is active"
    base = layer._modules["base_layer"]
    matrix, dtype = _matrix(layer, base)
    if isinstance(matrix, str):
        return matrix
    bias = base._parameters["bias"]
    read = _svd_adapter if isinstance(layer, AdaLoraLayer) else _lora_adapter
    found: list[_Adapter] = []
    for name in adapters:
        adapter = read(layer, name, matrix, dtype)
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
        reason = _chain_reason(layer, adapters, found)
        if reason is not None:
            return reason
    scalings, ps = [adapter.scaling for adapter in found], [adapter.dropout_p for adapter in found]
    return Operands(matrix, bias, [a.A for a in found], [a.B for a in found], c, scalings, ps)


def _matrix(layer: Any, base: Any) -> tuple[Tensor | FourBit | str, torch.dtype | None]:
    """The base layer's weight as ``[N, K]``, or why PEFT has to run it; and the dtype it computes in, if it has one."""
    four_bit = _is_4bit(base)
    if not four_bit and type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is a {class_name(base)}", None
    if _is_hooked(base):
        return "its base layer has a hook or a forward of its own", None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if bias is not None and not _is_plain(bias):
        return (
            f"its base layer's weight is a {type(weight).__qualname__} and its bias a {type(bias).__qualname__}",
            None,
        )
    if four_bit:
        return _four_bit_weight(layer, base), base.compute_dtype
    if weight is None or not _is_plain(weight):
        return f"its base layer's weight is a {type(weight).__qualname__}", None
    if bias is not None and bias.dtype != weight.dtype:
        return f"its base layer's weight is {weight.dtype} and its bias {bias.dtype}", None
    return weight.t() if type(base) is Conv1D else weight, weight.dtype


def _is_4bit(base: nn.Module) -> bool:
    """Whether it is exactly one of bitsandbytes' 4-bit layers."""
    kind = type(base)
    return kind.__module__ == "bitsandbytes.nn.modules" and kind.__qualname__ in _4BIT_CLASSES


def _four_bit_weight(layer: Any, base: Any) -> FourBit | str:
    """The weight of a bitsandbytes 4-bit layer, or what is wrong with it. FSDP may drop ``weight.quant_state``.

    Reading and checking takes as long as a small layer's product: what was read is kept in ``layer``, and holds as long
    as it consists of the same tensors.
    """
    weight = base._parameters["weight"]
    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
    if state is None or type(weight).__qualname__ != "Params4bit":
        return "its 4-bit base weight is not quantized yet, or has lost what describes it"
    memory = weight.data_ptr(), weight.numel()
    parts = (*vars(state).values(), *(vars(state.state2).values() if state.nested else ()))
    kept = layer.__dict__.get("_fastpeft_four_bit")
    if kept is not None and kept[0] == memory and len(kept[1]) == len(parts) and all(map(is_, kept[1], parts)):
        return kept[2]
    try:
        found = from_bitsandbytes(weight, state)
    except (TypeError, ValueError) as error:
        return f"its 4-bit base weight cannot be read: {error}"
    if found.packed.data_ptr() == weight.data_ptr():  # not a copy, which would miss what is written into the weight
        layer.__dict__["_fastpeft_four_bit"] = memory, parts, found
    return found


def _lora_adapter(layer: Any, name: str, matrix: Tensor | FourBit, dtype: torch.dtype | None) -> _Adapter | str | None:
    """LoRA or DoRA; a reason reads on after "its adapter"; None: the layer has no such adapter."""
    modules = layer._modules
    lora_A, lora_B, dropouts = modules["lora_A"], modules["lora_B"], modules["lora_dropout"]
    if not type(lora_A) is type(lora_B) is type(dropouts) is nn.ModuleDict:
        return "lies in containers that are wrapped"
    A: Any = lora_A._modules.get(name)
    B: Any = lora_B._modules.get(name)
    if A is None:
        return None
    variant, dropout, scaling = layer.lora_variant.get(name), dropouts._modules.get(name), layer.scaling.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"is a {type(variant).__name__}, neither LoRA nor DoRA"
    if variant is not None and B._parameters["bias"] is not None:
        return "has DoRA and a bias in lora_B"
    if not type(A) is type(B) is nn.Linear:
        return f"consists of {class_name(A)} and {class_name(B)}"
    if _is_hooked(A) or _is_hooked(B):
        return "has a module with a hook or a forward of its own"
    if A._parameters["bias"] is not None:
        return "has a bias in lora_A"
    A_weight: Any = A._parameters["weight"]
    B_weight: Any = B._parameters["weight"]
    lora_bias: Any = B._parameters["bias"]
    reason = _dropout_reason(dropout) or _factors_reason(layer, (A_weight, B_weight), scaling, dtype)
    if reason is not None:
        return reason
    p = _dropout_p(dropout)
    if lora_bias is not None:
        lora_bias = lora_bias * scaling
    if variant is None:
        return _Adapter(A_weight, B_weight, scaling, p, lora_bias)
    c = _dora_factor(layer, name, matrix, A_weight, B_weight, scaling)
    if isinstance(c, str):
        return c
    return _Adapter(A_weight, B_weight, scaling, p if layer.training else 0.0, None, c)  # PEFT asks the layer, too


def _svd_adapter(layer: Any, name: str, matrix: Tensor | FourBit, dtype: torch.dtype | None) -> _Adapter | str | None:
    """AdaLoRA: ``A`` with the singular values multiplied in, in float32 (or float64)."""
    modules = layer._modules
    holders, dropouts = [modules[kind] for kind in ("lora_A", "lora_B", "lora_E", "ranknum")], modules["lora_dropout"]
    if {nn.ParameterDict} != set(map(type, holders)) or type(dropouts) is not nn.ModuleDict:
        return "lies in containers that are wrapped"
    A, B, E, ranknum = (holder._parameters.get(name) for holder in holders)
    if A is None:
        return None
    dropout, scaling = dropouts._modules.get(name), layer.scaling.get(name)
    reason = _dropout_reason(dropout) or _factors_reason(layer, (A, B, E), scaling, dtype)
    if reason is not None:
        return reason
    if A.shape[0] == 0:
        return "has rank 0"
    E = E.to(torch.promote_types(E.dtype, torch.float32))
    scale = scaling / (ranknum + _ADALORA_EPSILON)
    if scale.requires_grad:  # PEFT lets the number of ranks learn, too, where the base is in a low precision
        return _Adapter(A * (E * scale), B, 1.0, _dropout_p(dropout))
    return _Adapter(A * E, B, scale.item() if is_readable(scale) else scale, _dropout_p(dropout))


def _dropout_reason(dropout: Any) -> str | None:
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"has {class_name(dropout)} for dropout"
    if _is_hooked(dropout):
        return "has a module with a hook or a forward of its own"
    if type(dropout) is nn.Dropout and dropout.training and dropout.p >= 1:
        return f"drops everything (p = {dropout.p})"
    return None


def _dropout_p(dropout: Any) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _factors_reason(
    layer: Any, factors: Sequence[Tensor], scaling: float | Tensor | None, dtype: torch.dtype | None
) -> str | None:
    """Why PEFT's product of ``factors`` and ``scaling`` is not the op's."""
    if not all(map(_is_plain, factors)):
        return f"has weights of {' and '.join(type(factor).__qualname__ for factor in factors)}"
    dtypes = [factor.dtype for factor in factors]
    if any(other != dtypes[0] for other in dtypes):
        return f"has weights of {' and '.join(map(str, dtypes))}"
    if dtypes[0] != dtype and not layer.cast_input_dtype_enabled:
        return f"is {dtypes[0]} where the base weight is {dtype}, and casting the input is switched off"
    if type(scaling) is not float and not _is_constant(scaling):
        return "has a scaling that is not one constant number"
    return None


def _dora_factor(
    layer: Any, name: str, weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float | Tensor
) -> Tensor | str:
    """``c = m / ‖W + s B A‖``, or why PEFT has to run the adapter."""
    module = layer.lora_magnitude_vector._modules.get(name)
    if type(module) is not DoraLinearLayer or _is_hooked(module):
        return f"keeps its magnitude in a {class_name(module)}, or in a module with a hook or a forward of its own"
    magnitude: Any = module._parameters["weight"]
    if not _is_plain(magnitude) or magnitude.device != weight.device:
        return f"has a magnitude that is a {type(magnitude).__qualname__} on {magnitude.device}"
    backend = layer.__dict__.get("fastpeft_backend")
    stays_tensor = isinstance(scaling, Tensor) and not is_readable(scaling)
    if stays_tensor or torch.compiler.is_compiling():  # nothing is kept that a graph would depend on
        norm = dora_norm(weight, A, B, scaling, backend)
    else:
        caches = layer.__dict__.setdefault("_fastpeft_norms", {})
        norm = caches.setdefault(name, NormCache()).get(weight, A, B, float(scaling), compute_dtype(weight), backend)
    c = magnitude.to(norm.dtype) / norm
    if is_readable(c) and not c.isfinite().all():
        return "has a row whose norm is 0, or a magnitude that is not finite"
    return c


def _chain_reason(layer: Any, adapters: Sequence[str], found: Sequence[_Adapter]) -> str | None:
    """Of several active adapters, at least one with DoRA, each acts on the result of those before it, in a way that
    depends on its dropout: why PEFT has to run them."""
    if any(adapter.c is None for adapter in found):
        return "DoRA and LoRA adapters are active together"
    used = [layer.lora_dropout[name] for name in adapters if name in layer.lora_dropout]
    for dropout, adapter in zip(used, found, strict=True):
        if (type(dropout) is nn.Dropout and layer.training) != (adapter.dropout_p > 0):
            return "several DoRA adapters are active, and dropout is switched off in one of them alone"
    return None


def _is_constant(scaling: float | Tensor | None) -> bool:
    if isinstance(scaling, Tensor):
        return scaling.numel() == 1 and scaling.dim() <= 1 and not scaling.requires_grad
    return isinstance(scaling, (int, float))


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


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"

"""What one adapter of a PEFT layer computes with, read by its method, or why PEFT has to run it.

Modules are read through ``_modules`` and ``_parameters``: this runs in every forward, and ``nn.Module``'s attribute
look-up would take longer than all that is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..checks import is_finite, is_readable
from ..four_bit import FourBit
from ..functional import compute_dtype, norm_in
from ..norm_cache import NormCache
from ..reference import wide_dtype
from . import variants
from .base_layers import Base, class_name, is_hooked, is_plain, unread_weight
from .stock import Stock

_ADALORA_EPSILON = 1e-5  # what PEFT adds to the number of ranks
DORA = Stock((DoraLinearVariant, "forward"), (DoraLinearLayer, "forward"), (DoraLinearLayer, "get_weight_norm"))
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVING = Stock(*((kind, "forward") for kind in _CONVOLUTIONS))


class Adapter(NamedTuple):
    """One adapter; ``c`` is DoRA's factor ``m / norm``."""

    A: Tensor
    B: Tensor
    scaling: float | Tensor
    dropout_p: float
    bias: Tensor | None = None
    c: Tensor | None = None


Reader = Callable[[Any, str, Base, int], Adapter | str | None]
"""Of a layer, an adapter's name, the layer's base and the tokens of the call. A reason reads on after "its adapter";
None: there is no such adapter in the layer."""


def read_lora(layer: Any, name: str, base: Base, tokens: int) -> Adapter | str | None:
    """LoRA, DoRA, or a variant that :mod:`fastpeft.peft.variants` knows."""
    modules = layer._modules
    lora_A, lora_B, dropouts = modules["lora_A"], modules["lora_B"], modules["lora_dropout"]
    if not type(lora_A) is type(lora_B) is type(dropouts) is nn.ModuleDict:
        return "lies in containers that are wrapped"
    A: Any = lora_A._modules.get(name)
    B: Any = lora_B._modules.get(name)
    if A is None:
        return None
    variant, dropout, scaling = layer.lora_variant.get(name), dropouts._modules.get(name), layer.scaling.get(name)
    is_dora = type(variant) is DoraLinearVariant
    make_A = None if variant is None or is_dora else variants.maker_of(variant)
    if variant is not None and not is_dora and make_A is None:
        return f"is a {type(variant).__name__}, neither LoRA nor DoRA"
    if not (type(A) is type(B) is nn.Linear or _are_pointwise(A, B)):
        return f"consists of {class_name(A)} and {class_name(B)}"
    lora_bias: Any = B._parameters.get("bias")
    if is_dora and lora_bias is not None:
        return "has DoRA and a bias in lora_B"
    if is_hooked(A) or is_hooked(B):
        return "has a module with a hook or a forward of its own"
    if A._parameters.get("bias") is not None:
        return "has a bias in lora_A"
    A_weight, B_weight = _weight_of(A), _weight_of(B)
    if type(A) is not nn.Linear and isinstance(A_weight, Tensor) and isinstance(B_weight, Tensor):
        A_weight, B_weight = A_weight.flatten(1), B_weight.flatten(1)
    reason = dropout_reason(dropout) or factors_reason(layer, (A_weight, B_weight), base.dtype)
    if reason is None and type(scaling) is not float and not is_constant(scaling):
        reason = "has a scaling that is not one constant number"
    if reason is not None:
        return reason
    p = dropout_p(dropout)
    if make_A is not None:
        A_weight = make_A(layer, name, A_weight)
        if isinstance(A_weight, str):
            return A_weight
    if not is_dora:
        return Adapter(A_weight, B_weight, scaling, p, None if lora_bias is None else lora_bias * scaling)
    if base.weight is None and layer.training and type(dropout) is nn.Dropout:
        return f"has DoRA with dropout, and {base.unread}"
    c = _dora_factor(layer, name, base, Adapter(A_weight, B_weight, scaling, p), tokens)
    if isinstance(c, str):
        return c
    return Adapter(A_weight, B_weight, scaling, p if layer.training else 0.0, None, c)  # PEFT asks the layer, too


def read_adalora(layer: Any, name: str, base: Base, tokens: int) -> Adapter | str | None:
    """``A`` with the singular values multiplied in, in float32 (or float64)."""
    modules = layer._modules
    holders, dropouts = [modules[kind] for kind in ("lora_A", "lora_B", "lora_E", "ranknum")], modules["lora_dropout"]
    if {nn.ParameterDict} != set(map(type, holders)) or type(dropouts) is not nn.ModuleDict:
        return "lies in containers that are wrapped"
    A, B, E, ranknum = (holder._parameters.get(name) for holder in holders)
    if A is None:
        return None
    dropout, scaling = dropouts._modules.get(name), layer.scaling.get(name)
    reason = dropout_reason(dropout) or factors_reason(layer, (A, B, E), base.dtype)
    if reason is None and not is_constant(scaling):
        reason = "has a scaling that is not one constant number"
    if reason is not None:
        return reason
    if A.shape[0] == 0:
        return "has rank 0"
    return adalora_adapter(A, B, E, ranknum, scaling, dropout_p(dropout))


def adalora_adapter(A: Tensor, B: Tensor, E: Tensor, ranknum: Tensor, scaling: float | Tensor, p: float) -> Adapter:
    """What an adapter with these parameters multiplies with."""
    E = _wide(E)
    if ranknum.requires_grad:  # PEFT lets the number of ranks learn, too, where the base is in a low precision
        return Adapter(A * (E * (scaling / (ranknum + _ADALORA_EPSILON))), B, 1.0, p)
    count = ranknum.item() if is_readable(ranknum) else ranknum
    return Adapter(A * E, B, scaling / (count + _ADALORA_EPSILON), p)


def read_vera(layer: Any, name: str, base: Base, tokens: int) -> Adapter | str | None:
    """VeRA (Kopiczko et al., 2024): ``A' = λ_d ∘ A`` and ``B' = λ_b ∘ B`` of the matrices that all layers share."""
    modules = layer._modules
    learned, dropouts = [modules[kind] for kind in ("vera_lambda_d", "vera_lambda_b")], modules["vera_dropout"]
    if {nn.ParameterDict} != set(map(type, learned)) or type(dropouts) is not nn.ModuleDict:
        return "lies in containers that are wrapped"
    lambda_d, lambda_b = (holder._parameters.get(name) for holder in learned)
    if lambda_d is None:
        return None
    A = layer.vera_A[name][:, : layer.in_features].to(lambda_d.device)
    B = layer.vera_B[name][: layer.out_features].to(lambda_b.device)
    dropout = dropouts._modules.get(name)
    reason = dropout_reason(dropout) or factors_reason(layer, (A, B, lambda_d, lambda_b), base.dtype)
    if reason is not None:
        return reason
    return Adapter(A * _wide(lambda_d).unsqueeze(1), B * _wide(lambda_b).unsqueeze(1), 1.0, dropout_p(dropout))


def _are_pointwise(A: Any, B: Any) -> bool:
    """Whether both are convolutions that mix the channels of each place by itself, as linear layers mix features."""
    if type(A) is not type(B) or type(A) not in _CONVOLUTIONS or _CONVOLVING.replaced():
        return False
    return all(set(c.kernel_size) == set(c.stride) == {1} and set(c.padding) == {0} and c.groups == 1 for c in (A, B))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))


def _weight_of(module: Any) -> Any:
    """A Parameter, or what stands in its place as a plain attribute: weights that another module generates."""
    weight = module._parameters.get("weight")
    return module.__dict__.get("weight") if weight is None else weight


def dropout_reason(dropout: Any) -> str | None:
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"has {class_name(dropout)} for dropout"
    if is_hooked(dropout):
        return "has a module with a hook or a forward of its own"
    if type(dropout) is nn.Dropout and dropout.training and dropout.p >= 1:
        return f"drops everything (p = {dropout.p})"
    return None


def dropout_p(dropout: Any) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def factors_reason(layer: Any, factors: Sequence[Tensor], dtype: torch.dtype | None) -> str | None:
    """Why PEFT's product of ``factors`` is not the op's."""
    if not all(map(is_plain, factors)):
        return f"has weights of {' and '.join(type(factor).__qualname__ for factor in factors)}"
    dtypes = [factor.dtype for factor in factors]
    if any(other != dtypes[0] for other in dtypes):
        return f"has weights of {' and '.join(map(str, dtypes))}"
    if dtypes[0] != dtype and not layer.__dict__.get("cast_input_dtype_enabled", True):  # not all methods have it
        return f"is {dtypes[0]} where the base weight is {dtype}, and casting the input is switched off"
    return None


def _dora_factor(layer: Any, name: str, base: Base, adapter: Adapter, tokens: int) -> Tensor | str:
    """``c = m / ‖W + s B A‖``, or why PEFT has to run the adapter."""
    replaced = DORA.replaced()
    if replaced is not None:
        return f"has DoRA, and {replaced}"
    weight = unread_weight(layer) if base.weight is None else base.weight
    if isinstance(weight, str):
        return f"has DoRA, and {weight}"
    magnitude = read_magnitude(layer, name, weight.device)
    if isinstance(magnitude, str):
        return magnitude
    return dora_factor(
        layer, name, weight, adapter, magnitude, tokens, lasts=base.weight is not None or _lasts(layer, weight)
    )


def read_magnitude(layer: Any, name: str, device: torch.device, kind: type[Any] = DoraLinearLayer) -> Tensor | str:
    """An adapter's ``m``, to be used on this device and held by a module of exactly this ``kind``, or why PEFT has to
    run the adapter."""
    module = layer.lora_magnitude_vector._modules.get(name)
    if type(module) is not kind or is_hooked(module):
        return f"keeps its magnitude in a {class_name(module)}, or in a module with a hook or a forward of its own"
    magnitude: Any = _weight_of(module)
    if not is_plain(magnitude) or magnitude.device != device:
        return f"has a magnitude that is a {type(magnitude).__qualname__} on {getattr(magnitude, 'device', None)}"
    found: Tensor = magnitude
    return found


def _lasts(layer: Any, weight: Tensor | FourBit) -> bool:
    """Whether it is what the base layer holds, and was not made for this call."""
    own = layer._modules["base_layer"]._parameters.get("weight")
    return isinstance(weight, FourBit) or weight is own or (own is not None and weight._base is own)


def dora_factor(
    layer: Any,
    name: str,
    weight: Tensor | FourBit,
    adapter: Adapter,
    magnitude: Tensor,
    tokens: int,
    *,
    lasts: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor | str:
    """``c = m / ‖W + s B A‖`` of an adapter that is read, for a call with so many tokens; a reason where it is not
    finite. The norm is kept of a weight that lasts. ``B A`` is computed in ``dtype``, by default the layer's own."""
    factors = adapter.A, adapter.B, adapter.scaling
    norm = dora_norm_of(layer, name, weight, factors, tokens, lasts=lasts, dtype=dtype)
    c = magnitude.to(norm.dtype) / norm
    if is_readable(c) and not is_finite(c):
        return "has a row whose norm is 0, or a magnitude that is not finite"
    return c


def dora_norm_of(
    layer: Any,
    name: str,
    weight: Tensor | FourBit,
    factors: tuple[Tensor, Tensor, float | Tensor],
    tokens: int,
    *,
    lasts: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``‖W + s B A‖`` with an adapter's ``A, B, s``, of a layer or of stacked experts, kept under this name."""
    A, B, scaling = factors
    backend = layer.__dict__.get("fastpeft_backend")
    stays_tensor = isinstance(scaling, Tensor) and not is_readable(scaling)
    dtype = compute_dtype(weight) if dtype is None else dtype
    if not lasts or stays_tensor or torch.compiler.is_compiling():  # a graph would depend on what is kept
        return norm_in(dtype, weight, A, B, scaling, backend)
    cache = layer.__dict__.setdefault("_fastpeft_norms", {}).setdefault(name, NormCache())
    norm: Tensor = cache.get(weight, A, B, float(scaling), dtype, backend, tokens=tokens)
    return norm


def is_constant(scaling: float | Tensor | None) -> bool:
    if isinstance(scaling, Tensor):
        return scaling.numel() == 1 and scaling.dim() <= 1 and not scaling.requires_grad
    return isinstance(scaling, (int, float))

"""Functions on tensors: they check every argument, settle dtypes and seeds, and call the op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from . import ops
from .dispatch import check_backend_name
from .dropout import dropout_seeds
from .nf4 import FourBit, weight_operands
from .reference import wide_dtype

USUAL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BASE_DTYPES = (torch.float64, *USUAL_DTYPES)


def lora_linear(
    x: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    adapter_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer and its LoRA adapters in one step: ``y = x Wᵀ + b + Σ s (D(x) Aᵀ) Bᵀ`` (Hu et al., 2021).

    Runs in the dtype of ``weight`` (or of autocast where that is on) with float32 accumulation; gradients of ``A``
    and ``B`` are summed in float32. Keeps ``x`` and ``u = D(x) Aᵀ [M, Σ r]`` for the backward pass, nothing else:
    the dropout mask is regenerated from a seed that torch's generator draws. Differentiable once, in every tensor.

    Args:
        x: ``[..., K]``, the dtype of ``weight`` unless autocast is on.
        weight: ``[N, K]``, float64, float32, float16 or bfloat16, any strides (a ``Conv1D`` passes ``weight.t()``); or
            a :class:`fastpeft.nf4.FourBit`, decoded tile by tile, with ``x`` in any of these dtypes.
        bias: ``[N]`` or None.
        A: ``[r, K]``, or a list with one for each adapter. Any floating dtype.
        B: ``[N, r]``, or a list alike.
        scaling: ``s``; a float, a one-element tensor (no gradient flows into it), or a list alike.
        dropout_p: probability with which the adapter's input elements are dropped, in [0, 1), realised in steps of
            2**-16; a float for all adapters or a list. Each adapter has a mask of its own.
        training: False switches dropout off.
        adapter_index: integers ``[...]`` (the leading shape of ``x``), for mixed batches: token ``m`` is served by
            adapter ``adapter_index[m]`` alone, by none where it is -1. None: every adapter serves every token.
        backend: ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None takes the fastest that accepts the
            call.

    Returns:
        ``[..., N]``, in the dtype the product ran in.

    Raises:
        TypeError: an argument's type or dtype does not fit; ValueError: a shape, device or number does not.
        fastpeft.BackendRefusal: ``backend`` was asked for by name and cannot take the call.
    """
    return adapted_linear(x, weight, bias, A, B, [], scaling, dropout_p, training, adapter_index, backend)


def dora_linear(
    x: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    magnitude: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    norm: Tensor | Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer and its DoRA adapters in one step (Liu et al., 2024; PEFT's formulas).

    With ``c = m / ‖W + s B A‖`` for each output row, the norm taken as a constant: ``y = c (x Wᵀ + s u Bᵀ) + b``; with
    dropout ``y = x Wᵀ + (c - 1) (D(x) Wᵀ) + c s u Bᵀ + b``, where ``u = D(x) Aᵀ``. Of several adapters, each acts on
    the result of those before it, as in PEFT. dtypes as in :func:`lora_linear`. Keeps ``x``, ``u`` and, for the
    gradient of ``m``, what ``c`` multiplies, ``[M, N]``.

    Args:
        magnitude: ``m [N]``, any floating dtype, or a list with one for each adapter.
        norm: ``‖W + s B A‖ [N]`` of each adapter from :func:`dora_norm`, where it is known already.
        x, weight, bias, A, B, scaling, dropout_p, training, backend: as in :func:`lora_linear`.

    Returns:
        ``[..., N]``, in the dtype the product ran in.

    Raises:
        What :func:`lora_linear` raises; ValueError where ``m / ‖W + s B A‖`` is not finite: a row of norm 0.
    """
    magnitudes = _tensors("magnitude", magnitude)
    adapters = _checked_adapters(x, weight, bias, A, B, scaling, dropout_p, backend)
    As, Bs, factors, _ = adapters
    if norm is None:
        norm = [_norm(weight, a, b, s, input_dtype(x), backend) for a, b, s in zip(As, Bs, factors, strict=True)]
    c = _dora_factors(magnitudes, _tensors("norm", norm), weight, x, len(As))
    return _run(x, weight, bias, adapters, c, training, None, backend)


def dora_norm(
    weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float | Tensor = 1.0, backend: str | None = None
) -> Tensor:
    """``‖W + s B A‖`` of each row: what DoRA divides its magnitude by. Reads ``W`` once; a constant for autograd.

    Args:
        weight: ``[N, K]``; A: ``[r, K]``; B: ``[N, r]``; scaling: ``s``; all as in :func:`lora_linear`.

    Returns:
        ``[N]`` in float32, float64 for a float64 ``weight``.

    Raises:
        What :func:`lora_linear` raises.
    """
    _check_tensor("A", A)
    _check_tensor("B", B)
    check_backend_name(backend)
    _check_weight(weight)
    dtype = compute_dtype(weight)
    like = torch.empty(0, dtype=dtype, device=weight.device)
    _check_adapters(like, weight, [A], [B], [scaling], [0.0])
    Bs = [B]
    (factor,) = _constant_scaling(Bs, [scaling], like)
    return _norm(weight, A, Bs[0], factor, dtype, backend)


def _norm(
    weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, backend: str | None
) -> Tensor:
    data, quant, blocksize = weight_operands(weight)
    return ops.call_dora_norm(data.detach(), quant, blocksize, A.detach(), B.detach(), scaling, dtype, backend)


def compute_dtype(weight: Tensor | FourBit) -> torch.dtype:
    """The dtype that a layer with this ``weight`` computes in: its own, or autocast's where that is on.

    A weight in 4 bits has none of its own and is computed in its input's: float32 stands for that here.
    """
    dtype = torch.float32 if isinstance(weight, FourBit) else weight.dtype
    device_type = weight.device.type
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast and dtype != torch.float64 else dtype


def input_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an input is computed in: its own, or autocast's where that is on."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def adapted_linear(
    x: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    c: list[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float],
    training: bool = True,
    adapter_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`lora_linear`; with ``c = m / norm`` of each adapter, checked to be finite, :func:`dora_linear`."""
    adapters = _checked_adapters(x, weight, bias, A, B, scaling, dropout_p, backend)
    _check_adapter_index(x, adapter_index, len(adapters[0]))
    return _run(x, weight, bias, adapters, c, training, adapter_index, backend)


Adapters = tuple[list[Tensor], list[Tensor], list[float], list[float]]


def _checked_adapters(
    x: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float],
    backend: str | None,
) -> Adapters:
    """``A``, ``B``, ``scaling`` and ``dropout_p`` as lists, once everything fits together."""
    As, Bs = _tensors("A", A), _tensors("B", B)
    count = len(As)
    scalings = list(scaling) if isinstance(scaling, Sequence) else [scaling] * count
    ps = list(dropout_p) if isinstance(dropout_p, Sequence) else [dropout_p] * count
    check_backend_name(backend)
    if count == 1 and _fits(x, weight, bias, As, Bs, scalings, ps):
        return As, Bs, cast(list[float], scalings), ps
    _check_base(x, weight, bias)
    _check_adapters(x, weight, As, Bs, scalings, ps)
    if not isinstance(weight, FourBit) and x.dtype != weight.dtype and not _is_autocast(x):
        raise TypeError(f"x must have the dtype of weight, {weight.dtype}, got {x.dtype} (and autocast casts neither)")
    return As, Bs, _constant_scaling(Bs, scalings, x), ps


def _fits(
    x: Any, weight: Any, bias: Any, As: Sequence[Any], Bs: Sequence[Any], scalings: Sequence[Any], ps: Sequence[Any]
) -> bool:
    """Whether the usual call of one adapter is right: seen sooner than by the checks, which name what is wrong and know
    what else is right. A small layer's time on a GPU is no longer than theirs."""
    if not len(Bs) == len(scalings) == len(ps) == 1:
        return False
    if not isinstance(x, Tensor) or not isinstance(weight, (Tensor, FourBit)) or len(weight.shape) != 2:
        return False
    (A,), (B,), (scaling,), (p,), (N, K), dtype, device = As, Bs, scalings, ps, weight.shape, x.dtype, x.device
    return (
        dtype in USUAL_DTYPES
        and type(scaling) is float
        and -math.inf < scaling < math.inf
        and type(p) is float
        and 0.0 <= p < 1.0
        and (isinstance(weight, FourBit) or weight.dtype == dtype)
        and x.dim() > 0
        and x.shape[-1] == K
        and A.shape == (B.shape[-1], K)
        and A.dtype in USUAL_DTYPES
        and B.shape == (N, A.shape[0])
        and B.dtype in USUAL_DTYPES
        and A.shape[0] > 0
        and weight.device == A.device == B.device == device
        and device.type != "meta"
        and (bias is None or _is_usual_bias(bias, N, dtype, device))
    )


def _is_usual_bias(bias: Any, N: int, dtype: torch.dtype, device: torch.device) -> bool:
    return isinstance(bias, Tensor) and bias.shape == (N,) and bias.dtype == dtype and bias.device == device


def _run(
    x: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    adapters: Adapters,
    c: list[Tensor],
    training: bool,
    adapter_index: Tensor | None,
    backend: str | None,
) -> Tensor:
    As, Bs, factors, ps = adapters
    dtype = input_dtype(x)
    x = x if x.dtype == dtype else x.to(dtype)
    if not isinstance(weight, FourBit) and weight.dtype != dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    seed = dropout_seeds(len(As), x.device) if training and any(ps) else None
    keep_z = torch.is_grad_enabled() and any(factor.requires_grad for factor in c)
    operands = x, *weight_operands(weight), bias, As, Bs, c
    return ops.call_lora_linear(*operands, factors, ps, seed, adapter_index, keep_z, backend)


def _constant_scaling(Bs: list[Tensor], scalings: Sequence[float | Tensor], x: Tensor) -> list[float]:
    """The scalings as numbers; those that are tensors are multiplied into ``Bs`` in place of it."""
    factors: list[float] = []
    for i, s in enumerate(scalings):
        if isinstance(s, Tensor):  # stays on its device, so that it may change without a recompile or a synchronisation
            wide = torch.promote_types(Bs[i].dtype, wide_dtype(x.dtype))
            Bs[i] = Bs[i].to(wide) * s.detach().to(device=x.device, dtype=wide)
        factors.append(1.0 if isinstance(s, Tensor) else s)
    return factors


def _dora_factors(
    magnitudes: list[Tensor], norms: list[Tensor], weight: Tensor | FourBit, x: Tensor, count: int
) -> list[Tensor]:
    """``c = m / norm`` of each adapter, checked."""
    factors = []
    for name, values in (("magnitude", magnitudes), ("norm", norms)):
        if len(values) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} adapters in A, got {len(values)}")
        for i, value in enumerate(values):
            at = f"[{i}]" if count > 1 else ""
            if not value.is_floating_point():
                raise TypeError(f"{name}{at} must have a floating dtype, got {value.dtype}")
            if value.shape != weight.shape[:1]:
                raise ValueError(f"{name}{at} must have shape [N={weight.shape[0]}], got {list(value.shape)}")
            _check_device(f"{name}{at}", value, x)
    for i, (m, norm) in enumerate(zip(magnitudes, norms, strict=True)):
        c = (m.to(wide_dtype(x.dtype)) / norm.detach()).to(wide_dtype(x.dtype))
        if is_readable(c) and not c.isfinite().all():
            row = int((~c.isfinite()).nonzero()[0])
            at = f"[{i}]" if count > 1 else ""
            raise ValueError(
                f"magnitude{at} / ‖W + s B A‖ must be finite, and is {c[row].item()} in row {row}: "
                f"magnitude {m[row].item()}, norm {norm[row].item()}"
            )
        factors.append(c)
    return factors


def _tensors(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        for i, element in enumerate(value):
            _check_tensor(f"{name}[{i}]", element)
        return list(value)
    _check_tensor(name, value)
    return [value]  # type: ignore[list-item]


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_weight(weight: Tensor | FourBit) -> None:
    if isinstance(weight, FourBit):  # was checked when it was made
        return
    _check_tensor("weight", weight)
    if weight.dtype not in BASE_DTYPES:
        raise TypeError(f"weight must be float64, float32, float16 or bfloat16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [N, K], got {list(weight.shape)}")


def _check_base(x: Tensor, weight: Tensor | FourBit, bias: Tensor | None) -> None:
    _check_tensor("x", x)
    _check_weight(weight)
    if x.device.type == "meta":
        raise ValueError("x is a meta tensor and holds no data; move the model and its input to a real device first")
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have shape [..., K={weight.shape[1]}], got {list(x.shape)}")
    _check_device("weight", weight, x)
    if bias is not None:
        _check_tensor("bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"bias must have a floating dtype, got {bias.dtype}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [N={weight.shape[0]}], got {list(bias.shape)}")
        _check_device("bias", bias, x)


def _check_adapters(
    x: Tensor,
    weight: Tensor | FourBit,
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float | Tensor],
    ps: list[float],
) -> None:
    count = len(As)
    if count == 0:
        raise ValueError("A holds no adapter; at least one is expected")
    for name, values in (("B", Bs), ("scaling", scalings), ("dropout_p", ps)):
        if len(values) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} adapters in A, got {len(values)}")
    N, K = weight.shape
    for i, (A, B, s, p) in enumerate(zip(As, Bs, scalings, ps, strict=True)):
        at = f"[{i}]" if count > 1 else ""
        if not A.is_floating_point() or not B.is_floating_point():
            raise TypeError(f"A{at} and B{at} must have floating dtypes, got {A.dtype} and {B.dtype}")
        if A.dim() != 2 or A.shape[1] != K or A.shape[0] == 0:
            raise ValueError(f"A{at} must have shape [r, K={K}] with a rank r of at least 1, got {list(A.shape)}")
        if B.shape != (N, A.shape[0]):
            raise ValueError(f"B{at} must have shape [N={N}, r={A.shape[0]}], got {list(B.shape)}")
        _check_device(f"A{at}", A, x)
        _check_device(f"B{at}", B, x)
        _check_scaling(f"scaling{at}", s)
        _check_number(f"dropout_p{at}", p)
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout_p{at} must be in [0, 1), got {p}")


def _check_scaling(name: str, s: float | Tensor) -> None:
    if isinstance(s, Tensor):
        if s.numel() != 1:
            raise ValueError(f"{name} must hold one number, got a tensor of shape {list(s.shape)}")
        if not is_readable(s):
            return
        s = s.item()
    _check_number(name, s)
    if not -math.inf < s < math.inf:  # traces where torch.compile holds s as a symbol; math.isfinite does not
        raise ValueError(f"{name} must be finite, got {s}")


def _check_adapter_index(x: Tensor, adapter_index: Tensor | None, count: int) -> None:
    if adapter_index is None:
        return
    _check_tensor("adapter_index", adapter_index)
    if adapter_index.is_floating_point() or adapter_index.is_complex() or adapter_index.dtype == torch.bool:
        raise TypeError(f"adapter_index must have an integer dtype, got {adapter_index.dtype}")
    if adapter_index.shape != x.shape[:-1]:
        raise ValueError(
            f"adapter_index must have the leading shape of x, {list(x.shape[:-1])}, got {list(adapter_index.shape)}"
        )
    _check_device("adapter_index", adapter_index, x)
    if is_readable(adapter_index) and adapter_index.numel():
        least, most = (int(bound) for bound in adapter_index.aminmax())
        if least < -1 or most >= count:
            raise ValueError(f"adapter_index must be from -1 to {count - 1}, got {least} to {most}")


def is_readable(tensor: Tensor) -> bool:
    """Whether reading values neither waits for a device nor breaks a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_device(name: str, tensor: Tensor | FourBit, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")

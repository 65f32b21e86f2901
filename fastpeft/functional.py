"""Functions on tensors: they check every argument, settle dtypes and seeds, and call the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, dropout, ops, usual
from .call import Adapters, ForwardCall, GroupedCall, Weight
from .dispatch import check_backend_name
from .four_bit import FourBit
from .reference import wide_dtype


def lora_linear(
    x: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    *,
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
            a :class:`fastpeft.four_bit.FourBit`, decoded tile by tile, with ``x`` in any of these dtypes.
        bias: ``[N]`` or None.
        A: ``[r, K]``, or a list with one for each adapter. Any floating dtype.
        B: ``[N, r]``, or a list alike.
        scaling: ``s``; a float, a one-element tensor (no gradient flows into it), or a list alike.
        dropout_p: probability with which the adapter's input elements are dropped, in [0, 1), realised in steps of
            2**-16; a float for all adapters or a list. Each adapter has a mask of its own.
        training: False switches dropout off.
        adapter_index: integers ``[...]`` (the leading shape of ``x``), for mixed batches: token ``m`` is served by
            adapter ``adapter_index[m]`` alone, by none where it is -1. None: every adapter serves every token.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None takes the fastest that accepts the
            call.

    Returns:
        ``[..., N]``, in the dtype the product ran in.

    Raises:
        TypeError: an argument's type or dtype does not fit; ValueError: a shape, device or number does not.
        fastpeft.BackendRefusal: ``backend`` was asked for by name and cannot take the call.
    """
    adapters = checks.as_adapters(A, B, scaling, dropout_p, adapter_index)
    return adapted_linear(x, weight, bias, adapters, training, backend)


def lora_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float] = 0.0,
    *,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The experts of a mixture, each a linear layer with LoRA adapters of its own, in one step: for the rows of expert
    ``e`` ``y = x W[e]ᵀ + b[e] + Σ s (D(x) A[e]ᵀ) B[e]ᵀ``.

    Runs in the dtype of ``x`` (or of autocast where that is on) with float32 accumulation; nothing of the size of
    ``weight`` is made. Keeps for the backward pass what :func:`lora_linear` keeps, and the offsets. The gradients of
    ``A`` and ``B`` have the layout of ``A`` and ``B``, and zeros for experts without rows. Differentiable once.

    Args:
        x: ``[T, K]``, rows sorted by expert; the dtype of a dense ``weight`` unless autocast is on.
        offsets: int32 or int64 ``[E + 1]``, ascending from 0 to ``T``: expert ``e`` has rows
            ``offsets[e]:offsets[e + 1]``, or none. What they hold is checked at once on a CPU, in a compiled graph by
            the backend when it computes. On a GPU nobody waits to look at them: wrong ones give wrong results there.
        weight: ``[E, N, K]``, float64, float32, float16 or bfloat16, any strides; or a
            :class:`fastpeft.four_bit.FourBit` of this shape, of which the experts that have rows are decoded tile by
            tile, with ``x`` in any of these dtypes. A stack ``[E, K, N]`` of either kind is passed as ``weight.mT``.
        bias: ``[E, N]`` or None.
        A: ``[E, r, K]``, or a list with one for each adapter. Any floating dtype and strides.
        B: ``[E, N, r]``, or a list alike.
        scaling, dropout_p, training: as in :func:`lora_linear`; the mask counts rows of the sorted ``x``.
        backend: as in :func:`lora_linear`. ``"cuda"`` takes dense stacks in bfloat16, ``"triton"`` in float32 and
            float16, too; ``"reference"``, which takes the rest on a GPU, waits for the offsets in each pass.

    Returns:
        ``[T, N]``, in the dtype of ``x`` or of autocast.

    Raises:
        What :func:`lora_linear` raises.
    """
    check_backend_name(backend)
    adapters = checks.as_adapters(A, B, scaling, dropout_p)
    checks.check_grouped(x, offsets, weight, bias, adapters, training)
    return _run_grouped(x, offsets, weight, bias, with_constant_scaling(adapters, x), training, backend)


def lora_update(
    x: Tensor,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    *,
    bias: Tensor | None = None,
    adapter_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What LoRA adapters add to a layer: ``Σ s (D(x) Aᵀ) Bᵀ + b``, for a base layer that computes its own product.

    Runs in the dtype of ``x`` (or of autocast where that is on) with float32 accumulation and keeps what
    :func:`lora_linear` keeps.

    Args:
        x: ``[..., K]``, float64, float32, float16 or bfloat16.
        A, B, scaling, dropout_p, training, bias, adapter_index, backend: as in :func:`lora_linear`.

    Returns:
        ``[..., N]``, in the dtype that it ran in.

    Raises:
        What :func:`lora_linear` raises.
    """
    return update(x, bias, checks.as_adapters(A, B, scaling, dropout_p, adapter_index), training, backend)


def dora_linear(
    x: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    magnitude: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    dropout_p: float | Sequence[float] = 0.0,
    *,
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
    check_backend_name(backend)
    adapters = checks.as_adapters(A, B, scaling, dropout_p)
    checks.check_call(x, weight, bias, adapters, training)
    adapters = _with_dora_factors(with_constant_scaling(adapters, x), magnitude, norm, weight, x, backend)
    y = usual.lora_linear(x, weight, bias, adapters, training, backend)
    return _run(x, weight, bias, adapters, training, backend) if y is None else y


def dora_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    magnitude: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    norm: Tensor | Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The experts of a mixture with DoRA adapters of their own in one step: :func:`dora_linear` of each expert on its
    own rows, ``m`` and the norm being numbers of each expert's output rows.

    Nothing of the size of ``weight`` is made. Keeps what :func:`dora_linear` keeps, and the offsets.

    Args:
        magnitude: ``m [E, N]``, any floating dtype, or a list with one for each adapter.
        norm: ``‖W + s B A‖ [E, N]`` of each adapter from :func:`dora_grouped_norm`, where it is known already.
        x, offsets, weight, bias, A, B, scaling, dropout_p, training, backend: as in :func:`lora_grouped_linear`.

    Returns:
        ``[T, N]``, in the dtype of ``x`` or of autocast.

    Raises:
        What :func:`dora_linear` raises.
    """
    check_backend_name(backend)
    adapters = checks.as_adapters(A, B, scaling, dropout_p)
    checks.check_grouped(x, offsets, weight, bias, adapters, training)
    adapters = _with_dora_factors(with_constant_scaling(adapters, x), magnitude, norm, weight, x, backend)
    return _run_grouped(x, offsets, weight, bias, adapters, training, backend)


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
    checks.check_weight(weight)
    return _checked_norm(weight, A, B, scaling, backend)


def dora_grouped_norm(
    weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float | Tensor = 1.0, backend: str | None = None
) -> Tensor:
    """:func:`dora_norm` of each expert whose weights are stacked; nothing of the size of ``weight`` is made.

    Args:
        weight: ``[E, N, K]``; A: ``[E, r, K]``; B: ``[E, N, r]``; scaling: ``s``; all as in
            :func:`lora_grouped_linear`.

    Returns:
        ``[E, N]`` in float32, float64 for a float64 ``weight``.

    Raises:
        What :func:`lora_linear` raises.
    """
    checks.check_stack(weight)
    return _checked_norm(weight, A, B, scaling, backend)


def norm_in(
    dtype: torch.dtype, weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float | Tensor, backend: str | None
) -> Tensor:
    """:func:`dora_norm`, of experts :func:`dora_grouped_norm`, with ``B A`` computed in ``dtype``; unchecked."""
    like = torch.empty(0, dtype=dtype, device=weight.device)
    _, (B,), _, (factor,), *_ = with_constant_scaling(Adapters([A], [B], [], [scaling], [0.0]), like)
    return _norm(weight, A, B, factor, dtype, backend)


def adapted_linear(
    x: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    adapters: Adapters,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """:func:`lora_linear` of adapters that are put together; those with ``c = m / norm``, checked to be finite, are
    DoRA's."""
    y = usual.lora_linear(x, weight, bias, adapters, training, backend)
    if y is not None:
        return y
    check_backend_name(backend)
    checks.check_call(x, weight, bias, adapters, training)
    return _run(x, weight, bias, with_constant_scaling(adapters, x), training, backend)


def update(
    x: Tensor, bias: Tensor | None, adapters: Adapters, training: bool = True, backend: str | None = None
) -> Tensor:
    """:func:`lora_update` of adapters that are put together."""
    check_backend_name(backend)
    checks.check_update(x, bias, adapters, training)
    return _run(x, None, bias, with_constant_scaling(adapters, x), training, backend)


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
    return torch.get_autocast_dtype(x.device.type) if checks.is_autocast(x) else x.dtype


def with_constant_scaling(adapters: Adapters, x: Tensor) -> Adapters:
    """The adapters with constant numbers for scalings. A scaling that may change is multiplied into its ``B``: a
    tensor, which stays on its device, and any in a graph, which would be compiled anew for each number."""
    compiling = torch.compiler.is_compiling()
    if not compiling and not any(isinstance(s, Tensor) for s in adapters.scaling):
        return adapters
    Bs, factors = list(adapters.B), list(adapters.scaling)
    for i, s in enumerate(factors):
        if compiling or isinstance(s, Tensor):
            wide = torch.float64 if torch.float64 in (Bs[i].dtype, x.dtype) else torch.float32
            factor = s.detach().to(device=x.device, dtype=wide) if isinstance(s, Tensor) else s
            Bs[i] = Bs[i].to(wide) * factor
            factors[i] = 1.0
    return adapters._replace(B=Bs, scaling=factors)


def _with_dora_factors(
    adapters: Adapters, magnitude: Any, norm: Any, weight: Tensor | FourBit, x: Tensor, backend: str | None
) -> Adapters:
    """The adapters with ``c = m / ‖W + s B A‖``, the norms computed where none are given."""
    checks.check_count("magnitude", magnitude, len(adapters.A))
    if norm is None:
        factors = zip(adapters.A, adapters.B, adapters.scaling, strict=True)
        norm = [_norm(weight, a, b, s, input_dtype(x), backend) for a, b, s in factors]
    checks.check_count("norm", norm, len(adapters.A))
    return adapters._replace(c=checks.dora_factors(magnitude, norm, weight, x, wide_dtype(x.dtype)))


def _checked_norm(
    weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float | Tensor, backend: str | None
) -> Tensor:
    checks.check_tensor("A", A)
    checks.check_tensor("B", B)
    check_backend_name(backend)
    dtype = compute_dtype(weight)
    like = torch.empty(0, dtype=dtype, device=weight.device)
    checks.check_adapters(like, weight.shape, Adapters([A], [B], [], [scaling], [0.0]))
    return norm_in(dtype, weight, A, B, scaling, backend)


def _norm(
    weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, backend: str | None
) -> Tensor:
    data, quant, blocksize = Weight.of(weight)
    frozen = Weight(data.detach(), quant, blocksize)
    return ops.call_dora_norm(frozen, A.detach(), B.detach(), scaling, dtype, backend)


def _run(
    x: Tensor,
    weight: Tensor | FourBit | None,
    bias: Tensor | None,
    adapters: Adapters,
    training: bool,
    backend: str | None,
) -> Tensor:
    x, bias = _in_dtype(x, bias)
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    adapters = _with_seed(adapters, x, training)
    given = Weight.none(x) if weight is None else Weight.of(weight)
    return ops.call_lora_linear(ForwardCall(x, given, bias, adapters, _needs_z(adapters)), backend)


def _run_grouped(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | FourBit,
    bias: Tensor | None,
    adapters: Adapters,
    training: bool,
    backend: str | None,
) -> Tensor:
    x, bias = _in_dtype(x, bias)
    adapters = _with_seed(adapters, x, training)
    call = GroupedCall(x, offsets, Weight.of(weight), bias, adapters, _needs_z(adapters))
    return ops.call_lora_grouped_linear(call, backend)


def _needs_z(adapters: Adapters) -> bool:
    """Whether the gradient of a magnitude may be asked for."""
    return torch.is_grad_enabled() and any(factor.requires_grad for factor in adapters.c)


def _in_dtype(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in the dtype that ``x`` is computed in."""
    dtype = input_dtype(x)
    x = x if x.dtype == dtype else x.to(dtype)
    return x, bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _with_seed(adapters: Adapters, x: Tensor, training: bool) -> Adapters:
    drops = training and any(adapters.dropout_p)
    return adapters._replace(seed=dropout.dropout_seeds(len(adapters.A), x.device) if drops else None)

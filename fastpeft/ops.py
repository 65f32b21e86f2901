"""Each op's kernels for torch's dispatcher and its autograd formula. csrc/autograd.cpp has the same formula, for calls
that neither a compiler nor a dispatch mode has to see: Python's takes as long as a small layer.

The arguments are checked before, in checks.py; call.py has the schemas and the nouns.

``fastpeft::lora_linear(x, weight, quant, blocksize, bias, A, B, c, scaling, dropout_p, seed, adapter_index, keep_z,``
    ``backend) -> (y, u, z)``. ``x [..., K]``, ``bias [N]``, ``backend`` a name or None; for the others see
    :class:`fastpeft.call.Weight` and :class:`fastpeft.call.Adapters`.
    ``y [..., N]`` in the dtype of ``x``; ``u [M, Σ r]`` in float32 (float64 for float64); ``z``, if ``keep_z``, one
    ``[M, N]`` for each ``c``: what it multiplies, in the dtype of :func:`fastpeft.reference.z_dtype`. ``u`` and ``z``
    are not differentiable.
``fastpeft::lora_linear_backward(dy, x, weight, …, u, z, needs, backend) -> Tensor[]``
    the gradients of ``x, weight, bias, *A, *B, *c`` that ``needs`` asks for, in this order.
``fastpeft::lora_grouped_linear(x, offsets, weight, quant, blocksize, bias, A, B, c, scaling, dropout_p, seed,``
    ``adapter_index, keep_z, backend) -> (y, u, z)``: the same of experts that are stacked. ``x [T, K]``,
    ``weight [E, N, K]``, ``bias [E, N]``, ``A [E, r, K]``, ``B [E, N, r]``, ``c [E, N]``; expert ``e`` has rows
    ``offsets[e]:offsets[e + 1]``, ``offsets`` integers ``[E + 1]`` that ascend from 0 to ``T``. No mixed batches:
    ``adapter_index`` is None.
``fastpeft::lora_grouped_linear_backward(dy, x, offsets, weight, …, u, z, needs, backend) -> Tensor[]``
    the gradients of ``x, weight, bias, *A, *B, *c`` that ``needs`` asks for; of a stack in the layout of the stack,
    zeros for experts without rows.
``fastpeft::dora_norm(weight, quant, blocksize, A, B, scaling, dtype, backend) -> Tensor``
    ``‖W + s B A‖`` of each row, ``B A`` computed in ``dtype``: ``[N]`` in float32 (float64 for float64), of stacked
    experts ``[E, N]``; not differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .backends import reference
from .backends.base import Forward
from .call import (
    DORA_NORM_SCHEMA,
    LORA_GROUPED_LINEAR_BACKWARD_SCHEMA,
    LORA_GROUPED_LINEAR_SCHEMA,
    LORA_LINEAR_BACKWARD_SCHEMA,
    LORA_LINEAR_SCHEMA,
    Adapters,
    BackwardCall,
    ForwardCall,
    GroupedBackwardCall,
    GroupedCall,
    Kept,
    Needs,
    NormCall,
    Weight,
)
from .reference import wide_dtype, z_dtype

_LIBRARY = torch.library.Library("fastpeft", "DEF")
_NEEDS_EXACT_STRIDES = (torch.Tag.needs_exact_strides,)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_NEEDS_EXACT_STRIDES)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastpeft, name).default


def _run_forward(call: ForwardCall, backend: str | None) -> Forward:
    run = dispatch.choose("lora_linear", call.x, call.weight.data, call.adapters.factors, backend)
    return run.lora_linear(*call)


def _run_backward(call: BackwardCall, backend: str | None) -> list[Tensor]:
    run = dispatch.choose("lora_linear_backward", call.dy, call.weight.data, call.adapters.factors, backend)
    return run.lora_linear_backward(*call)


def _lora_linear_kernel(*flat: Any) -> Forward:
    return _run_forward(ForwardCall.of(flat[:-1]), flat[-1])


def _lora_linear_fake(*flat: Any) -> Forward:
    x, _, _, adapters, keep_z = ForwardCall.of(flat[:-1])
    rows, N = math.prod(x.shape[:-1]), adapters.shape[0]  # Size.numel() would turn symbols into numbers
    u = x.new_empty((rows, sum(adapters.ranks)), dtype=wide_dtype(x.dtype))
    z = [x.new_empty((rows, N), dtype=z_dtype(rows, x.dtype)) for _ in adapters.c] if keep_z else []
    return x.new_empty((*x.shape[:-1], N)), u, z


def _lora_linear_backward_kernel(*flat: Any) -> list[Tensor]:
    return _run_backward(BackwardCall.of(flat[:-1]), flat[-1])


def _lora_linear_backward_fake(*flat: Any) -> list[Tensor]:
    dy, _, weight, adapters, _, needs = BackwardCall.of(flat[:-1])
    N, K = adapters.shape
    like = [
        dy.new_empty((*dy.shape[:-1], K)) if needs.x else None,
        weight.data.new_empty(weight.data.shape) if needs.weight else None,
        dy.new_empty(N) if needs.bias else None,
        *(t.new_empty(t.shape) if need else None for t, need in zip(_factors(adapters), needs.flat[3:], strict=True)),
    ]
    return [grad for grad in like if grad is not None]


def _lora_linear_backward_batched(*flat: Any) -> list[Tensor]:
    """Of a batch of ``dy`` at once (``is_grads_batched``): the reference's operations; torch can batch each."""
    return dispatch.named("reference").lora_linear_backward(*BackwardCall.of(flat[:-1]))


def _run_grouped(call: GroupedCall, backend: str | None) -> Forward:
    run = dispatch.choose("lora_grouped_linear", call.x, call.weight.data, _factors(call.adapters), backend)
    return run.lora_grouped_linear(*call)


def _run_grouped_backward(call: GroupedBackwardCall, backend: str | None) -> list[Tensor]:
    run = dispatch.choose("lora_grouped_linear_backward", call.dy, call.weight.data, _factors(call.adapters), backend)
    return run.lora_grouped_linear_backward(*call)


def _grouped_kernel(*flat: Any) -> Forward:
    return _run_grouped(GroupedCall.of(flat[:-1]), flat[-1])


def _grouped_fake(*flat: Any) -> Forward:
    x, _, weight, bias, adapters, keep_z = GroupedCall.of(flat[:-1])
    return _lora_linear_fake(*ForwardCall(x, weight, bias, adapters, keep_z).flat(), flat[-1])


def _grouped_backward_kernel(*flat: Any) -> list[Tensor]:
    return _run_grouped_backward(GroupedBackwardCall.of(flat[:-1]), flat[-1])


def _grouped_backward_fake(*flat: Any) -> list[Tensor]:
    dy, _, _, weight, adapters, _, needs = GroupedBackwardCall.of(flat[:-1])
    N, K = adapters.shape
    like = [
        dy.new_empty((dy.shape[0], K)) if needs.x else None,
        torch.empty_like(weight.data) if needs.weight else None,
        dy.new_empty((adapters.A[0].shape[0], N)) if needs.bias else None,
        *(torch.empty_like(t) if need else None for t, need in zip(adapters.A, needs.A, strict=True)),
        *(torch.empty_like(t) if need else None for t, need in zip(adapters.B, needs.B, strict=True)),
        *(c.new_empty(c.shape) if need else None for c, need in zip(adapters.c, needs.c, strict=True)),
    ]
    return [grad for grad in like if grad is not None]


def _grouped_backward_batched(*flat: Any) -> list[Tensor]:
    """Of a batch of ``dy`` at once, as :func:`_lora_linear_backward_batched`."""
    return reference.grouped_backward(*GroupedBackwardCall.of(flat[:-1]))


def _factors(adapters: Adapters) -> tuple[Tensor, ...]:
    return *adapters.A, *adapters.B, *adapters.c


def _run_dora_norm(call: NormCall, backend: str | None) -> Tensor:
    (data, quant, _), A, B, _, dtype = call
    like = data.new_empty((0, A.shape[-1]), dtype=dtype)
    if not call.is_stacked:
        return dispatch.choose("dora_norm", like, data, (A, B), backend).dora_norm(*call)
    first = data if quant else data[0]
    return dispatch.choose("dora_norm", like, first, (A[0], B[0]), backend).dora_grouped_norm(call)


def _dora_norm_kernel(*flat: Any) -> Tensor:
    return _run_dora_norm(NormCall.of(flat[:-1]), flat[-1])


def _dora_norm_fake(*flat: Any) -> Tensor:
    weight, _, B, _, dtype = NormCall.of(flat[:-1])
    return weight.data.new_empty(B.shape[:-1], dtype=wide_dtype(dtype))


lora_linear = _define(LORA_LINEAR_SCHEMA, _lora_linear_kernel, _lora_linear_fake)
lora_linear_backward = _define(LORA_LINEAR_BACKWARD_SCHEMA, _lora_linear_backward_kernel, _lora_linear_backward_fake)
lora_grouped_linear = _define(LORA_GROUPED_LINEAR_SCHEMA, _grouped_kernel, _grouped_fake)
lora_grouped_linear_backward = _define(
    LORA_GROUPED_LINEAR_BACKWARD_SCHEMA, _grouped_backward_kernel, _grouped_backward_fake
)
for _batched in ("Batched", "FuncTorchBatched"):
    _LIBRARY.impl("lora_linear_backward", _lora_linear_backward_batched, _batched)
    _LIBRARY.impl("lora_grouped_linear_backward", _grouped_backward_batched, _batched)
dora_norm = _define(DORA_NORM_SCHEMA, _dora_norm_kernel, _dora_norm_fake)


class _LoraLinearNode(torch.autograd.Function):
    """Keeps ``x`` as it came, for ``dA`` (or ``dW``), ``u``, for ``dB``, ``z``, for ``dc``, the seed, and of stacked
    experts the offsets.

    ``forward`` takes the call, how to compute it, the backend, and once more the tensors of
    :attr:`fastpeft.call.ForwardCall.differentiable`, for autograd to see; it gives ``y, u, *z``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: ForwardCall | GroupedCall,
        compute: Callable[[Any, str | None], Forward],
        backend: str | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        y, u, z = compute(call, backend)
        weight, adapters = call.weight, call.adapters
        offsets = call.offsets if isinstance(call, GroupedCall) else None
        flags = [need and t is not None for need, t in zip(ctx.needs_input_grad[3:], tensors, strict=True)]
        needs = Needs.of(flags, len(adapters.A))
        keep_x, keep_u = needs.weight or any(needs.A), any(needs.B)
        kept = call.x if keep_x else None, u if keep_u else None, adapters.seed, adapters.adapter_index, offsets
        ctx.save_for_backward(*kept, weight.data, *_factors(adapters), *weight.quant, *z)
        ctx.settings = weight.blocksize, adapters.scaling, adapters.dropout_p, backend
        ctx.numbers = [len(some) for some in (adapters.A, adapters.B, adapters.c, weight.quant, z)]
        ctx.needs = needs
        ctx.mark_non_differentiable(u, *z)
        ctx.set_materialize_grads(False)
        return y, u, *z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None or not torch.is_grad_enabled():
            return _gradients(ctx, dy)
        with torch.no_grad():
            grads = _gradients(ctx, dy)
        origins = [t for t in (dy, *_saved(ctx)) if t is not None and t.requires_grad]
        tied = iter(_Once.apply(len(origins), *origins, *(g for g in grads if g is not None)))
        return tuple(None if g is None else next(tied) for g in grads)


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    needs: Needs = ctx.needs
    if dy is None:
        return (None,) * (3 + len(needs.flat))
    blocksize, scaling, ps, backend = ctx.settings
    x, u, seed, index, offsets, data, *rest = _saved(ctx)
    A, B, c, quant, z = (list(islice(saved, number)) for saved in [iter(rest)] for number in ctx.numbers)
    weight, adapters = Weight(data, quant, blocksize), Adapters(A, B, c, scaling, ps, seed, index)
    watched = _is_watched(dy) or _is_batched(dy)
    if offsets is None:
        call = BackwardCall(dy, x, weight, adapters, Kept(u, z), needs)
        grads = iter(lora_linear_backward(*call.flat(), backend) if watched else _run_backward(call, backend))
    else:
        stacked = GroupedBackwardCall(dy, x, offsets, weight, adapters, Kept(u, z), needs)
        op = lora_grouped_linear_backward
        grads = iter(op(*stacked.flat(), backend) if watched else _run_grouped_backward(stacked, backend))
    return None, None, None, *(next(grads) if need else None for need in needs.flat)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What was kept; who changed it in place hears what to do about it."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{error} If it is a layer's input: fastpeft keeps the input itself, where PEFT may keep a copy. Change it "
            "out of place, or give the layer a clone."
        ) from error


class _Once(torch.autograd.Function):
    """Gradients that raise when they are differentiated by anything that they depend on: torch's once_differentiable
    ties them to nothing, and who asks for a second derivative without minding unused inputs would be given zeros."""

    @staticmethod
    def forward(ctx: Any, count: int, *origins_and_grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.detach() for grad in origins_and_grads[count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def _with_autograd(
    call: ForwardCall | GroupedCall, compute: Callable[[Any, str | None], Forward], backend: str | None
) -> Forward:
    """What ``torch.library.register_autograd`` would generate, without its per-call reflection; it matters for small
    layers."""
    tensors = call.differentiable
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, u, *z = _LoraLinearNode.apply(call, compute, backend, *tensors)
        return y, u, z
    return compute(call, backend)


def _lora_linear_autograd(keyset: torch._C.DispatchKeySet, *flat: Any) -> Forward:
    def below(call: ForwardCall, backend: str | None) -> Forward:
        with torch._C._AutoDispatchBelowAutograd():
            return lora_linear.redispatch(keyset & torch._C._after_autograd_keyset, *call.flat(), backend)

    return _with_autograd(ForwardCall.of(flat[:-1]), below, flat[-1])


def _grouped_autograd(keyset: torch._C.DispatchKeySet, *flat: Any) -> Forward:
    def below(call: GroupedCall, backend: str | None) -> Forward:
        with torch._C._AutoDispatchBelowAutograd():
            return lora_grouped_linear.redispatch(keyset & torch._C._after_autograd_keyset, *call.flat(), backend)

    return _with_autograd(GroupedCall.of(flat[:-1]), below, flat[-1])


_LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("lora_grouped_linear", _grouped_autograd, "Autograd", with_keyset=True)


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether anything has to see the op itself: a compiler, tracer, dispatch mode, transform, profiler or subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or not all(t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)
    )


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation may ask for what the op cannot give."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for a batch of tensors, as ``torch.autograd.grad(..., is_grads_batched=True)`` makes them."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._functorch.is_batchedtensor(tensor)


def call_lora_linear(call: ForwardCall, backend: str | None) -> Tensor:
    """The op's ``y``, without the way through torch's dispatcher where nobody is there to see it, and with the node of
    csrc/autograd.cpp where the backend has it: both ways are a third of a small layer's time.

    The op has one derivative, backwards. Where another kind may be asked for, by ``torch.func`` or in forward mode, the
    reference's equations are computed as operations that torch can differentiate and transform: slower, and right.
    """
    if is_transformed():
        return reference.forward(call.x, call.weight, call.bias, call.adapters)[0]
    if _is_watched(*call.differentiable):
        return lora_linear(*call.flat(), backend)[0]
    run = dispatch.choose("lora_linear", call.x, call.weight.data, call.adapters.factors, backend)
    y = run.with_gradient(*call)
    return _with_autograd(call, lambda call, _: run.lora_linear(*call), backend)[0] if y is None else y


def call_lora_grouped_linear(call: GroupedCall, backend: str | None) -> Tensor:
    """As :func:`call_lora_linear`."""
    if is_transformed():
        return reference.grouped(*call[:-1])[0]
    if _is_watched(call.offsets, *call.differentiable):
        return lora_grouped_linear(*call.flat(), backend)[0]
    return _with_autograd(call, _run_grouped, backend)[0]


def call_dora_norm(
    weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, backend: str | None
) -> Tensor:
    """As :func:`call_lora_linear`."""
    call = NormCall(weight, A, B, scaling, dtype)
    if is_transformed():
        return _run_dora_norm(call, "reference")
    if _is_watched(weight.data, A, B):
        return dora_norm(*call.flat(), backend)
    return _run_dora_norm(call, backend)

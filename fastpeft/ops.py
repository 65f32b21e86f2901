"""Each op's schema, fake and autograd formula. Shapes are checked before, in functional.py. csrc/autograd.cpp has the
same node for calls that nobody watches, as Python's takes as long as a small layer.

``fastpeft::lora_linear(x, weight, quant, blocksize, bias, A, B, c, scaling, dropout_p, seed, adapter_index, keep_z,``
    ``backend) -> (y, u, z)``. ``x [..., K]``; ``weight [N, K]`` (any strides) with an empty ``quant``, or nf4.py's
    packed bytes with its ``quant`` and ``blocksize``; ``bias [N]``; lists ``A [r, K]``, ``B [N, r]``, ``scaling`` and
    ``dropout_p``, one entry an adapter; ``c`` DoRA's factors ``m / norm``, ``[N]`` in float32 (float64 for float64),
    one an adapter, empty for LoRA; ``seed`` int64, one entry an adapter, None when nothing is dropped;
    ``adapter_index`` integers ``[...]``, the adapter that serves each token, -1 for none; ``backend`` a name or None.
    ``y [..., N]`` in the dtype of ``x``; ``u [M, Σ r]`` in float32 (float64 for float64); ``z``, if ``keep_z``, one
    ``[M, N]`` for each ``c``: what it multiplies, in the dtype of ``x``, or in that of ``u`` where ``M`` is 1 and no
    sum averages its rounding. ``u`` and ``z`` are not differentiable.
``fastpeft::lora_linear_backward(dy, x, weight, quant, blocksize, A, B, c, u, z, …, needs, backend) -> Tensor[]``
    the gradients of ``x, weight, bias, *A, *B, *c`` that ``needs`` asks for, in this order.
``fastpeft::dora_norm(weight, quant, blocksize, A, B, scaling, dtype, backend) -> Tensor``
    ``‖W + s B A‖`` of each row, ``B A`` computed in ``dtype``: ``[N]`` in float32 (float64 for float64); not
    differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .reference import wide_dtype

Forward = tuple[Tensor, Tensor, list[Tensor]]

_LIBRARY = torch.library.Library("fastpeft", "DEF")
_NEEDS_EXACT_STRIDES = (torch.Tag.needs_exact_strides,)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_NEEDS_EXACT_STRIDES)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastpeft, name).default


def _lora_linear_dispatch(
    x: Tensor,
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    bias: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    c: list[Tensor],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    keep_z: bool,
    backend: str | None,
) -> Forward:
    run = dispatch.choose("lora_linear", x, weight, A, B, backend)
    return run.lora_linear(x, weight, quant, blocksize, bias, A, B, c, scaling, dropout_p, seed, adapter_index, keep_z)


def _lora_linear_fake(
    x: Tensor,
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    keep_z: bool,
    backend: str | None,
) -> Forward:
    rows = math.prod(x.shape[:-1])  # Size.numel() would turn symbols into numbers
    y = x.new_empty((*x.shape[:-1], B[0].shape[0]))
    u = x.new_empty((rows, sum(a.shape[0] for a in A)), dtype=wide_dtype(x.dtype))
    like_z = u if rows == 1 else y
    return y, u, [like_z.new_empty((rows, B[0].shape[0])) for _ in c] if keep_z else []


def _lora_linear_backward_dispatch(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    A: list[Tensor],
    B: list[Tensor],
    c: list[Tensor],
    u: Tensor | None,
    z: list[Tensor],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    needs: list[bool],
    backend: str | None,
) -> list[Tensor]:
    run = dispatch.choose("lora_linear_backward", dy, weight, A, B, backend)
    return run.lora_linear_backward(
        dy, x, weight, quant, blocksize, A, B, c, u, z, scaling, dropout_p, seed, adapter_index, needs
    )


def _lora_linear_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[Tensor],
    u: Tensor | None,
    z: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    needs: Sequence[bool],
    backend: str | None,
) -> list[Tensor]:
    like = [
        dy.new_empty((*dy.shape[:-1], A[0].shape[1])) if needs[0] else None,
        weight.new_empty(weight.shape) if needs[1] else None,
        dy.new_empty(B[0].shape[0]) if needs[2] else None,
        *(a.new_empty(a.shape) if need else None for a, need in zip((*A, *B, *c), needs[3:], strict=True)),
    ]
    return [grad for grad in like if grad is not None]


def _dora_norm_dispatch(
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    like = weight.new_empty((0, A.shape[1]), dtype=dtype)
    run = dispatch.choose("dora_norm", like, weight, [A], [B], backend)
    return run.dora_norm(weight, quant, blocksize, A, B, scaling, dtype)


def _dora_norm_fake(
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    return weight.new_empty(B.shape[0], dtype=wide_dtype(dtype))


_WEIGHT = "Tensor weight, Tensor[] quant, int blocksize"
_ADAPTERS = "Tensor[] A, Tensor[] B, Tensor[] c"
_SETTINGS = "float[] scaling, float[] dropout_p, Tensor? seed, Tensor? adapter_index"

lora_linear = _define(
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, {_ADAPTERS}, {_SETTINGS}, bool keep_z, str? backend) "
    "-> (Tensor, Tensor, Tensor[])",
    _lora_linear_dispatch,
    _lora_linear_fake,
)
lora_linear_backward = _define(
    f"lora_linear_backward(Tensor dy, Tensor? x, {_WEIGHT}, {_ADAPTERS}, Tensor? u, Tensor[] z, {_SETTINGS}, "
    "bool[] needs, str? backend) -> Tensor[]",
    _lora_linear_backward_dispatch,
    _lora_linear_backward_fake,
)

dora_norm = _define(
    f"dora_norm({_WEIGHT}, Tensor A, Tensor B, float scaling, ScalarType dtype, str? backend) -> Tensor",
    _dora_norm_dispatch,
    _dora_norm_fake,
)


class _Settings(NamedTuple):
    """What of the op's arguments is no tensor, or none that a gradient flows into."""

    keyset: torch._C.DispatchKeySet | None
    quant: list[Tensor]
    blocksize: int
    scaling: list[float]
    dropout_p: list[float]
    keep_z: bool
    backend: str | None


class _LoraLinearNode(torch.autograd.Function):
    """Keeps ``x`` as it came, for ``dA`` (or ``dW``), ``u``, for ``dB``, ``z``, for ``dc``, and the seed.

    The arguments are the op's with the lists of adapters unrolled at the end; the results ``y, u, *z``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        seed: Tensor | None,
        adapter_index: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *ABc: Tensor,
    ) -> tuple[Tensor, ...]:
        keyset, quant, blocksize, scaling, dropout_p, keep_z, backend = settings
        count = len(scaling)
        A, B, c = ABc[:count], ABc[count : 2 * count], ABc[2 * count :]
        y, u, z = _below_autograd(
            *(keyset, x, weight, quant, blocksize, bias, A, B, c),
            *(scaling, dropout_p, seed, adapter_index, keep_z, backend),
        )
        _, _, _, need_x, need_weight, need_bias, *need_ABc = ctx.needs_input_grad
        keep_x = need_weight or any(need_ABc[:count])
        keep_u = any(need_ABc[count : 2 * count])
        kept = x if keep_x else None, weight, u if keep_u else None, seed, adapter_index
        ctx.save_for_backward(*kept, *quant, *ABc, *z)
        ctx.call = settings, [need_x, need_weight, need_bias and bias is not None, *need_ABc]
        ctx.mark_non_differentiable(u, *z)
        ctx.set_materialize_grads(False)
        return y, u, *z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None or not torch.is_grad_enabled():
            return _gradients(ctx, dy)
        with torch.no_grad():
            grads = _gradients(ctx, dy)
        origins = [t for t in (dy, *ctx.saved_tensors) if t is not None and t.requires_grad]
        tied = iter(_Once.apply(len(origins), *origins, *(g for g in grads if g is not None)))
        return tuple(None if g is None else next(tied) for g in grads)


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    (_, quant, blocksize, scaling, dropout_p, _, backend), needs = ctx.call
    if dy is None:
        return (None,) * (3 + len(needs))
    x, weight, u, seed, adapter_index, *kept = ctx.saved_tensors
    quant, kept = kept[: len(quant)], kept[len(quant) :]
    count, parameters = len(scaling), len(needs) - 3
    A, B, c, z = kept[:count], kept[count : 2 * count], kept[2 * count : parameters], kept[parameters:]
    run = lora_linear_backward if _is_watched(dy) else _lora_linear_backward_dispatch
    operands = dy, x, weight, quant, blocksize, A, B, c, u, z
    grads = iter(run(*operands, scaling, dropout_p, seed, adapter_index, needs, backend))
    return None, None, None, *(next(grads) if need else None for need in needs)


class _Once(torch.autograd.Function):
    """Gradients that raise when they are differentiated by anything that they depend on: torch's once_differentiable
    ties them to nothing, and who asks for a second derivative without minding unused inputs would be given zeros."""

    @staticmethod
    def forward(ctx: Any, count: int, *origins_and_grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.detach() for grad in origins_and_grads[count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def _below_autograd(keyset: torch._C.DispatchKeySet | None, *args: Any) -> Forward:
    if keyset is None:
        return _lora_linear_dispatch(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return lora_linear.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _lora_linear_autograd(
    keyset: torch._C.DispatchKeySet | None,
    x: Tensor,
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    bias: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    c: list[Tensor],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    keep_z: bool,
    backend: str | None,
) -> Forward:
    """What ``torch.library.register_autograd`` would generate, without its per-call reflection; it matters for small
    layers. ``keyset`` is None where the op was not called through torch's dispatcher."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *A, *B, *c)):
        settings = _Settings(keyset, quant, blocksize, scaling, dropout_p, keep_z, backend)
        y, u, *z = _LoraLinearNode.apply(settings, seed, adapter_index, x, weight, bias, *A, *B, *c)
        return y, u, z
    operands = x, weight, quant, blocksize, bias, A, B, c
    return _below_autograd(keyset, *operands, scaling, dropout_p, seed, adapter_index, keep_z, backend)


_LIBRARY.impl("lora_linear", _lora_linear_autograd, "Autograd", with_keyset=True)


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


def call_lora_linear(
    x: Tensor,
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    bias: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    c: list[Tensor],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    keep_z: bool,
    backend: str | None,
) -> Tensor:
    """The op's ``y``, without the way through torch's dispatcher where nobody is there to see it, and with the node of
    csrc/autograd.cpp where the backend has it: both ways are a third of a small layer's time."""
    args = x, weight, quant, blocksize, bias, A, B, c, scaling, dropout_p, seed, adapter_index, keep_z
    if _is_watched(x, weight, bias, *A, *B, *c):
        return lora_linear(*args, backend)[0]
    run = dispatch.choose("lora_linear", x, weight, A, B, backend)
    with_gradient = getattr(run, "with_gradient", None)
    y = with_gradient(*args) if with_gradient is not None else None
    return _lora_linear_autograd(None, *args, backend)[0] if y is None else y


def call_dora_norm(
    weight: Tensor,
    quant: list[Tensor],
    blocksize: int,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    """As :func:`call_lora_linear`."""
    run = dora_norm if _is_watched(weight, A, B) else _dora_norm_dispatch
    return run(weight, quant, blocksize, A, B, scaling, dtype, backend)

"""The ops on a GPU, out of kernels and the vendor's products. The backends for GPUs bring the kernels.

A :class:`Kernels` is a set of kernels; how a product with W is put together of them says gpu_plans.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import dropout_scale, dropout_threshold
from . import gpu_plans
from .gpu_plans import FUSED, Plan, Product
from .operands import contiguous, operand_refusal


class Mask(NamedTuple):
    """One adapter's dropout; a threshold of 0 drops nothing. ``seed`` stays on the GPU."""

    threshold: int
    factor: float
    seed: Tensor | None

    @classmethod
    def of(cls, p: float, seed: Tensor | None, adapter: int) -> Mask:
        if seed is None:
            return NO_MASK
        threshold = dropout_threshold(p)
        return cls(threshold, dropout_scale(p) if threshold else 1.0, seed.select(0, adapter))


NO_MASK = Mask(0, 1.0, None)


class Tail(NamedTuple):
    """What follows a product: ``scale q [M, r] · right [N, r]ᵀ`` is added (``q`` float32), where dropout keeps it when
    ``threshold`` is not 0; then DoRA's ``c [N]`` and its ``z [M, N]``, and the bias ``[N]``."""

    q: Tensor
    right: Tensor
    scale: float
    threshold: int = 0
    seed: Tensor | None = None
    c: Tensor | None = None
    z: Tensor | None = None
    bias: Tensor | None = None


class DyGradients(NamedTuple):
    """What flows from ``dy [M, N]`` into one adapter, None where it is not asked for: ``dB [N, r]`` and ``dc [N]`` in
    float32, ``dz = c ∘ dy`` in the dtype of ``dy``."""

    dB: Tensor | None
    dc: Tensor | None
    dz: Tensor | None


class Kernels(Protocol):
    """What a backend for GPUs brings. Matrices have any strides unless it is said; ``q``, ``u``, ``v`` are float32."""

    def lora_down(self, x: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask], index: Tensor | None) -> None:
        """Writes every adapter's ``keep ∘ x Aᵀ`` to its columns of ``u [M, Σ r]``, contiguous; 0 where ``index [M]``
        names another one."""

    def lora_dy(
        self,
        dy: Tensor,
        B: Tensor,
        u: Tensor | None,
        scale: float,
        index: Tensor | None,
        adapter: int,
        c: Tensor | None,
        z: Tensor | None,
        v: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> DyGradients:
        """``dB = (c ∘ dy)ᵀ scale u``, ``dc = Σ dy ∘ z``, ``dz``, as ``needs`` says; writes ``scale (c ∘ dy) B`` to
        ``v``, 0 where ``index`` names another adapter."""

    def lora_dA(self, x: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """``vᵀ (keep ∘ x) [r, K]`` in float32."""

    def lora_up(self, base: Tensor, second: Tensor | None, y: Tensor, tail: Tail) -> None:
        """Writes a product ``base [M, N]`` with its ``tail`` to ``y``, which may be ``base``; ``second``: ``D(x) Wᵀ``.
        Rows of ``base`` and ``second`` are equally far apart, and contiguous each."""

    def fused_plans(self, x: Tensor, weight: Tensor, rank: int) -> tuple[Plan, ...]:
        """Those of ``gpu_plans.FUSED`` that :meth:`lora_linear` has for these operands."""

    def lora_linear(
        self, plan: Plan, x: Tensor, weight: Tensor, y: Tensor, tail: Tail, input_factor: float = 0.0
    ) -> None:
        """Writes ``x Wᵀ`` with its ``tail`` to ``y [M, N]``. With an ``input_factor`` the mask is the input's: DoRA
        over ``D(x) = input_factor · keep ∘ x``. With 0 it is the low-rank part's, as in the gradient of x."""

    def dropout(self, x: Tensor, mask: Mask) -> Tensor:
        """``factor · keep ∘ x``, contiguous."""

    def dora_norm(
        self,
        weight: Tensor,
        quant: Sequence[Tensor],
        blocksize: int,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """See ops.py."""

    def four_bit_decode(
        self, packed: Tensor, quant: Sequence[Tensor], blocksize: int, N: int, K: int, dtype: torch.dtype
    ) -> Tensor:
        """W, dense."""


def refusal(x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> str | None:
    """Why these ops cannot take a call, whatever the kernels; None when they can."""
    if torch.version.hip is not None:
        return "it was never tried on AMD GPUs"
    return operand_refusal(x, weight, A, B)


def _in_memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (
        torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        if value._is_zerotensor()
        else value.resolve_neg()
    )


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels are launched on torch's current device, which need not be the first tensor's, and read memory: tensors
    that are lazily negated, or zeros without memory, are put there."""

    @wraps(op)
    def run(kernels: Kernels, *args: Any) -> Any:
        args = tuple([_in_memory(t) for t in a] if isinstance(a, (list, tuple)) else _in_memory(a) for a in args)
        with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
            return op(kernels, *args)

    return run


@_on_its_device
def lora_linear(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    quant: Sequence[Tensor],
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
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See ops.py."""
    x2, N, c = matrix(x), B[0].shape[0], contiguous(c)
    M, K = x2.shape
    bias = None if bias is None else bias.contiguous()
    masks = [Mask.of(p, seed, i) for i, p in enumerate(dropout_p)]
    index = None if adapter_index is None else adapter_index.reshape(-1)
    u = x.new_empty((M, sum(a.shape[0] for a in A)), dtype=torch.float32)
    z = [x.new_empty((M, N), dtype=torch.float32 if M == 1 else x.dtype) for _ in c] if keep_z else []
    if M == 0:
        return x.new_empty((*x.shape[:-1], N)), u, z
    dense = _dense(kernels, weight, quant, blocksize, N, K, x.dtype)
    scales = [s * mask.factor for s, mask in zip(scaling, masks, strict=True)]
    kernels.lora_down(x2, A, u, masks, index)
    if not c:
        y = product(kernels, x2, dense, Tail(u, *_side_by_side(B, scales), bias=bias))
    else:
        tails = [
            Tail(part, b, scale, c=factor, z=z[i] if z else None)
            for i, (part, b, scale, factor) in enumerate(zip(parts_of(u, A), B, scales, c, strict=True))
        ]
        tails[-1] = tails[-1]._replace(bias=bias)
        y = dora_product(kernels, x2, dense, tails, masks)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], N), u, z


@_on_its_device
def lora_linear_backward(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant: Sequence[Tensor],
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
) -> list[Tensor]:
    """See ops.py."""
    count, N, K, c = len(A), B[0].shape[0], A[0].shape[1], contiguous(c)
    need_x, need_weight, need_bias = needs[:3]
    need_A, need_B, need_c = needs[3 : 3 + count], needs[3 + count : 3 + 2 * count], needs[3 + 2 * count :]
    dy2, x2 = matrix(dy), None if x is None else matrix(x)
    M, ranks = dy2.shape[0], [a.shape[0] for a in A]
    if M == 0:
        like = [dy.new_empty((*dy.shape[:-1], K)), weight, dy.new_empty(N), *A, *B, *c]
        return [torch.zeros_like(t) for t, need in zip(like, needs, strict=True) if need]
    if need_x or need_weight:
        weight = _dense(kernels, weight, quant, blocksize, N, K, dy.dtype)
    masks = [Mask.of(p, seed, i) for i, p in enumerate(dropout_p)]
    index = None if adapter_index is None else adapter_index.reshape(-1)
    v = dy.new_empty((M, sum(ranks)), dtype=torch.float32)
    v_parts, u_parts = parts_of(v, A), None if u is None else parts_of(u, A)
    dA, dB, dc = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    flowing = dy2  # into what is below the adapters that were passed
    branches: list[tuple[Mask, Tensor]] = []  # what flows into D(x) Wᵀ: DoRA with dropout
    for i in reversed(range(count)):
        need_v = need_x or need_A[i]
        wanted = need_B[i], bool(c) and need_c[i], bool(c) and (i > 0 or need_x or need_weight)
        if not need_v and not any(wanted):
            continue
        out = kernels.lora_dy(
            *(flowing, B[i], u_parts[i] if u_parts and need_B[i] else None, scaling[i] * masks[i].factor, index, i),
            *(c[i] if c else None, z[i] if z else None, v_parts[i] if need_v else None, wanted),
        )
        if out.dB is not None:
            dB[i] = out.dB.to(B[i].dtype)
        if out.dc is not None:
            dc[i] = out.dc
        if need_A[i]:
            assert x2 is not None
            dA[i] = kernels.lora_dA(x2, v_parts[i], masks[i]).to(A[i].dtype)
        if out.dz is not None and masks[i].threshold:
            branches.append((masks[i], out.dz - flowing))
        elif out.dz is not None:
            flowing = out.dz
    grads: list[Tensor] = []
    if need_x:
        dx = _dx(kernels, flowing, weight, A, v, masks)
        for mask, branch in branches:
            dx = dx + kernels.dropout(branch @ weight, mask)
        grads.append(dx.view(*dy.shape[:-1], K))
    if need_weight:
        assert x2 is not None
        dW = flowing.t() @ x2
        for mask, branch in branches:
            dW = dW + branch.t() @ kernels.dropout(x2, mask)
        grads.append(dW.to(weight.dtype))
    if need_bias:
        grads.append(dy2.sum(0, dtype=torch.float32).to(dy.dtype))
    return grads + [grad for some in (dA, dB, dc) for _, grad in sorted(some.items())]


@_on_its_device
def dora_norm(
    kernels: Kernels,
    weight: Tensor,
    quant: Sequence[Tensor],
    blocksize: int,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ops.py."""
    return kernels.dora_norm(weight, quant, blocksize, A, B, scaling, dtype)


def _plan(kernels: Kernels, x: Tensor, weight: Tensor, tail: Tail, masked: bool) -> Plan:
    endings = [name for name, present in (("scaled", tail.c is not None), ("masked", masked)) if present]
    (M, K), N = x.shape, weight.shape[0]
    what = Product(M, K, N, gpu_plans.name_of(x.dtype), ", ".join(endings) or "plain")
    return gpu_plans.choose(what, x.device, kernels.fused_plans(x, weight, tail.q.shape[1]))


def product(kernels: Kernels, x: Tensor, weight: Tensor, tail: Tail, plan: Plan | None = None) -> Tensor:
    """``x Wᵀ`` and its tail, without DoRA's second input; by the plan chosen for it unless one is given."""
    plan = plan or _plan(kernels, x, weight, tail, tail.threshold > 0)
    if plan in FUSED:
        y = x.new_empty((x.shape[0], weight.shape[0]))
        kernels.lora_linear(plan, x, weight, y, tail)
        return y
    if plan is Plan.epilogue:
        y = F.linear(x, weight)
        kernels.lora_up(y, None, y, tail)
        return y
    q = torch.mul(tail.q, tail.scale, out=x.new_empty(tail.q.shape))
    y = F.linear(q, tail.right.to(x.dtype), tail.bias)
    return y.addmm_(x, weight.t())


def dora_product(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    tails: Sequence[Tail],
    masks: Sequence[Mask],
    plan: Plan | None = None,
) -> Tensor:
    """DoRA's adapters one after the other, each on the result of those before it."""
    mask = masks[0]
    plan = plan or _plan(kernels, x, weight, tails[0], mask.threshold > 0)
    if len(tails) == 1 and plan in FUSED:
        y = x.new_empty((x.shape[0], weight.shape[0]))
        if mask.threshold:
            tail = tails[0]._replace(threshold=mask.threshold, seed=mask.seed)
            kernels.lora_linear(plan, x, weight, y, tail, mask.factor)
        else:
            kernels.lora_linear(plan, x, weight, y, tails[0])
        return y
    y = F.linear(x, weight)
    for tail, mask in zip(tails, masks, strict=True):
        second = F.linear(kernels.dropout(x, mask), weight) if mask.threshold else None
        kernels.lora_up(y, second, y, tail)
    return y


def _side_by_side(B: Sequence[Tensor], scales: Sequence[float]) -> tuple[Tensor, float]:
    """The adapters' right operands as one, and a common scale."""
    if len(B) == 1:
        return B[0], scales[0]
    return torch.cat([b.float() * s for b, s in zip(B, scales, strict=True)], dim=1), 1.0


def _dx(kernels: Kernels, dy: Tensor, weight: Tensor, A: Sequence[Tensor], v: Tensor, masks: Sequence[Mask]) -> Tensor:
    """``dy W + Σ keep ∘ (v A)``; each mask takes a sweep of its own over the result."""
    if not any(mask.threshold for mask in masks):
        A_all = A[0] if len(A) == 1 else torch.cat([a.float() for a in A])
        return product(kernels, dy, weight.t(), Tail(v, A_all.t(), 1.0))
    parts = parts_of(v, A)
    tails = [Tail(part, a.t(), 1.0, mask.threshold, mask.seed) for part, a, mask in zip(parts, A, masks, strict=True)]
    dx = product(kernels, dy, weight.t(), tails[0])
    for tail in tails[1:]:
        kernels.lora_up(dx, None, dx, tail)
    return dx


def _dense(
    kernels: Kernels, weight: Tensor, quant: Sequence[Tensor], blocksize: int, N: int, K: int, dtype: torch.dtype
) -> Tensor:
    return kernels.four_bit_decode(weight, quant, blocksize, N, K, dtype) if quant else weight


def parts_of(u: Tensor, A: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each adapter's columns of ``u [..., Σ r]``."""
    return (u,) if len(A) == 1 else u.split([a.shape[0] for a in A], dim=-1)


def matrix(x: Tensor) -> Tensor:
    """``x [..., K]`` with its leading dimensions as one."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])

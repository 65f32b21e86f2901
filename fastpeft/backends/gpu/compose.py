"""The ops on a GPU for the backend ``triton``: its kernels and the vendor's products, in the order that they run in.

plans.py says which of them compute a product with W.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ...call import Adapters, Kept, Needs, Weight
from ...reference import z_dtype
from ..base import Forward
from ..compiled import STACKED, operand_refusal
from . import plans
from .kernel_set import DyNeeds, DyOperands, Kernels, Mask, Tail
from .plans import SHARED, Plan, Product


def refusal(x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
    """Why these ops cannot take a call, whatever the kernels; None when they can."""
    if weight.dim() != STACKED and any(factor.dim() == STACKED for factor in factors):
        return "it has no kernels for experts in 4 bits"
    return untried() or operand_refusal(x, weight, factors)


def untried() -> str | None:
    """Whether this torch's GPUs are ones that nobody tried."""
    return None if torch.version.hip is None else "it was never tried on AMD GPUs"


def lora_linear(
    kernels: Kernels, x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool
) -> Forward:
    """See ops.py."""
    with on_the_device_of(x):
        x2, adapters, (N, K) = matrix(in_memory(x)), _in_memory(adapters), adapters.shape
        A, B, c, scaling, dropout_p, seed, index = adapters
        M = x2.shape[0]
        u = x.new_empty((M, sum(adapters.ranks)), dtype=torch.float32)
        z = [x.new_empty((M, N), dtype=z_dtype(M, x.dtype)) for _ in c] if keep_z else []
        if M == 0:
            return x.new_empty((*x.shape[:-1], N)), u, z
        bias = None if bias is None else in_memory(bias).contiguous()
        masks = [Mask.of(p, seed, i) for i, p in enumerate(dropout_p)]
        dense = _dense(kernels, weight, N, K, x.dtype)
        scales = [s * mask.factor for s, mask in zip(scaling, masks, strict=True)]
        kernels.lora_down(x2, A, u, masks, None if index is None else index.reshape(-1))
        if not c:
            y = product(kernels, x2, dense, Tail(u, *_side_by_side(B, scales), bias=bias))
        else:
            assert dense is not None
            tails = [
                Tail(part, b, scale, c=factor, z=z[i] if z else None)
                for i, (part, b, scale, factor) in enumerate(zip(parts_of(u, A), B, scales, c, strict=True))
            ]
            tails[-1] = tails[-1]._replace(bias=bias)
            y = dora_product(kernels, x2, dense, tails, masks)
        return with_leading_shape_of(x, y), u, z


def lora_linear_backward(
    kernels: Kernels, dy: Tensor, x: Tensor | None, weight: Weight, adapters: Adapters, kept: Kept, needs: Needs
) -> list[Tensor]:
    """See ops.py."""
    with on_the_device_of(dy):
        adapters, (N, K) = _in_memory(adapters), adapters.shape
        A, B, c, scaling, dropout_p, seed, index = adapters
        dy2, x2 = matrix(in_memory(dy)), None if x is None else matrix(in_memory(x))
        M = dy2.shape[0]
        if M == 0:
            like = [dy.new_empty((*dy.shape[:-1], K)), weight.data, dy.new_empty(N), *A, *B, *c]
            return [torch.zeros_like(t) for t, need in zip(like, needs.flat, strict=True) if need]
        dense = _dense(kernels, weight, N, K, dy.dtype) if needs.x or needs.weight else None
        masks = [Mask.of(p, seed, i) for i, p in enumerate(dropout_p)]
        index = None if index is None else index.reshape(-1)
        v = dy.new_empty((M, sum(adapters.ranks)), dtype=torch.float32)
        v_parts, u_parts = parts_of(v, A), None if kept.u is None else parts_of(kept.u, A)
        dA, dB, dc = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
        flowing = dy2  # into what is below the adapters that were passed
        branches: list[tuple[Mask, Tensor]] = []  # what flows into D(x) Wᵀ: DoRA with dropout
        for i in reversed(range(len(adapters.A))):
            need_v = needs.x or needs.A[i]
            wanted = DyNeeds(needs.B[i], bool(c) and needs.c[i], bool(c) and (i > 0 or needs.x or needs.weight))
            if not need_v and not any(wanted):
                continue
            operands = DyOperands(
                *(B[i], u_parts[i] if u_parts and wanted.dB else None, scaling[i] * masks[i].factor, index, i),
                c=c[i] if c else None,
                z=kept.z[i] if kept.z else None,
            )
            out = kernels.lora_dy(flowing, operands, v_parts[i] if need_v else None, wanted)
            if out.dB is not None:
                dB[i] = out.dB.to(B[i].dtype)
            if out.dc is not None:
                dc[i] = out.dc
            if needs.A[i]:
                assert x2 is not None
                dA[i] = kernels.lora_dA(x2, v_parts[i], masks[i]).to(A[i].dtype)
            if out.dz is not None and masks[i].threshold:
                branches.append((masks[i], out.dz - flowing))
            elif out.dz is not None:
                flowing = out.dz
        grads: list[Tensor] = []
        if needs.x:
            dx = _dx(kernels, flowing, dense, A, v, masks)
            for mask, branch in branches:
                assert dense is not None
                dx = dx + kernels.dropout(branch @ dense, mask)
            grads.append(with_leading_shape_of(dy, dx))
        if needs.weight:
            assert x2 is not None
            dW = flowing.t() @ x2
            for mask, branch in branches:
                dW = dW + branch.t() @ kernels.dropout(x2, mask)
            grads.append(dW.to(weight.data.dtype))
        if needs.bias:
            grads.append(dy2.sum(0, dtype=torch.float32).to(dy.dtype))
        return grads + [grad for some in (dA, dB, dc) for _, grad in sorted(some.items())]


def dora_norm(kernels: Kernels, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """See ops.py."""
    with on_the_device_of(A):
        weight = weight._replace(data=in_memory(weight.data))
        return kernels.dora_norm(weight, in_memory(A), in_memory(B), scaling, dtype)


def in_memory(tensor: Tensor) -> Tensor:
    """The same values where kernels can read them: a tensor may be lazily negated, or zeros without memory."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg()


def _in_memory(adapters: Adapters) -> Adapters:
    """And DoRA's factors contiguous, as every kernel reads them."""
    A, B, c = ([in_memory(t) for t in some] for some in adapters[:3])
    return Adapters(A, B, [factor.contiguous() for factor in c], *adapters[3:])


def on_the_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on torch's current device, which need not be the first tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _plan(kernels: Kernels, x: Tensor, weight: Tensor, tail: Tail, masked: bool) -> Plan:
    endings = [name for name, present in (("scaled", tail.c is not None), ("masked", masked)) if present]
    (M, K), N = x.shape, weight.shape[0]
    what = Product(M, K, N, plans.name_of(x.dtype), ", ".join(endings) or "plain")
    return plans.choose(what, x.device, kernels.shared_plans(x, weight, tail.q.shape[1]))


def product(kernels: Kernels, x: Tensor, weight: Tensor | None, tail: Tail, plan: Plan | None = None) -> Tensor:
    """``x Wᵀ`` and its tail, without DoRA's second input; by the plan chosen for it unless one is given. None for a
    weight: the tail alone."""
    if weight is None:
        y = x.new_zeros((x.shape[0], tail.right.shape[0]))
        kernels.lora_up(y, None, y, tail)
        return y
    plan = plan or _plan(kernels, x, weight, tail, tail.threshold > 0)
    if plan in SHARED:
        y = x.new_empty((x.shape[0], weight.shape[0]))
        kernels.lora_linear(plan, x, weight, y, tail)
        return y
    if plan is Plan.base_first:
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
    if len(tails) == 1 and plan in SHARED:
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


def _dx(
    kernels: Kernels, dy: Tensor, weight: Tensor | None, A: Sequence[Tensor], v: Tensor, masks: Sequence[Mask]
) -> Tensor:
    """``dy W + Σ keep ∘ (v A)``; each mask takes a sweep of its own over the result."""
    across = None if weight is None else weight.t()
    if not any(mask.threshold for mask in masks):
        A_all = A[0] if len(A) == 1 else torch.cat([a.float() for a in A])
        return product(kernels, dy, across, Tail(v, A_all.t(), 1.0))
    parts = parts_of(v, A)
    tails = [Tail(part, a.t(), 1.0, mask.threshold, mask.seed) for part, a, mask in zip(parts, A, masks, strict=True)]
    dx = product(kernels, dy, across, tails[0])
    for tail in tails[1:]:
        kernels.lora_up(dx, None, dx, tail)
    return dx


def _dense(kernels: Kernels, weight: Weight, N: int, K: int, dtype: torch.dtype) -> Tensor | None:
    if weight.is_absent:
        return None
    return kernels.four_bit_decode(weight, N, K, dtype) if weight.quant else in_memory(weight.data)


def with_leading_shape_of(x: Tensor, rows: Tensor) -> Tensor:
    """``rows [M, C]`` as ``[..., C]``; no view, as users may change it in place."""
    if x.dim() == 2:
        return rows
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[1]])


def parts_of(u: Tensor, A: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each adapter's columns of ``u [..., Σ r]``."""
    return (u,) if len(A) == 1 else u.split([a.shape[0] for a in A], dim=-1)


def matrix(x: Tensor) -> Tensor:
    """``x [..., K]`` with its leading dimensions as one."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])

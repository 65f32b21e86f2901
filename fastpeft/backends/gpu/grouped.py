"""Stacked experts on a GPU: torch's grouped products with W, A and B. Nothing waits for the offsets, and nothing is
added up in an order that changes.

In bfloat16, whose grouped products are one kernel each. ``u``, ``v`` and the products with W are rounded to it, as
PEFT's eager path rounds them; the ranks are padded to what the kernel's rows must be multiples of.
"""

from __future__ import annotations

import torch
from torch import Tensor, segment_reduce
from torch.nn.functional import grouped_mm, pad

from ...call import Adapters, Kept, Needs, Weight
from ...dropout import dropout_keep, dropout_scale
from ...reference import z_dtype
from ..base import Backend, Forward

FEWEST = (8, 0)  # the capability of a GPU with such products
ALIGNED = 16  # bytes of rows and addresses
STEP = ALIGNED // 2  # elements


def refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why they cannot take a call; None when they can."""
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"its products of experts are in bfloat16, and x is {x.dtype} and weight {weight.dtype}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < FEWEST:
        return "its products of experts need a GPU of capability 8.0"
    rows, columns = sorted(weight.stride()[1:], reverse=True)
    aligned = columns == 1 and rows % STEP == 0 and weight.data_ptr() % ALIGNED == 0
    if not aligned or weight.shape[1] % STEP or weight.shape[2] % STEP:
        return f"its products of experts want sizes in multiples of {STEP} and contiguous rows or columns"
    return None


class GroupedProducts(Backend):
    """A backend that takes stacked experts by them."""

    def lora_grouped_linear(
        self, x: Tensor, offsets: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool
    ) -> Forward:
        x, ends = _rows(x), offsets[1:].to(torch.int32)
        W = weight.data.transpose(1, 2)
        y = grouped_mm(x, W, offs=ends)
        us, zs = [], []
        for i in range(len(adapters.A)):
            A, B, s = _padded(adapters, i, x.dtype)
            dropped, factor = _dropped(x, adapters, i), _dropout_factor(adapters, i)
            u = grouped_mm(dropped, A.transpose(1, 2), offs=ends)
            us.append(u[:, : adapters.ranks[i]].float())
            low_rank = grouped_mm(u * s, B.transpose(1, 2), offs=ends)
            if not adapters.c:
                y += low_rank
                continue
            before = y if factor == 1.0 else grouped_mm(dropped * factor, W, offs=ends)
            z = before + low_rank
            scaled = (_by_row(adapters.c[i], ends, len(x)) * z).to(x.dtype)
            y = scaled if factor == 1.0 else y - before + scaled
            if keep_z:
                zs.append(z.to(z_dtype(len(x), x.dtype)))
        if bias is not None:
            y += _by_row(bias, ends, len(x))
        return y, torch.cat(us, 1), zs

    def lora_grouped_linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        offsets: Tensor,
        weight: Weight,
        adapters: Adapters,
        kept: Kept,
        needs: Needs,
    ) -> list[Tensor]:
        dy, x, ends = _rows(dy), None if x is None else _rows(x), offsets[1:].to(torch.int32)
        empty = (offsets[1:] == offsets[:-1]).view(-1, 1, 1)
        count = len(adapters.A)
        dx, dW = None, None
        dA, dB, dc = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
        parts = [None] * count if kept.u is None else kept.u.split(adapters.ranks, 1)
        if needs.bias:
            ones = dy.new_ones(len(dy), STEP)
            db = grouped_mm(dy.t(), ones, offs=ends)[..., 0].masked_fill(empty[..., 0], 0).contiguous()
        for i in reversed(range(count)):  # DoRA's adapters act on what those before them give
            rank, factor = adapters.ranks[i], _dropout_factor(adapters, i)
            A, B, s = _padded(adapters, i, dy.dtype)
            dz = (_by_row(adapters.c[i], ends, len(dy)) * dy).to(dy.dtype) if adapters.c else dy
            if adapters.c and needs.c[i]:
                dc[i] = segment_reduce(dy.float() * kept.z[i], "sum", offsets=offsets.long(), axis=0, unsafe=True)
            if needs.x or needs.A[i]:
                v = grouped_mm(dz, B, offs=ends) * s
            if needs.x:
                dx = _sum(dx, _dropped(grouped_mm(v, A, offs=ends), adapters, i))
            if needs.A[i]:
                assert x is not None
                sums = grouped_mm(v.t(), _dropped(x, adapters, i), offs=ends)
                dA[i] = _like(adapters.A[i], sums[:, :rank], empty)
            part = parts[i]
            if needs.B[i]:
                assert part is not None
                q = pad(part * s, (0, A.shape[1] - rank)).to(dy.dtype)
                dB[i] = _like(adapters.B[i], grouped_mm(dz.t(), q, offs=ends)[..., :rank], empty)
            if adapters.c and factor == 1.0:
                dy = dz
            elif adapters.c:
                second = (dz - dy) * factor
                if needs.x:
                    dx = _sum(dx, _dropped(grouped_mm(second, weight.data, offs=ends), adapters, i))
                if needs.weight:
                    assert x is not None
                    dW = _sum(dW, grouped_mm(second.t(), _dropped(x, adapters, i), offs=ends))
        grads = []
        if needs.x:
            grads.append(_sum(dx, grouped_mm(dy, weight.data, offs=ends)))
        if needs.weight:
            assert x is not None
            grads.append(_like(weight.data, _sum(dW, grouped_mm(dy.t(), x, offs=ends)), empty))
        if needs.bias:
            grads.append(db)
        return grads + [grad for some in (dA, dB, dc) for _, grad in sorted(some.items())]


def _rows(t: Tensor) -> Tensor:
    """A matrix whose rows lie where the kernel wants them: what users hand over may lie anywhere, as an expanded
    gradient does."""
    fits = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % STEP == 0 and t.data_ptr() % ALIGNED == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _padded(adapters: Adapters, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """``A [E, r, K]`` and ``B [E, N, r]`` with zeros up to the next multiple of ranks, and what ``u`` is scaled by."""
    A, B = adapters.A[i].to(dtype), adapters.B[i].to(dtype)
    missing = -adapters.ranks[i] % STEP
    s = adapters.scaling[i] * _dropout_factor(adapters, i)
    return pad(A, (0, 0, 0, missing)).contiguous(), pad(B, (0, missing)).contiguous(), s


def _dropout_factor(adapters: Adapters, i: int) -> float:
    """What an adapter's kept elements count; 1 where it drops nothing."""
    return 1.0 if adapters.seed is None else dropout_scale(adapters.dropout_p[i])


def _dropped(x: Tensor, adapters: Adapters, i: int) -> Tensor:
    p = adapters.dropout_p[i]
    if adapters.seed is None or not p:
        return x
    rows, columns = x.shape
    return x.masked_fill(~dropout_keep(adapters.seed[i], rows, columns, p), 0)


def _by_row(stack: Tensor, ends: Tensor, rows: int) -> Tensor:
    """For each row what its expert has of ``[E, N]``."""
    return stack[torch.bucketize(torch.arange(rows, device=ends.device, dtype=ends.dtype), ends, right=True)]


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    """In place: nobody else has seen either."""
    return part if total is None else total.add_(part)


def _like(parameter: Tensor, sums: Tensor, empty: Tensor) -> Tensor:
    """A parameter's gradient, in its layout, zeros where no row went."""
    return torch.empty_like(parameter).copy_(sums).masked_fill_(empty, 0)

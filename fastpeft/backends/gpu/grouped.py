"""Stacked experts on a GPU: torch's grouped products with W, A and B. Nothing waits for the offsets, and nothing is
added up in an order that changes.

In bfloat16, whose grouped products are one kernel each. ``u``, ``v`` and the products with W are rounded to it, as
PEFT's eager path rounds them; the ranks are padded to what the kernel's rows must be multiples of.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from ...call import Adapters, Needs, Weight
from ...dropout import dropout_keep, dropout_scale
from ..base import Backend, Grouped

FEWEST = (8, 0)  # the capability of a GPU with such products
ALIGNED = 16  # bytes of rows and addresses
STEP = ALIGNED // 2  # elements


def refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why they cannot take a call; None when they can."""
    if weight.dtype == torch.uint8:
        return "its products of experts take dense weights, and these are in 4 bits"
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
        self, x: Tensor, offsets: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters
    ) -> Grouped:
        x, ends = _rows(x), offsets[1:].to(torch.int32)
        y = grouped_mm(x, weight.data.transpose(1, 2), offs=ends)
        us = []
        for i in range(len(adapters.A)):
            A, B, s = _padded(adapters, i, x.dtype)
            u = grouped_mm(_dropped(x, adapters, i), A.transpose(1, 2), offs=ends)
            y += grouped_mm(u * s, B.transpose(1, 2), offs=ends)
            us.append(u[:, : adapters.ranks[i]].float())
        if bias is not None:
            y += bias[_experts(ends, len(x))]
        return y, torch.cat(us, 1)

    def lora_grouped_linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        offsets: Tensor,
        weight: Weight,
        adapters: Adapters,
        u: Tensor | None,
        needs: Needs,
    ) -> list[Tensor]:
        dy, x, ends = _rows(dy), None if x is None else _rows(x), offsets[1:].to(torch.int32)
        empty = (offsets[1:] == offsets[:-1]).view(-1, 1, 1)
        dx = grouped_mm(dy, weight.data, offs=ends) if needs.x else None
        dA, dB = [], []
        parts = [None] * len(adapters.A) if u is None else u.split(adapters.ranks, 1)
        for i, rank in enumerate(adapters.ranks):
            A, B, s = _padded(adapters, i, dy.dtype)
            if needs.x or needs.A[i]:
                v = grouped_mm(dy, B, offs=ends) * s
            if dx is not None:
                dx += _dropped(grouped_mm(v, A, offs=ends), adapters, i)
            if needs.A[i]:
                assert x is not None
                sums = grouped_mm(v.t(), _dropped(x, adapters, i), offs=ends)
                dA.append(_like(adapters.A[i], sums[:, :rank], empty))
            part = parts[i]
            if needs.B[i]:
                assert part is not None
                q = pad(part * s, (0, A.shape[1] - rank)).to(dy.dtype)
                dB.append(_like(adapters.B[i], grouped_mm(dy.t(), q, offs=ends)[..., :rank], empty))
        grads = [] if dx is None else [dx]
        if needs.weight:
            assert x is not None
            grads.append(_like(weight.data, grouped_mm(dy.t(), x, offs=ends), empty))
        if needs.bias:
            ones = dy.new_ones(len(dy), STEP)
            grads.append(grouped_mm(dy.t(), ones, offs=ends)[..., 0].masked_fill(empty[..., 0], 0).contiguous())
        return [*grads, *dA, *dB]


def _rows(t: Tensor) -> Tensor:
    """A matrix whose rows lie where the kernel wants them: what users hand over may lie anywhere, as an expanded
    gradient does."""
    fits = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % STEP == 0 and t.data_ptr() % ALIGNED == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _padded(adapters: Adapters, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """``A [E, r, K]`` and ``B [E, N, r]`` with zeros up to the next multiple of ranks, and what ``u`` is scaled by."""
    A, B = adapters.A[i].to(dtype), adapters.B[i].to(dtype)
    missing = -adapters.ranks[i] % STEP
    factor = dropout_scale(adapters.dropout_p[i]) if adapters.seed is not None else 1.0
    return pad(A, (0, 0, 0, missing)).contiguous(), pad(B, (0, missing)).contiguous(), adapters.scaling[i] * factor


def _dropped(x: Tensor, adapters: Adapters, i: int) -> Tensor:
    p = adapters.dropout_p[i]
    if adapters.seed is None or not p:
        return x
    rows, columns = x.shape
    return x.masked_fill(~dropout_keep(adapters.seed[i], rows, columns, p), 0)


def _experts(ends: Tensor, rows: int) -> Tensor:
    """Which expert each row is."""
    return torch.bucketize(torch.arange(rows, device=ends.device, dtype=ends.dtype), ends, right=True)


def _like(parameter: Tensor, sums: Tensor, empty: Tensor) -> Tensor:
    """A parameter's gradient, in its layout, zeros where no row went."""
    return torch.empty_like(parameter).copy_(sums).masked_fill_(empty, 0)

"""The op on stacked experts for the backend ``triton``, out of kernels that take all experts at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...call import Adapters, Needs, Weight
from ..base import Forward
from .compose import in_memory, on_the_device_of
from .kernel_set import NO_MASK, GroupedKernels, GroupedSums, GroupedTail, Mask


def lora_grouped_linear(
    kernels: GroupedKernels, x: Tensor, offsets: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters
) -> Forward:
    """See ops.py."""
    A, B, scales, masks = _read(adapters)
    with on_the_device_of(x):
        T, ranks = x.shape[0], adapters.ranks
        y, u = x.new_empty((T, adapters.shape[0])), x.new_empty((T, sum(ranks)), dtype=torch.float32)
        if T == 0:
            return y, u, []
        x, offsets = in_memory(x), offsets.contiguous()
        kernels.lora_grouped_down(x, offsets, A, u, masks)
        bias = None if bias is None else in_memory(bias).contiguous()
        tail = GroupedTail(u.split(ranks, 1), B, scales, [NO_MASK] * len(B), bias)
        kernels.lora_grouped_linear(x, offsets, in_memory(weight.data), y, tail)
        return y, u, []


def lora_grouped_linear_backward(
    kernels: GroupedKernels,
    dy: Tensor,
    x: Tensor | None,
    offsets: Tensor,
    weight: Weight,
    adapters: Adapters,
    u: Tensor | None,
    needs: Needs,
) -> list[Tensor]:
    """See ops.py."""
    A, B, scales, masks = _read(adapters)
    with on_the_device_of(dy):
        T, ranks, (N, K) = dy.shape[0], adapters.ranks, adapters.shape
        if T == 0:
            like = [dy.new_empty((T, K)), weight.data, dy.new_empty((len(weight.data), N)), *adapters.factors]
            return [torch.zeros_like(t) for t, need in zip(like, needs.flat, strict=True) if need]
        dy, x, offsets = in_memory(dy), None if x is None else in_memory(x), offsets.contiguous()
        flowing = [i for i, need in enumerate(needs.A) if need or needs.x]
        v: dict[int, Tensor] = {}
        if flowing:
            widths = [ranks[i] for i in flowing]
            every = dy.new_empty((T, sum(widths)), dtype=torch.float32)
            across = [B[i].transpose(1, 2) for i in flowing]
            kernels.lora_grouped_down(dy, offsets, across, every, [NO_MASK] * len(flowing))
            v = dict(zip(flowing, every.split(widths, 1), strict=True))
        grads: list[Tensor] = []

        def add(sums: GroupedSums, out: Tensor, across: bool = False) -> None:
            kernels.lora_grouped_gradient(sums, offsets, out.transpose(1, 2) if across else out)
            grads.append(out)

        if needs.x:
            tail = GroupedTail([v[i] for i in flowing], [a.transpose(1, 2) for a in A], scales, masks)
            grads.append(dy.new_empty((T, K)))
            kernels.lora_grouped_linear(dy, offsets, in_memory(weight.data).transpose(1, 2), grads[-1], tail)
        if needs.weight:
            assert x is not None
            add(GroupedSums(dy if dy.stride(1) == 1 else dy.contiguous(), x, 1.0), torch.empty_like(weight.data))
        if needs.bias:
            ones, dbias = dy.new_ones(()).expand(T, 1), dy.new_empty((len(weight.data), N))
            kernels.lora_grouped_gradient(GroupedSums(ones, dy, 1.0), offsets, dbias.unsqueeze(1))
            grads.append(dbias)
        for i in (i for i, need in enumerate(needs.A) if need):
            assert x is not None
            add(GroupedSums(v[i], x, scales[i], masks[i]), torch.empty_like(adapters.A[i]))
        for i in (i for i, need in enumerate(needs.B) if need):
            assert u is not None
            add(GroupedSums(u.split(ranks, 1)[i], dy, scales[i]), torch.empty_like(adapters.B[i]), across=True)
        return grads


def _read(adapters: Adapters) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float], Sequence[Mask]]:
    """Each adapter's A and B, the scale of its ``u`` and its mask."""
    A, B = ([_near(in_memory(t)) for t in some] for some in (adapters.A, adapters.B))
    masks = [Mask.of(p, adapters.seed, i) for i, p in enumerate(adapters.dropout_p)]
    return A, B, [s * mask.factor for s, mask in zip(adapters.scaling, masks, strict=True)], masks


def _near(stack: Tensor) -> Tensor:
    """With contiguous rows or columns: PEFT keeps one with the experts innermost, where every element that a tile is
    made of would be fetched by itself."""
    return stack if 1 in stack.stride()[1:] else stack.contiguous()

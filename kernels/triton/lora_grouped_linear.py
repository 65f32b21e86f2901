"""Experts whose weights are stacked: each one's product with W and its low-rank part in the same float32 sums, in one
launch for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from .experts import expert_tile, row_tiles
from .tiles import finish_tile, group_tiles, keep_tile, low_rank_tile, store_tile


@dataclass(frozen=True)
class LoraGroupedLinearConfig:
    """Tile sizes and launch shape of :func:`_lora_grouped_linear_kernel`; ``GROUP`` row tiles share a column of W
    tiles, as far as they are one expert's."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    GROUP: int = 8
    num_warps: int = 8
    num_stages: int = 3
    enable_fp_fusion: bool = True


def lora_grouped_linear_config(
    row_block: int, rank_block: int, float32: bool, several: bool
) -> LoraGroupedLinearConfig:
    """What fits the registers, for about ``row_block`` rows an expert, 16, 64 or 128; ``several`` adapters take some,
    too. Float32 is multiplied without the matrix units: each thread holds its operands."""
    if row_block == 16:  # W is what there is to move
        return (
            LoraGroupedLinearConfig(16, 64, 32) if float32 else LoraGroupedLinearConfig(16, num_warps=4, num_stages=4)
        )
    if float32:
        return LoraGroupedLinearConfig(64, 64, 16)
    if rank_block > 32:
        return LoraGroupedLinearConfig(64, 64 if several else 128)
    return LoraGroupedLinearConfig(64 if several else row_block)


@triton.jit
def _lora_grouped_linear_kernel(
    x_ptr,
    offsets_ptr,
    W_ptr,
    y_ptr,
    q_ptrs,
    right_ptrs,
    seed_ptrs,
    bias_ptr,
    scales,
    thresholds,
    T,
    E,
    N,
    K,
    ranks,
    stride_xm,
    stride_xk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_ym,
    stride_qm,
    strides_re,
    strides_rn,
    strides_rr,
    DROPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column_tiles = tl.cdiv(N, BLOCK_N)
    row_tile, column_tile = group_tiles(tl.program_id(0), tl.num_programs(0) // column_tiles, column_tiles, GROUP)
    expert, m, end = expert_tile(offsets_ptr, row_tile, T, E, BLOCK_M, BLOCK_E)
    if m >= end:
        return
    e, n = expert.to(tl.int64), column_tile * BLOCK_N
    rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    row_at = rows[:, None].to(tl.int64) * stride_xm
    column_at = e * stride_we + columns[None, :].to(tl.int64) * stride_wn
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_inside, W_inside = (rows[:, None] < end) & (k[None, :] < K), (columns[None, :] < N) & (k[:, None] < K)
        x = tl.load(x_ptr + row_at + k[None, :].to(tl.int64) * stride_xk, mask=x_inside, other=0.0)
        W = tl.load(W_ptr + column_at + k[:, None].to(tl.int64) * stride_wk, mask=W_inside, other=0.0)
        sums = tl.dot(x, W.to(x.dtype), sums, input_precision=PRECISION)
    for i in tl.static_range(len(DROPS)):
        q_at = q_ptrs[i] + rows[:, None].to(tl.int64) * stride_qm
        right_at = right_ptrs[i] + e * strides_re[i] + columns[None, :].to(tl.int64) * strides_rn[i]
        delta = low_rank_tile(
            *(q_at, right_at, strides_rr[i], scales[i], rows, columns, end, N, ranks[i]),
            *(x_ptr.dtype.element_ty, BLOCK_R, PRECISION),
        )
        if DROPS[i]:
            delta = tl.where(keep_tile(seed_ptrs[i], thresholds[i], m, n, BLOCK_M, BLOCK_N), delta, 0.0)
        sums += delta
    bias_at = bias_ptr
    if HAS_BIAS:
        bias_at += e * N
    y = finish_tile(sums, sums, None, bias_at, columns, N, False, False, HAS_BIAS)
    store_tile(y_ptr, stride_ym, y, rows, columns, end, N)


class Mask(Protocol):
    """See ``fastpeft.backends.gpu.kernel_set.Mask``."""

    threshold: int
    seed: Tensor | None


class GroupedTail(Protocol):
    """What follows the experts' products, see ``fastpeft.backends.gpu.kernel_set.GroupedTail``."""

    q: Sequence[Tensor]
    right: Sequence[Tensor]
    scales: Sequence[float]
    masks: Sequence[Mask]
    bias: Tensor | None


def lora_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    y: Tensor,
    tail: GroupedTail,
    rank_block: int,
    precision: str,
    config: LoraGroupedLinearConfig,
) -> None:
    """Writes each expert's rows of ``x [T, K]`` times ``weight [E, N, K]``, with its ``tail``, to ``y [T, N]``; expert
    ``e`` has rows ``offsets[e]`` up to ``offsets[e + 1]``."""
    (T, K), (E, N, _) = x.shape, weight.shape
    q, right, masks, bias = tail.q, tail.right, tail.masks, tail.bias
    grid = (row_tiles(T, E, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)
    _lora_grouped_linear_kernel[grid](
        *(x, offsets, weight, y, tuple(q), tuple(right), tuple(mask.seed for mask in masks), bias),
        *(tuple(tail.scales), tuple(mask.threshold for mask in masks), T, E, N, K, tuple(part.shape[1] for part in q)),
        *(*x.stride(), *weight.stride(), y.stride(0), q[0].stride(0)),
        *(tuple(r.stride(dimension) for r in right) for dimension in range(3)),
        DROPS=tuple(mask.threshold > 0 for mask in masks),
        HAS_BIAS=bias is not None,
        BLOCK_R=rank_block,
        BLOCK_E=triton.next_power_of_2(E),
        PRECISION=precision,
        **vars(config),
    )

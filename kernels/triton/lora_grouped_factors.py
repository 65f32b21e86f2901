"""What experts' rows meet of their own A and B: the low-rank down product, and the sums over an expert's rows that
gradients are. One launch for all experts; each result has one program, whose sums nobody adds to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from .experts import expert_rows, expert_tile, row_tiles
from .lora_down import LoraDownConfig, down_tile
from .lora_gradients import add_tokens
from .lora_grouped_linear import Mask


@dataclass(frozen=True)
class LoraGroupedGradientConfig:
    """Tile sizes and launch shape of :func:`_lora_grouped_gradient_kernel`."""

    BLOCK_M: int = 64
    BLOCK_K: int = 128
    num_warps: int = 4
    num_stages: int = 2
    enable_fp_fusion: bool = True


def lora_grouped_gradient_config(rank_block: int, float32: bool) -> LoraGroupedGradientConfig:
    """What fits the registers. Float32 is multiplied without the matrix units: each thread holds its operands. Loads
    ahead of a loop whose length is not known make sm_90 wait for each product of 64 ranks: several blocks take turns
    instead."""
    if float32:
        return LoraGroupedGradientConfig(BLOCK_M=32, BLOCK_K=32)
    return LoraGroupedGradientConfig(BLOCK_K=64, num_stages=1) if rank_block > 32 else LoraGroupedGradientConfig()


@triton.jit
def _lora_grouped_down_kernel(
    x_ptr,
    offsets_ptr,
    A_ptrs,
    u_ptrs,
    seed_ptrs,
    thresholds,
    T,
    E,
    K,
    ranks,
    stride_xm,
    stride_xk,
    stride_um,
    stride_split,
    strides_ae,
    strides_ar,
    strides_ak,
    SPLIT_K: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, m, end = expert_tile(offsets_ptr, tl.program_id(0), T, E, BLOCK_M, BLOCK_E)
    if m >= end:
        return
    tile, split = tl.program_id(1), tl.program_id(2)
    first_k = split * SPLIT_K
    last_k = tl.minimum(K, first_k + SPLIT_K)
    for i in tl.static_range(len(DROPS)):
        if tile >= 0 and tile * BLOCK_R < ranks[i]:
            A_at, u_at = A_ptrs[i] + expert.to(tl.int64) * strides_ae[i], u_ptrs[i] + split.to(tl.int64) * stride_split
            down_tile(
                *(x_ptr, A_at, u_at, seed_ptrs[i], None, i, thresholds[i], tile * BLOCK_R, first_k, last_k, m, end),
                *(ranks[i], stride_xm, stride_xk, stride_um, strides_ar[i], strides_ak[i]),
                *(DROPS[i], False, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION),
            )
        tile -= tl.cdiv(ranks[i], BLOCK_R)


@triton.jit
def _lora_grouped_gradient_kernel(
    wide_ptr,
    offsets_ptr,
    q_ptr,
    out_ptr,
    seed_ptr,
    scale,
    threshold,
    T,
    K,
    RANK,
    stride_wm,
    stride_wk,
    stride_qm,
    stride_oe,
    stride_or,
    stride_ok,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, first_rank, expert = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_R, tl.program_id(2)
    k, r = first + tl.arange(0, BLOCK_K), first_rank + tl.arange(0, BLOCK_R)
    start, end = expert_rows(offsets_ptr, expert, T)
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(start, end, BLOCK_M):
        sums = add_tokens(
            *(sums, wide_ptr, q_ptr, seed_ptr, threshold, m, end, first, first_rank, K, RANK, stride_wm, stride_wk),
            *(stride_qm, HAS_DROPOUT, BLOCK_M, PRECISION),
        )
    out_at = out_ptr + expert.to(tl.int64) * stride_oe
    out_at += r[:, None].to(tl.int64) * stride_or + k[None, :].to(tl.int64) * stride_ok
    tl.store(out_at, (sums * scale).to(out_ptr.dtype.element_ty), mask=(r[:, None] < RANK) & (k[None, :] < K))


def lora_grouped_down(
    x: Tensor,
    offsets: Tensor,
    A: Sequence[Tensor],
    u: Sequence[Tensor],
    masks: Sequence[Mask],
    rank_block: int,
    precision: str,
    config: LoraDownConfig,
) -> None:
    """As ``lora_down`` with the rows of each expert and its own ``A [E, r, K]``."""
    (T, K), E, ranks = x.shape, A[0].shape[0], tuple(a.shape[1] for a in A)
    tiles = row_tiles(T, E, config.BLOCK_M)
    grid = tiles, sum(triton.cdiv(rank, rank_block) for rank in ranks), triton.cdiv(K, config.SPLIT_K)
    _lora_grouped_down_kernel[grid](
        *(x, offsets, tuple(A), tuple(u), tuple(mask.seed for mask in masks)),
        *(tuple(mask.threshold for mask in masks), T, E, K, ranks),
        *(*x.stride(), u[0].stride(1), u[0].stride(0)),
        *(tuple(a.stride(dimension) for a in A) for dimension in range(3)),
        DROPS=tuple(mask.threshold > 0 for mask in masks),
        BLOCK_R=rank_block,
        BLOCK_E=triton.next_power_of_2(E),
        PRECISION=precision,
        **vars(config),
    )


class GroupedSums(Protocol):
    """What is summed up, see ``fastpeft.backends.gpu.kernel_set.GroupedSums``."""

    q: Tensor
    wide: Tensor
    scale: float
    mask: Mask


def lora_grouped_gradient(
    sums: GroupedSums,
    offsets: Tensor,
    out: Tensor,
    rank_block: int,
    precision: str,
    config: LoraGroupedGradientConfig,
) -> None:
    """Writes the ``sums`` over each expert's rows to ``out [E, r, K]``, zeros where there are none."""
    (T, K), (E, rank, _) = sums.wide.shape, out.shape
    q, wide, mask = sums.q, sums.wide, sums.mask
    grid = triton.cdiv(K, config.BLOCK_K), triton.cdiv(rank, rank_block), E
    _lora_grouped_gradient_kernel[grid](
        *(wide, offsets, q, out, mask.seed, sums.scale, mask.threshold, T, K, rank),
        *(*wide.stride(), q.stride(0), *out.stride()),
        HAS_DROPOUT=mask.threshold > 0,
        BLOCK_R=rank_block,
        PRECISION=precision,
        **vars(config),
    )

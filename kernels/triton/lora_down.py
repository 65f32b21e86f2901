"""``u = D(x) Aᵀ``: the low-rank down product, the dropout mask made in registers; several adapters in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .tiles import keep_tile


@dataclass(frozen=True)
class LoraDownConfig:
    """Tile sizes and launch shape of :func:`_lora_down_kernel`; a program takes ``SPLIT_K`` inputs, a multiple of
    ``BLOCK_K``."""

    BLOCK_M: int = 64
    BLOCK_K: int = 128
    SPLIT_K: int = 1 << 20
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True


def lora_down_config(rank_block: int, float32: bool) -> LoraDownConfig:
    """What fits the registers. Float32 is multiplied without the matrix units: each thread holds its operands."""
    if float32:
        return LoraDownConfig(BLOCK_M=32, BLOCK_K=32)
    return LoraDownConfig() if rank_block == 16 else LoraDownConfig(BLOCK_K=64, num_warps=8, num_stages=2)


@triton.jit
def down_tile(
    x_ptr,
    A_ptr,
    u_ptr,
    seed_ptr,
    index_ptr,
    adapter,
    threshold,
    first_rank,
    first_k,
    last_k,
    m,
    M,
    RANK,
    stride_xm,
    stride_xk,
    stride_um,
    stride_ar,
    stride_ak,
    HAS_DROPOUT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``D(x) Aᵀ`` of rows ``m`` on, up to ``M``, over columns ``first_k`` up to ``last_k``; ranks ``first_rank`` on."""
    rows, r = m + tl.arange(0, BLOCK_M), first_rank + tl.arange(0, BLOCK_R)
    row_at = rows[:, None].to(tl.int64) * stride_xm
    rank_at = r[None, :].to(tl.int64) * stride_ar
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first_k, last_k, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_inside = (rows[:, None] < M) & (k[None, :] < last_k)
        x = tl.load(x_ptr + row_at + k[None, :].to(tl.int64) * stride_xk, mask=x_inside, other=0.0)
        if HAS_DROPOUT:
            x = tl.where(keep_tile(seed_ptr, threshold, m, start, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
        A_inside = (k[:, None] < last_k) & (r[None, :] < RANK)
        A = tl.load(A_ptr + k[:, None].to(tl.int64) * stride_ak + rank_at, mask=A_inside, other=0.0)
        sums = tl.dot(x, A.to(x.dtype), sums, input_precision=PRECISION)
    if HAS_INDEX:
        index = tl.load(index_ptr + rows, mask=rows < M, other=-1)
        sums = tl.where(index[:, None] == adapter, sums, 0.0)
    u_at = u_ptr + rows[:, None].to(tl.int64) * stride_um + r[None, :]
    tl.store(u_at, sums, mask=(rows[:, None] < M) & (r[None, :] < RANK))


@triton.jit
def _lora_down_kernel(
    x_ptr,
    A_ptrs,
    u_ptrs,
    seed_ptrs,
    index_ptr,
    thresholds,
    M,
    K,
    ranks,
    stride_xm,
    stride_xk,
    stride_um,
    stride_split,
    strides_ar,
    strides_ak,
    SPLIT_K: tl.constexpr,
    DROPS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, tile, split = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    first_k = split * SPLIT_K
    last_k = tl.minimum(K, first_k + SPLIT_K)
    for i in tl.static_range(len(DROPS)):
        if tile >= 0 and tile * BLOCK_R < ranks[i]:
            down_tile(
                *(x_ptr, A_ptrs[i], u_ptrs[i] + split.to(tl.int64) * stride_split, seed_ptrs[i], index_ptr, i),
                *(thresholds[i], tile * BLOCK_R, first_k, last_k, m, M, ranks[i], stride_xm, stride_xk),
                *(stride_um, strides_ar[i], strides_ak[i]),
                *(DROPS[i], HAS_INDEX, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION),
            )
        tile -= tl.cdiv(ranks[i], BLOCK_R)


def lora_down(
    x: Tensor,
    A: Sequence[Tensor],
    u: Sequence[Tensor],
    masks: Sequence[tuple[int, Tensor | None]],
    index: Tensor | None,
    rank_block: int,
    precision: str,
    config: LoraDownConfig,
) -> None:
    """Writes ``D(x) Aᵀ`` to ``u [splits, M, r]`` (float32, strides alike) for each adapter, with its own mask, a
    threshold and a seed; 0 where ``index [M]`` names another one. Each split has the sums over ``SPLIT_K`` inputs."""
    (M, K), thresholds, seeds = x.shape, tuple(mask[0] for mask in masks), tuple(mask[1] for mask in masks)
    grid = (
        triton.cdiv(M, config.BLOCK_M),
        sum(triton.cdiv(a.shape[0], rank_block) for a in A),
        triton.cdiv(K, config.SPLIT_K),
    )
    _lora_down_kernel[grid](
        *(x, tuple(A), tuple(u), seeds, index, thresholds, M, K, tuple(a.shape[0] for a in A)),
        *(*x.stride(), u[0].stride(1), u[0].stride(0), tuple(a.stride(0) for a in A), tuple(a.stride(1) for a in A)),
        DROPS=tuple(threshold > 0 for threshold in thresholds),
        HAS_INDEX=index is not None,
        BLOCK_R=rank_block,
        PRECISION=precision,
        **vars(config),
    )

"""``u = D(x) Aᵀ``: the low-rank down product, the dropout mask made in registers."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .tiles import keep_tile


@dataclass(frozen=True)
class LoraDownConfig:
    """Tile sizes and launch shape of :func:`_lora_down_kernel`."""

    BLOCK_M: int = 64
    BLOCK_K: int = 128
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True


@triton.jit
def _lora_down_kernel(
    x_ptr,
    A_ptr,
    u_ptr,
    seed_ptr,
    index_ptr,
    adapter,
    threshold,
    M,
    K,
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
    m, first_rank = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R
    rows, r = m + tl.arange(0, BLOCK_M), first_rank + tl.arange(0, BLOCK_R)
    row_at = rows[:, None].to(tl.int64) * stride_xm
    rank_at = r[None, :].to(tl.int64) * stride_ar
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_inside = (rows[:, None] < M) & (k[None, :] < K)
        x = tl.load(x_ptr + row_at + k[None, :].to(tl.int64) * stride_xk, mask=x_inside, other=0.0)
        if HAS_DROPOUT:
            x = tl.where(keep_tile(seed_ptr, threshold, m, start, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
        A_inside = (k[:, None] < K) & (r[None, :] < RANK)
        A = tl.load(A_ptr + k[:, None].to(tl.int64) * stride_ak + rank_at, mask=A_inside, other=0.0)
        sums = tl.dot(x, A.to(x.dtype), sums, input_precision=PRECISION)
    if HAS_INDEX:
        index = tl.load(index_ptr + rows, mask=rows < M, other=-1)
        sums = tl.where(index[:, None] == adapter, sums, 0.0)
    u_at = u_ptr + rows[:, None].to(tl.int64) * stride_um + r[None, :]
    tl.store(u_at, sums, mask=(rows[:, None] < M) & (r[None, :] < RANK))


def lora_down(
    x: Tensor,
    A: Tensor,
    u: Tensor,
    threshold: int,
    seed: Tensor | None,
    index: Tensor | None,
    adapter: int,
    rank_block: int,
    precision: str,
    config: LoraDownConfig,
) -> None:
    """Writes ``D(x) Aᵀ`` to ``u [M, r]`` (float32, rows may be apart); 0 where ``index [M]`` names another adapter."""
    M, K = x.shape
    grid = triton.cdiv(M, config.BLOCK_M), triton.cdiv(A.shape[0], rank_block)
    _lora_down_kernel[grid](
        *(x, A, u, seed, index, adapter, threshold, M, K, A.shape[0], *x.stride(), u.stride(0), *A.stride()),
        HAS_DROPOUT=threshold > 0,
        HAS_INDEX=index is not None,
        BLOCK_R=rank_block,
        PRECISION=precision,
        **vars(config),
    )

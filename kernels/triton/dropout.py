"""``factor · keep ∘ x``, for products that are not ours to mask."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .tiles import keep_tile


@dataclass(frozen=True)
class DropoutConfig:
    """Tile sizes and launch shape of :func:`_dropout_kernel`."""

    BLOCK_M: int = 32
    BLOCK_K: int = 128
    num_warps: int = 4
    num_stages: int = 1
    enable_fp_fusion: bool = True


@triton.jit
def _dropout_kernel(
    x_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    factor,
    M,
    K,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m, first = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    rows, k = m + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < M) & (k[None, :] < K)
    x_at = x_ptr + rows[:, None].to(tl.int64) * stride_xm + k[None, :].to(tl.int64) * stride_xk
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(keep_tile(seed_ptr, threshold, m, first, BLOCK_M, BLOCK_K), x * factor, 0.0)
    out_at = out_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
    tl.store(out_at, kept.to(out_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, out: Tensor, threshold: int, factor: float, seed: Tensor, config: DropoutConfig) -> None:
    """Writes ``factor · keep ∘ x`` to ``out [M, K]``, contiguous."""
    M, K = x.shape
    grid = triton.cdiv(M, config.BLOCK_M), triton.cdiv(K, config.BLOCK_K)
    _dropout_kernel[grid](x, out, seed, threshold, factor, M, K, *x.stride(), **vars(config))

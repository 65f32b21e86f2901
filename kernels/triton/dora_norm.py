"""``‖W + s B A‖`` of each row: W read once, ``B A`` made tile by tile on the matrix units."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .tiles import low_rank_tile


@dataclass(frozen=True)
class DoraNormConfig:
    """Tile sizes and launch shape of :func:`_dora_norm_kernel`."""

    BLOCK_N: int = 32
    BLOCK_K: int = 128
    num_warps: int = 4
    num_stages: int = 2
    enable_fp_fusion: bool = True


def dora_norm_config(rank_block: int, float32: bool) -> DoraNormConfig:
    """What fits the registers. Float32 is multiplied without the matrix units: each thread holds its operands."""
    return DoraNormConfig(BLOCK_K=64) if float32 else DoraNormConfig()


@triton.jit
def _dora_norm_kernel(
    W_ptr,
    A_ptr,
    B_ptr,
    norm_ptr,
    scale,
    N,
    K,
    RANK,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    W_at = W_ptr + n[:, None].to(tl.int64) * stride_wn
    B_at = B_ptr + n[:, None].to(tl.int64) * stride_bn
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        W = tl.load(W_at + k[None, :].to(tl.int64) * stride_wk, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
        A_at = A_ptr + k[None, :].to(tl.int64) * stride_ak
        W = W.to(tl.float32) + low_rank_tile(
            B_at, A_at, stride_ar, scale, n, k, N, K, RANK, A_ptr.dtype.element_ty, BLOCK_R, PRECISION
        )
        sums += tl.sum(W * W, axis=1)
    tl.store(norm_ptr + n, tl.sqrt(sums), mask=n < N)


def dora_norm(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    norm: Tensor,
    scale: float,
    rank_block: int,
    precision: str,
    config: DoraNormConfig,
) -> None:
    """Writes ``‖W + scale B A‖`` to ``norm [N]``, float32; ``B A`` is computed in the dtype of ``A``.

    ``B``'s rows are contiguous.
    """
    N, K = weight.shape
    _dora_norm_kernel[(triton.cdiv(N, config.BLOCK_N),)](
        *(weight, A, B, norm, scale, N, K, A.shape[0], *weight.stride(), *A.stride(), B.stride(0)),
        BLOCK_R=rank_block,
        PRECISION=precision,
        **vars(config),
    )

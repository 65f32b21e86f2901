"""The product with W and the low-rank part in the same float32 sums, and the low-rank part onto a finished product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from .tiles import finish_tile, group_tiles, keep_tile, low_rank_tile, store_tile


@dataclass(frozen=True)
class LoraLinearConfig:
    """Tile sizes and launch shape of :func:`_lora_linear_kernel`; ``GROUP`` row tiles share a column of W tiles.

    With a masked input there are two sums of ``BLOCK_M x BLOCK_N``.
    """

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    GROUP: int = 8
    num_warps: int = 8
    num_stages: int = 3
    enable_fp_fusion: bool = True


def lora_linear_config(rank_block: int, float32: bool, masked_input: bool) -> LoraLinearConfig:
    """What fits the registers. Float32 is multiplied without the matrix units: each thread holds its operands."""
    if float32:
        return LoraLinearConfig(BLOCK_M=32 if masked_input else 64, BLOCK_N=64, BLOCK_K=16)
    return LoraLinearConfig(BLOCK_M=64 if masked_input or rank_block > 32 else 128)


@dataclass(frozen=True)
class LoraUpConfig:
    """Tile sizes and launch shape of :func:`_lora_up_kernel`."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    num_warps: int = 4
    num_stages: int = 2
    enable_fp_fusion: bool = True


def lora_up_config(rank_block: int, float32: bool) -> LoraUpConfig:
    """As :func:`lora_linear_config`."""
    return LoraUpConfig(BLOCK_M=32) if float32 else LoraUpConfig()


@triton.jit
def _lora_linear_kernel(
    x_ptr,
    W_ptr,
    y_ptr,
    q_ptr,
    right_ptr,
    c_ptr,
    z_ptr,
    bias_ptr,
    seed_ptr,
    scale,
    threshold,
    factor,
    M,
    N,
    K,
    RANK,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ym,
    stride_qm,
    stride_rn,
    stride_rr,
    DROPS_INPUT: tl.constexpr,
    DROPS_OUTPUT: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, column_tile = group_tiles(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row_tile * BLOCK_M, column_tile * BLOCK_N
    rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    row_at = rows[:, None].to(tl.int64) * stride_xm
    column_at = columns[None, :].to(tl.int64) * stride_wn
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dropped = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_inside, W_inside = (rows[:, None] < M) & (k[None, :] < K), (columns[None, :] < N) & (k[:, None] < K)
        x = tl.load(x_ptr + row_at + k[None, :].to(tl.int64) * stride_xk, mask=x_inside, other=0.0)
        W = tl.load(W_ptr + column_at + k[:, None].to(tl.int64) * stride_wk, mask=W_inside, other=0.0)
        sums = tl.dot(x, W, sums, input_precision=PRECISION)
        if DROPS_INPUT:
            x = tl.where(keep_tile(seed_ptr, threshold, m, start, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
            dropped = tl.dot(x, W, dropped, input_precision=PRECISION)
    q_at = q_ptr + rows[:, None].to(tl.int64) * stride_qm
    right_at = right_ptr + columns[None, :].to(tl.int64) * stride_rn
    delta = low_rank_tile(
        q_at, right_at, stride_rr, scale, rows, columns, M, N, RANK, x_ptr.dtype.element_ty, BLOCK_R, PRECISION
    )
    if DROPS_OUTPUT:
        delta = tl.where(keep_tile(seed_ptr, threshold, m, n, BLOCK_M, BLOCK_N), delta, 0.0)
    z, rest = sums + delta, sums
    if DROPS_INPUT:
        z, rest = dropped * factor + delta, sums - dropped * factor
    if HAS_Z:
        store_tile(z_ptr, N, z, rows, columns, M, N)
    y = finish_tile(z, rest, c_ptr, bias_ptr, columns, N, DROPS_INPUT, HAS_C, HAS_BIAS)
    store_tile(y_ptr, stride_ym, y, rows, columns, M, N)


@triton.jit
def _lora_up_kernel(
    base_ptr,
    second_ptr,
    y_ptr,
    q_ptr,
    right_ptr,
    c_ptr,
    z_ptr,
    bias_ptr,
    seed_ptr,
    scale,
    threshold,
    M,
    N,
    RANK,
    stride_bm,
    stride_ym,
    stride_qm,
    stride_rn,
    stride_rr,
    HAS_SECOND: tl.constexpr,
    DROPS_OUTPUT: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    base_at = rows[:, None].to(tl.int64) * stride_bm + columns[None, :]
    base = tl.load(base_ptr + base_at, mask=inside, other=0.0).to(tl.float32)
    q_at = q_ptr + rows[:, None].to(tl.int64) * stride_qm
    right_at = right_ptr + columns[None, :].to(tl.int64) * stride_rn
    delta = low_rank_tile(
        q_at, right_at, stride_rr, scale, rows, columns, M, N, RANK, y_ptr.dtype.element_ty, BLOCK_R, PRECISION
    )
    if DROPS_OUTPUT:
        delta = tl.where(keep_tile(seed_ptr, threshold, m, n, BLOCK_M, BLOCK_N), delta, 0.0)
    z, rest = base + delta, base
    if HAS_SECOND:
        second = tl.load(second_ptr + base_at, mask=inside, other=0.0).to(tl.float32)
        z, rest = second + delta, base - second
    if HAS_Z:
        store_tile(z_ptr, N, z, rows, columns, M, N)
    y = finish_tile(z, rest, c_ptr, bias_ptr, columns, N, HAS_SECOND, HAS_C, HAS_BIAS)
    store_tile(y_ptr, stride_ym, y, rows, columns, M, N)


class Tail(Protocol):
    """What follows a product, see ``fastpeft.backends.gpu.kernel_set.Tail``."""

    q: Tensor
    right: Tensor
    scale: float
    threshold: int
    seed: Tensor | None
    c: Tensor | None
    z: Tensor | None
    bias: Tensor | None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    tail: Tail,
    input_factor: float,
    rank_block: int,
    precision: str,
    config: LoraLinearConfig,
) -> None:
    """Writes ``x Wᵀ`` with its ``tail`` to ``y [M, N]``.

    With an ``input_factor`` the mask is the input's: DoRA over ``D(x) = input_factor · keep ∘ x``, both products in one
    pass over W. With 0 it is the low-rank part's, as in the gradient of x.
    """
    (M, K), N = x.shape, weight.shape[0]
    grid = (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)
    _lora_linear_kernel[grid](
        *(x, weight, y, tail.q, tail.right, tail.c, tail.z, tail.bias, tail.seed),
        *(tail.scale, tail.threshold, input_factor, M, N, K, tail.q.shape[1]),
        *(*x.stride(), *weight.stride(), y.stride(0), tail.q.stride(0), *tail.right.stride()),
        DROPS_INPUT=tail.threshold > 0 and input_factor != 0,
        DROPS_OUTPUT=tail.threshold > 0 and input_factor == 0,
        HAS_C=tail.c is not None,
        HAS_Z=tail.z is not None,
        HAS_BIAS=tail.bias is not None,
        BLOCK_R=rank_block,
        PRECISION=precision,
        **vars(config),
    )


def lora_up(
    base: Tensor, second: Tensor | None, y: Tensor, tail: Tail, rank_block: int, precision: str, config: LoraUpConfig
) -> None:
    """Writes a product ``base [M, N]`` with its ``tail`` to ``y``, which may be ``base``; ``second``: ``D(x) Wᵀ``."""
    M, N = base.shape
    grid = triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
    _lora_up_kernel[grid](
        *(base, second, y, tail.q, tail.right, tail.c, tail.z, tail.bias, tail.seed),
        *(tail.scale, tail.threshold, M, N, tail.q.shape[1]),
        *(base.stride(0), y.stride(0), tail.q.stride(0), *tail.right.stride()),
        HAS_SECOND=second is not None,
        DROPS_OUTPUT=tail.threshold > 0,
        HAS_C=tail.c is not None,
        HAS_Z=tail.z is not None,
        HAS_BIAS=tail.bias is not None,
        BLOCK_R=rank_block,
        PRECISION=precision,
        **vars(config),
    )

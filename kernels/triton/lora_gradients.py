"""``dy`` read once for ``v`` and ``dB`` (and DoRA's ``dc``), ``x`` once for ``dA``.

Sums over programs are made of partial sums, one each, which torch adds in order: the same call gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from .tiles import keep_tile


@dataclass(frozen=True)
class LoraDyConfig:
    """Tile sizes and launch shape of :func:`_lora_dy_kernel`; a program takes ``TILES`` tiles of tokens of ``SLABS``
    slabs of columns."""

    BLOCK_M: int = 64
    BLOCK_N: int = 128
    TILES: int = 1
    SLABS: int = 1
    num_warps: int = 8
    num_stages: int = 2
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class LoraDaConfig:
    """Tile sizes and launch shape of :func:`_lora_dA_kernel`; a program takes ``TILES`` tiles of tokens."""

    BLOCK_M: int = 64
    BLOCK_K: int = 128
    TILES: int = 1
    num_warps: int = 4
    num_stages: int = 2
    enable_fp_fusion: bool = True


def lora_dy_config(rank_block: int, float32: bool, scaled: bool, many_slabs: bool) -> LoraDyConfig:
    """What fits the registers. Float32 is multiplied without the matrix units: each thread holds its operands. DoRA's
    ``z`` and ``dz`` (``scaled``) take as many as ``dy``; sums over several slabs need some, too."""
    if float32:
        return LoraDyConfig(BLOCK_M=32, BLOCK_N=32, num_warps=4)
    if not (scaled or many_slabs):
        return LoraDyConfig()
    rows = 16 if scaled and many_slabs and rank_block == 64 else 32
    return LoraDyConfig(BLOCK_M=rows, BLOCK_N=64, num_warps=4)


def lora_dA_config(rank_block: int, float32: bool) -> LoraDaConfig:
    """What fits the registers, as for ``dy``."""
    return LoraDaConfig(BLOCK_M=32, BLOCK_K=32) if float32 else LoraDaConfig()


@triton.jit
def _lora_dy_kernel(
    dy_ptr,
    B_ptr,
    u_ptr,
    index_ptr,
    adapter,
    c_ptr,
    z_ptr,
    v_ptr,
    dB_ptr,
    dc_ptr,
    dz_ptr,
    scale,
    M,
    N,
    RANK,
    stride_dm,
    stride_dn,
    stride_bn,
    stride_br,
    stride_um,
    HAS_INDEX: tl.constexpr,
    HAS_C: tl.constexpr,
    NEEDS_V: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    NEEDS_DC: tl.constexpr,
    NEEDS_DZ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    SLABS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group, part, first_rank = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_R
    r = first_rank + tl.arange(0, BLOCK_R)
    dtype = dy_ptr.dtype.element_ty
    for slab in range(SLABS):
        columns = (group * SLABS + slab) * BLOCK_N + tl.arange(0, BLOCK_N)
        if NEEDS_V:
            B_at = B_ptr + columns[:, None].to(tl.int64) * stride_bn + r[None, :].to(tl.int64) * stride_br
            B = tl.load(B_at, mask=(columns[:, None] < N) & (r[None, :] < RANK), other=0.0).to(dtype)
            if SLABS > 1:
                tl.debug_barrier()  # what the last slab's threads wrote to v is read by others
        if HAS_C:
            c = tl.load(c_ptr + columns, mask=columns < N, other=0.0)
        dB = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        dc = tl.zeros((BLOCK_N,), tl.float32)
        for tile in range(TILES):
            rows = (part * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (rows[:, None] < M) & (columns[None, :] < N)
            ranks_inside = (rows[:, None] < M) & (r[None, :] < RANK)
            dy_at = dy_ptr + rows[:, None].to(tl.int64) * stride_dm + columns[None, :].to(tl.int64) * stride_dn
            dy = tl.load(dy_at, mask=inside, other=0.0)
            flat = rows[:, None].to(tl.int64) * N + columns[None, :]
            if NEEDS_DC:
                z = tl.load(z_ptr + flat, mask=inside, other=0.0)
                dc += tl.sum(dy.to(tl.float32) * z.to(tl.float32), axis=0)
            if HAS_C:
                dy = (dy.to(tl.float32) * c[None, :]).to(dtype)
                if NEEDS_DZ:
                    if first_rank == 0:
                        tl.store(dz_ptr + flat, dy, mask=inside)
            if NEEDS_V:
                v = tl.dot(dy, B, input_precision=PRECISION) * scale
                if HAS_INDEX:
                    index = tl.load(index_ptr + rows, mask=rows < M, other=-1)
                    v = tl.where(index[:, None] == adapter, v, 0.0)
                v_at = v_ptr + (group.to(tl.int64) * M + rows[:, None]) * RANK + r[None, :]
                if SLABS > 1:
                    if slab > 0:
                        v += tl.load(v_at, mask=ranks_inside, other=0.0)
                tl.store(v_at, v, mask=ranks_inside)
            if NEEDS_DB:
                u_at = u_ptr + rows[:, None].to(tl.int64) * stride_um + r[None, :]
                u = (tl.load(u_at, mask=ranks_inside, other=0.0) * scale).to(dtype)
                dB = tl.dot(tl.trans(dy), u, dB, input_precision=PRECISION)
        if NEEDS_DB:
            dB_at = dB_ptr + (part.to(tl.int64) * N + columns[:, None]) * RANK + r[None, :]
            tl.store(dB_at, dB, mask=(columns[:, None] < N) & (r[None, :] < RANK))
        if NEEDS_DC:
            if first_rank == 0:
                tl.store(dc_ptr + part.to(tl.int64) * N + columns, dc, mask=columns < N)


@triton.jit
def add_tokens(
    sums,
    x_ptr,
    v_ptr,
    seed_ptr,
    threshold,
    m,
    M,
    first,
    first_rank,
    K,
    RANK,
    stride_xm,
    stride_xk,
    stride_vm,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sums`` and ``vᵀ D(x)`` of tokens ``m`` on, up to ``M``: ranks ``first_rank`` on, columns ``first`` on."""
    BLOCK_K: tl.constexpr = sums.shape[1]
    rows, k, r = m + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_K), first_rank + tl.arange(0, sums.shape[0])
    x_at = x_ptr + rows[:, None].to(tl.int64) * stride_xm + k[None, :].to(tl.int64) * stride_xk
    x = tl.load(x_at, mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0)
    if HAS_DROPOUT:
        x = tl.where(keep_tile(seed_ptr, threshold, m, first, BLOCK_M, BLOCK_K), x, 0.0).to(x.dtype)
    v_at = v_ptr + rows[None, :].to(tl.int64) * stride_vm + r[:, None]
    v = tl.load(v_at, mask=(rows[None, :] < M) & (r[:, None] < RANK), other=0.0)
    return tl.dot(v.to(x.dtype), x, sums, input_precision=PRECISION)


@triton.jit
def _lora_dA_kernel(
    x_ptr,
    v_ptr,
    dA_ptr,
    seed_ptr,
    threshold,
    M,
    K,
    RANK,
    stride_xm,
    stride_xk,
    stride_vm,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, part, first_rank = tl.program_id(0) * BLOCK_K, tl.program_id(1), tl.program_id(2) * BLOCK_R
    k, r = first + tl.arange(0, BLOCK_K), first_rank + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for tile in range(TILES):
        m = (part * TILES + tile) * BLOCK_M
        sums = add_tokens(
            *(sums, x_ptr, v_ptr, seed_ptr, threshold, m, M, first, first_rank, K, RANK, stride_xm, stride_xk),
            *(stride_vm, HAS_DROPOUT, BLOCK_M, PRECISION),
        )
    dA_at = dA_ptr + (part.to(tl.int64) * RANK + r[:, None]) * K + k[None, :]
    tl.store(dA_at, sums, mask=(r[:, None] < RANK) & (k[None, :] < K))


@dataclass(frozen=True)
class DyOutputs:
    """What :func:`lora_dy` writes, each None where nobody wants it: partial sums, contiguous, in float32.

    ``v [groups, M, r]`` of each group of ``SLABS · BLOCK_N`` columns; ``dB [parts, N, r]`` and ``dc [parts, N]`` of
    each part of ``TILES · BLOCK_M`` tokens; and ``dz = c dy [M, N]`` in the dtype of ``dy``.
    """

    v: Tensor | None
    dB: Tensor | None
    dc: Tensor | None
    dz: Tensor | None


class DyOperands(Protocol):
    """One adapter's part, see ``fastpeft.backends.gpu.kernel_set.DyOperands``."""

    B: Tensor
    u: Tensor | None
    scale: float
    adapter_index: Tensor | None
    adapter: int
    c: Tensor | None
    z: Tensor | None


def lora_dy(
    dy: Tensor, operands: DyOperands, out: DyOutputs, rank_block: int, precision: str, config: LoraDyConfig
) -> None:
    """One read of ``dy [M, N]``: ``v = scale c∘dy B``, ``dB = scale (c∘dy)ᵀ u``, ``dc = Σ dy∘z`` and ``dz = c∘dy``."""
    B, u, index, c = operands.B, operands.u, operands.adapter_index, operands.c
    (M, N), rank = dy.shape, B.shape[1]
    parts = triton.cdiv(M, config.BLOCK_M * config.TILES)
    grid = triton.cdiv(N, config.BLOCK_N * config.SLABS), parts, triton.cdiv(rank, rank_block)
    _lora_dy_kernel[grid](
        *(dy, B, u, index, operands.adapter, c, operands.z, out.v, out.dB, out.dc, out.dz, operands.scale, M, N, rank),
        *(*dy.stride(), *B.stride(), 0 if u is None else u.stride(0)),
        HAS_INDEX=index is not None,
        HAS_C=c is not None,
        NEEDS_V=out.v is not None,
        NEEDS_DB=out.dB is not None,
        NEEDS_DC=out.dc is not None,
        NEEDS_DZ=out.dz is not None,
        BLOCK_R=rank_block,
        PRECISION=precision,
        **vars(config),
    )


def lora_dA(
    x: Tensor,
    v: Tensor,
    dA: Tensor,
    threshold: int,
    seed: Tensor | None,
    rank_block: int,
    precision: str,
    config: LoraDaConfig,
) -> None:
    """Writes ``vᵀ D(x)`` of each part of the tokens to ``dA [parts, r, K]``, float32."""
    (M, K), rank = x.shape, v.shape[1]
    grid = triton.cdiv(K, config.BLOCK_K), dA.shape[0], triton.cdiv(rank, rank_block)
    _lora_dA_kernel[grid](
        *(x, v, dA, seed, threshold, M, K, rank, *x.stride(), v.stride(0)),
        HAS_DROPOUT=threshold > 0,
        BLOCK_R=rank_block,
        PRECISION=precision,
        **vars(config),
    )

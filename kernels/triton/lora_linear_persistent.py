"""The fused product as a persistent grid over tensor descriptors: for GPUs whose copy engine moves tiles.

Each program computes one tile of y after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .lora_linear import Tail
from .tiles import finish_tile, group_tiles, keep_tile


@dataclass(frozen=True)
class LoraLinearPersistentConfig:
    """Tile sizes and launch shape of :func:`_lora_linear_persistent_kernel`.

    A tile is finished in ``PIECES``, one beside the other.
    """

    BLOCK_M: int = 128
    BLOCK_N: int = 256
    BLOCK_K: int = 64
    GROUP: int = 8
    PIECES: int = 4
    num_warps: int = 8
    num_stages: int = 4
    enable_fp_fusion: bool = True


def lora_linear_persistent_config(rank_block: int) -> LoraLinearPersistentConfig:
    """What fits the registers and shared memory. All ranks are held at once, 16 to 64 of them."""
    return (
        LoraLinearPersistentConfig()
        if rank_block == 16
        else LoraLinearPersistentConfig(BLOCK_N=128, PIECES=2, num_stages=3)
    )


@triton.jit
def _halves(tile):
    width: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, width)), (0, 2, 1)))


@triton.jit
def _finish_pieces(
    y,
    z,
    sums,
    q,
    right,
    m,
    n,
    c_ptr,
    bias_ptr,
    seed_ptr,
    threshold,
    N,
    DROPS_OUTPUT: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The tile is halved until the mask and the low-rank part under it fit the registers beside the sums."""
    ROWS: tl.constexpr = sums.shape[0]
    COLUMNS: tl.constexpr = sums.shape[1]
    if PIECES > 1:
        left, right_half = _halves(sums)
        first, second = right, right
        if DROPS_OUTPUT:
            first, second = _halves(right)
        _finish_pieces(
            *(y, z, left, q, first, m, n, c_ptr, bias_ptr, seed_ptr, threshold, N),
            *(DROPS_OUTPUT, HAS_C, HAS_Z, HAS_BIAS, PIECES // 2),
        )
        _finish_pieces(
            *(y, z, right_half, q, second, m, n + COLUMNS // 2, c_ptr, bias_ptr, seed_ptr, threshold, N),
            *(DROPS_OUTPUT, HAS_C, HAS_Z, HAS_BIAS, PIECES // 2),
        )
    else:
        if DROPS_OUTPUT:
            sums += tl.where(keep_tile(seed_ptr, threshold, m, n, ROWS, COLUMNS), tl.dot(q, right), 0.0)
        if HAS_Z:
            z.store([m, n], sums.to(z.dtype))
        out = finish_tile(sums, sums, c_ptr, bias_ptr, n + tl.arange(0, COLUMNS), N, False, HAS_C, HAS_BIAS)
        y.store([m, n], out.to(y.dtype))


@triton.jit
def _lora_linear_persistent_kernel(
    x,
    W,
    y,
    z,
    q_ptr,
    right_ptr,
    c_ptr,
    bias_ptr,
    seed_ptr,
    scale,
    threshold,
    M,
    N,
    K,
    RANK,
    stride_qm,
    stride_rn,
    stride_rr,
    W_TRANSPOSED: tl.constexpr,
    DROPS_OUTPUT: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = group_tiles(tile, row_tiles, column_tiles, GROUP)
        m, n = row_tile * BLOCK_M, column_tile * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            W_tile = W.load([k, n]) if W_TRANSPOSED else W.load([n, k]).T
            sums = tl.dot(x.load([m, k]), W_tile, sums)
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        q_at = q_ptr + rows[:, None].to(tl.int64) * stride_qm + r[None, :]
        q = tl.load(q_at, mask=(rows[:, None] < M) & (r[None, :] < RANK), other=0.0)
        right_at = right_ptr + columns[None, :].to(tl.int64) * stride_rn + r[:, None] * stride_rr
        right = tl.load(right_at, mask=(columns[None, :] < N) & (r[:, None] < RANK), other=0.0).to(x.dtype)
        q = (q * scale).to(x.dtype)
        if not DROPS_OUTPUT:
            sums = tl.dot(q, right, sums)
        _finish_pieces(
            *(y, z, sums, q, right, m, n, c_ptr, bias_ptr, seed_ptr, threshold, N),
            *(DROPS_OUTPUT, HAS_C, HAS_Z, HAS_BIAS, PIECES),
        )


def lora_linear_persistent(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    tail: Tail,
    rank_block: int,
    programs: int,
    config: LoraLinearPersistentConfig,
) -> None:
    """As ``lora_linear`` without a masked input, in half precision, by ``programs`` at most.

    ``x``, ``y``, DoRA's ``z``, and ``weight`` or its transpose are contiguous along their last dimension, their rows
    and addresses multiples of 16 bytes; there are at most ``rank_block`` ranks.
    """
    (M, K), N = x.shape, weight.shape[0]
    transposed = weight.stride(1) != 1
    W_block = [config.BLOCK_K, config.BLOCK_N] if transposed else [config.BLOCK_N, config.BLOCK_K]
    piece = [config.BLOCK_M, config.BLOCK_N // config.PIECES]
    programs = min(programs, triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N))
    _lora_linear_persistent_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [config.BLOCK_M, config.BLOCK_K]),
        TensorDescriptor.from_tensor(weight.t() if transposed else weight, W_block),
        TensorDescriptor.from_tensor(y, piece),
        None if tail.z is None else TensorDescriptor.from_tensor(tail.z, piece),
        *(tail.q, tail.right, tail.c, tail.bias, tail.seed, tail.scale, tail.threshold),
        *(M, N, K, tail.q.shape[1], tail.q.stride(0), *tail.right.stride()),
        W_TRANSPOSED=transposed,
        DROPS_OUTPUT=tail.threshold > 0,
        HAS_C=tail.c is not None,
        HAS_Z=tail.z is not None,
        HAS_BIAS=tail.bias is not None,
        BLOCK_R=rank_block,
        **vars(config),
    )

"""What several kernels do to a tile: the dropout mask, and the epilogue of a product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed_ptr, threshold, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether dropout keeps each element of rows ``row`` on and columns ``column`` on (a multiple of 8).

    Philox-4x32-10 with the counter (column // 8, row, 0, 0): four words, eight lanes of 16 bits, one a column.
    """
    group = tl.arange(0, COLUMNS // 8) + column // 8
    zero = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    group = zero + group[None, :].to(tl.uint32)
    rows = zero + (row + tl.arange(0, ROWS))[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), group, rows, zero, zero, 10)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS // 2))
    lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLUMNS))
    return lanes >= threshold


@triton.jit
def low_rank_tile(
    q_at,
    right_at,
    stride_rr,
    scale,
    rows,
    columns,
    M,
    N,
    RANK,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scale q [M, r] · right [N, r]ᵀ``, float32; ``q_at [rows, 1]`` and ``right_at [1, columns]`` point to rank 0."""
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        q = tl.load(q_at + r[None, :], mask=(rows[:, None] < M) & (r[None, :] < RANK), other=0.0)
        right_inside = (columns[None, :] < N) & (r[:, None] < RANK)
        right = tl.load(right_at + r[:, None] * stride_rr, mask=right_inside, other=0.0)
        sums = tl.dot((q * scale).to(DTYPE), right.to(DTYPE), sums, input_precision=PRECISION)
    return sums


@triton.jit
def finish_tile(
    z,
    rest,
    c_ptr,
    bias_ptr,
    columns,
    N,
    HAS_REST: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """``y = z + bias``; with DoRA's ``c``: ``c z + bias``, or, over dropped-out inputs, ``c z + rest + bias``."""
    y = z
    if HAS_C:
        y *= tl.load(c_ptr + columns, mask=columns < N, other=0.0)[None, :]
        if HAS_REST:
            y += rest
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0)[None, :].to(tl.float32)
    return y


@triton.jit
def store_tile(ptr, stride, tile, rows, columns, M, N):
    """Writes a tile of a matrix ``[M, N]`` with contiguous rows, in its dtype."""
    at = ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def group_tiles(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of the ``tile``-th tile: ``GROUP`` row tiles share a column of W tiles while it is cached."""
    group, within = tile // (GROUP * column_tiles), tile % (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height

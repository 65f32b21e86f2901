"""Which rows of a sorted input are an expert's: read from the offsets on the GPU, so that nobody waits for them."""

from __future__ import annotations

import triton
import triton.language as tl


def row_tiles(rows: int, experts: int, block: int) -> int:
    """As many tiles of ``block`` rows as there can be, whatever the offsets: each expert may have one that is not
    full."""
    return triton.cdiv(rows, block) + min(rows, experts)


@triton.jit
def expert_rows(offsets_ptr, expert, T):
    """First row and end of ``expert``, of which there may be a block. What the offsets hold was not looked at: whatever
    it is, no row is beyond the ``T`` that there are."""
    first, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    return tl.minimum(tl.maximum(first, 0), T).to(tl.int32), tl.minimum(end, T).to(tl.int32)


@triton.jit
def expert_tile(offsets_ptr, tile, T, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert whose rows are the ``tile``-th tile, its first row, and where the expert's end; a tile never has rows
    of two. For what comes after the last tile the end is not after the first row."""
    experts = tl.arange(0, BLOCK_E)
    first, end = expert_rows(offsets_ptr, tl.minimum(experts, E - 1), T)
    tiles = tl.where(experts < E, tl.cdiv(tl.maximum(end - first, 0), BLOCK_M), 0)
    before = tl.cumsum(tiles, 0) - tiles
    holds = (before <= tile) & (tile < before + tiles)  # one expert's, or none's
    expert = tl.sum(tl.where(holds, experts, 0), 0)
    m = tl.sum(tl.where(holds, first + (tile - before) * BLOCK_M, 0), 0)
    return expert, m, tl.sum(tl.where(holds, end, 0), 0)

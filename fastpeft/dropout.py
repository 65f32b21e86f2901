"""The dropout mask as a pure function of (seed, row, column): regenerated where it is needed, never stored.

Every backend computes these bits and no others. Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011) is keyed with the 64-bit seed; the counter ``(column // 8, row, 0, 0)`` yields four 32-bit words,
that is eight 16-bit lanes, one for each of the columns ``8c … 8c + 7`` (low half of word 0 first). An element is
kept when its lane is at least ``dropout_threshold(p)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
COLUMNS_PER_COUNTER = 8
_LOW32 = 0xFFFFFFFF
_LANE_VALUES = 1 << 16


def dropout_threshold(p: float) -> int:
    """Lanes below this number are dropped: ``p`` in steps of 2**-16, at most 65535 so that something survives, and one
    at least where ``p`` is not 0: DoRA's formula is another one as soon as there is dropout."""
    return min(max(round(p * _LANE_VALUES), p > 0), _LANE_VALUES - 1)


def dropout_scale(p: float) -> float:
    """What a kept element is multiplied with: 1 / (1 - p) for the ``p`` that :func:`dropout_threshold` realises."""
    return _LANE_VALUES / (_LANE_VALUES - dropout_threshold(p))


def dropout_seeds(count: int, device: torch.device) -> Tensor:
    """``count`` fresh int64 seeds from torch's own generator of ``device``; they stay on that device."""
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=device)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of the counter ``(c0, c1, c2, c3)``: four words, each 32 bits held in an int64 (broadcast)."""
    key0, key1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]  # wraps modulo 2**64: exact
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW32) ^ c1 ^ key0,
            product1 & _LOW32,
            ((product0 >> 32) & _LOW32) ^ c3 ^ key1,
            product0 & _LOW32,
        )
        key0, key1 = (key0 + PHILOX_KEY_STEPS[0]) & _LOW32, (key1 + PHILOX_KEY_STEPS[1]) & _LOW32
    return c0, c1, c2, c3


def dropout_keep(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Boolean ``[rows, columns]``, true where an element is kept.

    Args:
        seed: 0-dim int64 tensor; its device is the result's.
        rows: number of tokens M (leading dimensions flattened).
        columns: number of input features K.
        p: probability of dropping, in [0, 1).
    """
    groups = -(-columns // COLUMNS_PER_COUNTER)
    group = torch.arange(groups, dtype=torch.int64, device=seed.device).unsqueeze(0)
    row = torch.arange(rows, dtype=torch.int64, device=seed.device).unsqueeze(1)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, group, row, zero, zero)), dim=-1)  # [rows, groups, 4]
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(rows, groups * COLUMNS_PER_COUNTER)
    return lanes[:, :columns] >= dropout_threshold(p)

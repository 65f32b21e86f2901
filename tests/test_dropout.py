"""The mask: Philox's published vectors, its statistics, its independence of extents."""

from __future__ import annotations

import math

import pytest
import torch

from fastpeft.dropout import dropout_keep, dropout_scale, dropout_seeds, dropout_threshold, philox

CPU = torch.device("cpu")
LANES = 1 << 16

# Random123, tests/kat_vectors, philox4x32 10: key, counter, result
KNOWN_ANSWERS = [
    ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def seed_of(key0: int, key1: int) -> torch.Tensor:
    unsigned = key0 | key1 << 32
    return torch.tensor(unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned)


@pytest.mark.parametrize(("key", "counter", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(key: str, counter: str, result: str) -> None:
    state = philox(seed_of(*words(key)), *map(torch.tensor, words(counter)))
    assert [int(word) for word in state] == words(result)


def test_mask_lanes_are_the_words_of_the_counter_low_half_first() -> None:
    seed = seed_of(*words("a4093822 299f31d0"))
    row, group = 5, 3
    state = philox(seed, torch.tensor(group), torch.tensor(row), torch.tensor(0), torch.tensor(0))
    lanes = [int(word) >> shift & 0xFFFF for word in state for shift in (0, 16)]
    for p in (0.1, 0.5, 0.9):
        mask = dropout_keep(seed, row + 1, 8 * (group + 1), p)[row, 8 * group :]
        assert mask.tolist() == [lane >= dropout_threshold(p) for lane in lanes]


@pytest.mark.parametrize(
    ("p", "threshold"),
    [
        (0.0, 0),
        (1e-9, 1),
        (1 / LANES, 1),
        (0.1, 6554),
        (0.5, 32768),
        (1 - 1e-9, LANES - 1),
        (math.nextafter(1, 0), LANES - 1),
    ],
)
def test_threshold_is_p_in_lanes_and_something_survives(p: float, threshold: int) -> None:
    assert dropout_threshold(p) == threshold
    assert dropout_scale(p) == LANES / (LANES - threshold)


@pytest.mark.parametrize("p", [0.0, 1e-9])
def test_nothing_is_dropped_below_the_resolution(p: float) -> None:
    assert dropout_keep(torch.tensor(1), 257, 257, p).all()


@pytest.mark.parametrize("p", [1 / LANES, 0.05, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_keep_rate_is_binomial(p: float) -> None:
    rows, columns = 400, 403
    draws, rate = rows * columns, 1 / dropout_scale(p)
    kept = int(dropout_keep(dropout_seeds(1, CPU)[0], rows, columns, p).sum())
    # outside of 5 standard deviations (and one count, for rates of few events) fewer than once in a million seeds
    assert abs(kept - draws * rate) <= 5 * math.sqrt(draws * rate * (1 - rate)) + 1


@pytest.mark.parametrize("step", [(0, 1), (0, 2), (0, 8), (1, 0), (2, 0), (1, 1)])
def test_neighbours_and_the_lanes_of_one_counter_are_uncorrelated(step: tuple[int, int]) -> None:
    mask = dropout_keep(dropout_seeds(1, CPU)[0], 400, 400, 0.5).double() * 2 - 1
    down, right = step
    products = mask[: 400 - down, : 400 - right] * mask[down:, right:]
    assert abs(products.sum().item()) <= 5 * math.sqrt(products.numel())


def test_seeds_and_bits_of_a_seed_give_unrelated_masks() -> None:
    base = 0x0123456789ABCDEF
    first = dropout_keep(torch.tensor(base), 128, 128, 0.5)
    for bit in range(63):
        other = dropout_keep(torch.tensor(base ^ 1 << bit), 128, 128, 0.5)
        differing = int((first != other).sum())
        assert abs(differing - first.numel() / 2) <= 5 * math.sqrt(first.numel()) / 2, bit


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (3, 8), (3, 9), (20, 63), (0, 5)])
def test_the_mask_of_a_part_is_a_part_of_the_mask(rows: int, columns: int) -> None:
    seed = dropout_seeds(1, CPU)[0]
    whole = dropout_keep(seed, 20, 64, 0.3)
    part = dropout_keep(seed, rows, columns, 0.3)
    assert part.shape == (rows, columns)
    assert torch.equal(part, whole[:rows, :columns])


def test_seeds_follow_torch_generator() -> None:
    torch.manual_seed(3)
    first, second = dropout_seeds(4, CPU), dropout_seeds(4, CPU)
    torch.manual_seed(3)
    assert torch.equal(dropout_seeds(4, CPU), first)
    assert len({*first.tolist(), *second.tolist()}) == 8
    assert first.dtype == torch.int64

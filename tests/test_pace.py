"""How many steps the demo chooses by itself: a matter of arithmetic, without a clock."""

from __future__ import annotations

import pytest

from fastpeft.experiments.pace import BUDGET, FEWEST, MOST, reason, steps_that_fit


@pytest.mark.parametrize(
    ("peft", "fused", "spent", "after", "expected"),
    [
        (1.0, 0.5, 0.0, 0.0, int(BUDGET / 1.5)),
        (1.0, 0.5, 30.0, 0.0, int((BUDGET - 30.0) / 1.5)),
        (1.0, 0.5, 30.0, 12.0, int((BUDGET - 30.0) / 1.5) - 12),
        (0.001, 0.0005, 5.0, 12.0, MOST),
        (60.0, 50.0, 100.0, 12.0, FEWEST),
        (1.0, 0.5, 10 * BUDGET, 12.0, FEWEST),
    ],
)
def test_steps_fill_the_time_that_is_left(peft: float, fused: float, spent: float, after: float, expected: int) -> None:
    assert steps_that_fit({"PEFT": peft, "fastpeft": fused}, spent, after) == expected


@pytest.mark.parametrize("slowness", [1.0, 1.5, 2.0, 3.0])
def test_slow_and_fast_processors_end_after_the_same_time(slowness: float) -> None:
    paces = {"PEFT": 0.5 * slowness, "fastpeft": 0.3 * slowness}
    spent, after = 10.0 * slowness, 12.0
    steps = steps_that_fit(paces, spent, after)
    whole = spent + (steps + after) * sum(paces.values())
    assert BUDGET - sum(paces.values()) < whole <= BUDGET


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        (FEWEST, "the fewest that show anything, though they may take more than three minutes"),
        (77, "as many as let the demo end after about three minutes"),
        (MOST, "the most that the demo chooses by itself; they take less than three minutes"),
    ],
)
def test_the_reason_names_the_steps_and_the_paces(steps: int, why: str) -> None:
    assert reason(steps, {"PEFT": 1.25, "fastpeft": 0.5}) == (
        f"{steps} steps each, {why}: in a short trial a step took 1.250 s by PEFT, 0.500 s by fastpeft. "
        "--steps sets another number."
    )

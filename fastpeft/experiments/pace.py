"""How many steps the demo trains when nobody says: as many as let it end after about three minutes on this machine."""

from __future__ import annotations

from collections.abc import Mapping

BUDGET = 180.0  # seconds from the command's start to its end
TRIAL_STEPS = 3
FEWEST = 10  # the loss has hardly moved after fewer
MOST = 300  # at the default batch size every sentence has been seen by then


def steps_that_fit(paces: Mapping[str, float], spent: float, after: float) -> int:
    """The number of steps for each contender, between ``FEWEST`` and ``MOST``.

    Args:
        paces: the seconds that one step takes, by contender; all of them take every step.
        spent: the seconds that are gone already.
        after: the work that follows the training, as a number of steps of each contender.
    """
    fitting = (BUDGET - spent) / sum(paces.values()) - after
    return int(min(max(fitting, FEWEST), MOST))


def reason(steps: int, paces: Mapping[str, float]) -> str:
    """What :func:`steps_that_fit` chose, and why, for the reader of the demo."""
    if steps <= FEWEST:
        why = "the fewest that show anything, though they may take more than three minutes"
    elif steps >= MOST:
        why = "the most that the demo chooses by itself; they take less than three minutes"
    else:
        why = "as many as let the demo end after about three minutes"
    trial = ", ".join(f"{seconds:.3f} s by {name}" for name, seconds in paces.items())
    return f"{steps} steps each, {why}: in a short trial a step took {trial}. --steps sets another number."

"""The clock: contestants take turns, round by round, so that a stall of the machine hits all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WARM_UP = 3
LONGEST_WARM_UP = 5.0
"""Seconds after which a callable is warm, however few calls these were."""
LONGEST_ROUNDS = 300.0
"""Seconds after which no further round begins, once each has two samples: products that stock torch emulates take
minutes, and what is that slow needs no many samples."""
SHORTEST_SAMPLE = 0.005
"""Seconds that a sample lasts at least: faster calls are repeated within it."""


@dataclass
class Samples:
    """Seconds per call, one entry a round: on the wall clock, and of processor time over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
    agree: Callable[[float], float] = lambda seconds: seconds,
) -> dict[str, Samples]:
    """Times ``runs`` in rounds: A B C, A B C, …

    Args:
        runs: callables by name; each is called :data:`WARM_UP` times beforehand, untimed.
        rounds: number of samples of each; fewer where they take longer than :data:`LONGEST_ROUNDS`.
        synchronize: waits for work that a device still has in its queue.
        agree: the same seconds in all processes that take part in ``runs``: what decides how often these are called.
    """
    fastest = math.inf
    for run in runs.values():
        began = time.perf_counter()
        for _ in range(WARM_UP):
            fastest = min(fastest, _sample(run, 1, synchronize)[0])
            if agree(time.perf_counter() - began) > LONGEST_WARM_UP:
                break
    calls = max(1, math.ceil(SHORTEST_SAMPLE / agree(fastest)))
    samples = {name: Samples() for name in runs}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= 2 and agree(time.perf_counter() - began) > LONGEST_ROUNDS:
                break
            for name, run in runs.items():
                wall, cpu = _sample(run, calls, synchronize)
                samples[name].wall.append(wall)
                samples[name].cpu.append(cpu)
    finally:
        if collecting:
            gc.enable()
    return samples


def _sample(run: Callable[[], Any], calls: int, synchronize: Callable[[], None]) -> tuple[float, float]:
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round."""
    return [n / d for n, d in zip(numerator, denominator, strict=True)]


def summary(values: Sequence[float]) -> dict[str, float]:
    """``min``, ``q1``, ``median`` and ``q3`` of at least two values, to six significant digits."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    named = {"min": min(values), "q1": q1, "median": median, "q3": q3}
    return {name: float(f"{value:.6g}") for name, value in named.items()}

"""Which method to take under limits on memory, time and size, with the reasons in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import words
from .rows import UNTRAINED
from .summary import Row, Summary, comparisons, difference_interval, summaries, without_plain


@dataclass(frozen=True)
class Budget:
    """The most that is allowed; None is no limit.

    Attributes:
        peak: bytes that a training step holds.
        step_seconds, training_seconds: of a step, of the whole training.
        trainable: number of trained parameters.
        adapter_file: bytes of what is saved.
    """

    peak: float | None = None
    step_seconds: float | None = None
    training_seconds: float | None = None
    trainable: float | None = None
    adapter_file: float | None = None


_LIMITS = {
    "peak": ("peak memory", words.size),
    "step_seconds": ("a step", words.duration),
    "training_seconds": ("training", words.duration),
    "trainable": ("trainable parameters", words.count),
    "adapter_file": ("the saved file", words.size),
}


@dataclass(frozen=True)
class Recommendation:
    """A choice.

    Attributes:
        choice: what to take.
        runner_up: what comes next of all that fits, or None.
        too_large: why each of the others does not fit, by label.
        why: two or three sentences.
    """

    choice: Summary
    runner_up: Summary | None
    too_large: Mapping[str, str]
    why: str

    def __str__(self) -> str:
        return self.why


def recommend(rows: Iterable[Row], budget: Budget) -> Recommendation:
    """:func:`choose` among the summaries of ``rows``."""
    return choose(summaries(rows), budget)


def choose(every: Sequence[Summary], budget: Budget) -> Recommendation:
    """The best mean test score of all that fit; of those that are as good within noise the cheapest.

    As good is what lies within one standard deviation of the best (over the seeds; of one seed's accuracy that of the
    draw of the test examples), or whose 95 % bootstrap interval of the difference to it holds 0. Cheap is what takes
    few byte-seconds: a step's seconds times its peak memory.

    Raises:
        ValueError: there are no rows with a result, rows of several tasks, models or machines, or nothing fits.
    """
    every = [own for own in without_plain(every) if own.score is not None and own.method != UNTRAINED]
    if not every:
        raise ValueError("rows: there is none of a trained method that has a result")
    groups = comparisons(every)
    if len(groups) > 1:
        scopes = "; ".join(words.scopes(groups))
        raise ValueError(
            f"rows: they are of {len(groups)} comparisons, each of which needs a folder of its own: {scopes}"
        )
    too_large = {own.label: reason for own in every if (reason := _excess(own, budget))}
    fitting = sorted((own for own in every if own.label not in too_large), key=_score, reverse=True)
    if not fitting:
        nearest = "; ".join(f"{label}: {reason}" for label, reason in too_large.items())
        raise ValueError(f"budget: nothing fits, {nearest}")
    best = fitting[0]
    equal = [own for own in fitting if _as_good(own, best)]
    choice = min(equal, key=_cost)
    rest = [own for own in equal if own is not choice] or [own for own in fitting if own is not choice]
    runner_up = max(rest, key=_score, default=None)
    return Recommendation(choice, runner_up, too_large, _why(choice, best, equal, runner_up, too_large))


def _score(own: Summary) -> float:
    assert own.score is not None
    return own.score.mean if own.higher_is_better else -own.score.mean


def _as_good(own: Summary, best: Summary) -> bool:
    assert best.score is not None
    interval = difference_interval(own.by_seed, best.by_seed)
    within = interval is not None and interval[0] <= 0 <= interval[1]
    return within or _score(best) - _score(own) <= _deviation(best)


def _deviation(own: Summary) -> float:
    assert own.score is not None
    if own.score.deviation is not None:
        return own.score.deviation
    share = own.score.mean
    return math.sqrt(share * (1 - share) / own.task["test"]) if own.task["metric"] == "accuracy" else 0.0


def _cost(own: Summary) -> float:
    """Byte-seconds of a step; what was not measured is not cheap."""
    return float("inf") if own.step_seconds is None or own.peak is None else own.step_seconds * own.peak


def _excess(own: Summary, budget: Budget) -> str:
    reasons = []
    for name, (title, show) in _LIMITS.items():
        limit, value = getattr(budget, name), getattr(own, name)
        if limit is not None and value is None:
            reasons.append(f"{title} was not measured")
        elif limit is not None and value > limit:
            reasons.append(f"{title} {show(value)}, limit {show(limit)}")
    return ", ".join(reasons)


def _why(
    choice: Summary, best: Summary, equal: Sequence[Summary], runner_up: Summary | None, too_large: Mapping[str, str]
) -> str:
    metric = choice.task["metric"]
    costs = f"{words.duration(choice.step_seconds)} and {words.size(choice.peak)} a step"
    reached = f"{metric} {words.spread(choice.score, choice.unit)}"
    if choice is best and len(equal) == 1:
        first = f"{choice.label}: the best of all that fits, with {reached} at {costs}."
    elif choice is best:
        first = f"{choice.label}: the best of all that fits, and none as good is cheaper, with {reached} at {costs}."
    else:
        first = (
            f"{choice.label}: {reached} at {costs}. {best.label} is ahead by no more than noise, with "
            f"{words.spread(best.score, best.unit)} at {words.duration(best.step_seconds)} and {words.size(best.peak)}."
        )
    sentences = [first]
    if runner_up is not None:
        sentences.append(
            f"Runner-up: {runner_up.label}, {words.spread(runner_up.score, runner_up.unit)} at "
            f"{words.duration(runner_up.step_seconds)} and {words.size(runner_up.peak)} a step."
        )
    if too_large:
        sentences.append("Did not fit: " + "; ".join(f"{label} ({why})" for label, why in too_large.items()) + ".")
    return " ".join(sentences)

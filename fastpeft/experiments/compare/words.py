"""Numbers as they are printed: short, with a unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .summary import Spread, Summary

NOTHING = "–"


def count(number: float | None) -> str:
    """A number of things: 295k."""
    if number is None:
        return NOTHING
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            return f"{_three_digits(number / unit)}{letter}"
    return f"{number:.0f}"


def size(number: float | None) -> str:
    """Bytes: 12.3 MiB."""
    if number is None:
        return NOTHING
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{_three_digits(number / unit)} {name}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """12.3 ms, 2.50 s or 3.0 min."""
    if seconds is None:
        return NOTHING
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{_three_digits(seconds)} s" if seconds >= 1 else f"{_three_digits(seconds * 1e3)} ms"


def share(number: float | None) -> str:
    """Of a whole, with three digits: 0.0123 %."""
    return NOTHING if number is None else f"{_three_digits(100 * number)} %"


def percent(number: float | None) -> str:
    return NOTHING if number is None else f"{100 * number:.1f} %"


def times(number: float | None) -> str:
    return NOTHING if number is None else f"{number:.2f}×"


def points(number: float | None) -> str:
    return NOTHING if number is None else f"{number:+.2f}"


def spread(value: Spread | None, unit: float = 1.0) -> str:
    """The mean over the seeds ± their standard deviation."""
    if value is None:
        return NOTHING
    deviation = "" if value.deviation is None else f" ± {value.deviation / unit:.2f}"
    return f"{value.mean / unit:.2f}{deviation}"


def failures(summary: Summary) -> str:
    """Each reason once, with its seeds: out of memory (seeds 0, 1)."""
    seeds: dict[str, list[int]] = {}
    for failure in summary.failures:
        seeds.setdefault(" ".join(failure.reason.split()), []).append(failure.seed)
    return "; ".join(
        f"{reason} (seed{'s' if len(every) > 1 else ''} {', '.join(map(str, every))})"
        for reason, every in seeds.items()
    )


def metric(summary: Summary) -> str:
    """The task's metric and, where it is shown in percent, that it is."""
    return f"{summary.task['metric']}, %" if summary.higher_is_better else str(summary.task["metric"])


def scopes(groups: Iterable[Sequence[Summary]]) -> list[str]:
    """What each comparison is of; its machine, too, where others are of the same task and model."""
    firsts = [group[0] for group in groups]
    short = [f"{own.task['title']} · {own.model['title']}" for own in firsts]
    return [
        f"{scope} · {own.machine}, {own.threads} threads" if short.count(scope) > 1 else scope
        for own, scope in zip(firsts, short, strict=True)
    ]


def _three_digits(number: float) -> str:
    if number >= 99.95 or number == 0:
        return f"{number:.0f}"
    return f"{number:.3g}" if number < 0.9995 else f"{number:.{2 if number < 9.995 else 1}f}"

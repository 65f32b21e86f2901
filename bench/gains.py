"""docs/gains.md, drawn from the recorded rows: which adapter, which dtype, which machine, and what fastpeft gains."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastpeft.experiments.models import METHODS

from . import table
from .contestants import FASTPEFT
from .rows import Row
from .summary import Comparison, comparisons

PAGE = Path("docs", "gains.md")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_HEADING = """# What you gain

Which adapter, which dtype, which machine: drawn by `make tables` from the rows under `bench/results/`, whose pages have
each case by itself. A cell is the least, the median and the most over all sizes on record, from one token to thousands:
how many times as fast as PEFT at its fastest (as it comes, under autocast or compiled, where that was measured), a step
also as a multiple of the frozen base's (1.00 would be an adapter for free), and what is kept for the backward pass as a
share of what PEFT keeps. – is not measured."""
_COLUMNS = ("training step", "its time over the frozen base's", "forward pass", "one token", "memory kept", "cases")


def text(machines: Mapping[Path, Sequence[Row]]) -> str:
    """The page for the rows of each machine, by the file that they come from."""
    return "\n\n".join([_HEADING, *(_machine(path, found) for path, found in machines.items())]) + "\n"


def _machine(path: Path, found: Sequence[Row]) -> str:
    by_kind: dict[tuple[str, str, bool], list[Comparison]] = {}
    for comparison in comparisons(found):
        case = comparison.ours.case
        by_kind.setdefault((case["method"], case["dtype"], case["dropout"] > 0), []).append(comparison)
    lines = [[_title(*kind), *_cells(own)] for kind, own in by_kind.items()]
    page = path.with_suffix(".md").as_posix()
    return f"## {found[-1].where}\n\n[All cases](../{page})\n\n{table.markdown_table(['adapter'], _COLUMNS, lines)}"


def _title(method: str, dtype: str, dropout: bool) -> str:
    return f"{METHODS[method]}, {_DTYPES[dtype]}{', dropout' if dropout else ''}"


def _cells(own: Sequence[Comparison]) -> list[str]:
    def over(phase: str, measure: Callable[[Comparison], float | None], unit: str = "×") -> str:
        found = [value for each in own if each.ours.phase == phase and (value := measure(each)) is not None]
        return _spread(found, unit)

    def gain(comparison: Comparison) -> float | None:
        return comparison.speed_up_over_fastest

    return [
        over("step", gain),
        over("step", lambda comparison: comparison.over_base(FASTPEFT), ""),
        over("forward", gain),
        over("generate", gain),
        over("step", lambda comparison: _percent(comparison.kept_share), " %"),
        str(len({comparison.ours.case["shape"] for comparison in own})),
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _spread(values: Sequence[float], unit: str) -> str:
    if not values:
        return "–"
    shown = [_number(value) for value in (min(values), statistics.median(values), max(values))]
    return f"{shown[1]}{unit}" if len(set(shown)) == 1 else f"{shown[0]} – **{shown[1]}** – {shown[2]}{unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 1.995 else f"{value:.2f}"

"""README's numbers, drawn from the recorded rows: ``python -m fastpeft.bench.readme`` in a checkout rewrites them, its
picture, docs/gains.md and the machines' pages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import click

from . import gains, page, plot, rows, table
from .cases import RANK, ModelCase
from .contestants import FASTPEFT, PEFT
from .rows import Row
from .summary import LABELS, Comparison, chosen, comparisons, layer

BENCH, COMPARE = "bench", "compare"
"""The parts that are rewritten: each stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
RESULTS = Path("bench", "results")
PICTURE = RESULTS / "summary.png"
NO_ROWS = "No rows recorded yet: `make bench` records them."
# Rows of cpu_kernels.py and gpu_kernels.py, plans, per_call.py, host_time.py and experts.py, beside those of layers and
# models.
_KERNELS = (
    "*-kernels.jsonl",
    "*-plans.jsonl",
    "*-per-call.jsonl",
    "*-host-time.jsonl",
    "*-experts.jsonl",
    "*-experts-*.jsonl",
)
_PHASES = {"step": "training step", "forward": "forward pass alone", "generate": "one token"}
_MODEL = ModelCase("bf16")
_NAMED = 3  # cases, where many are slower


@click.command()
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path())
def command(root: Path) -> None:
    """Draw the page of every machine, docs/gains.md and README's picture and numbers anew in ROOT, a checkout of
    fastpeft (default: here)."""
    machines = recorded(root)
    for path, found in machines.items():
        page.write(found, root / path)
    (root / gains.PAGE).write_text(gains.text(machines), encoding="utf-8")
    if own := _themselves(machines):
        plot.draw_summary(list(own.values()), root / PICTURE)
    readme = root / "README.md"
    readme.write_text(drawn_anew(readme.read_text(encoding="utf-8"), root), encoding="utf-8")


def drawn_anew(text: str, root: Path) -> str:
    """README's ``text`` with the numbers that are on record in ``root``."""
    from fastpeft.experiments.compare import readme as compared

    return rewritten(rewritten(text, BENCH, block(root)), COMPARE, compared.block(root / RESULTS / COMPARE))


def rewritten(text: str, part: str, new: str) -> str:
    """``text`` with ``new`` between the marks of ``part``. Raises ValueError unless each stands there once, in turn."""
    opening, closing = f"<!-- {part} -->", f"<!-- /{part} -->"
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end or opening in rest or closing in before + after:
        raise ValueError(f"README.md must hold {opening} and then {closing}, each once")
    return f"{before}{opening}\n{new}\n{closing}{after}"


def recorded(root: Path) -> dict[Path, list[Row]]:
    """The newest rows of each machine, by their file relative to ``root``; machines without rows are left out."""
    paths = sorted(path for path in (root / RESULTS).glob("*.jsonl") if not any(map(path.match, _KERNELS)))
    found = {path.relative_to(root): rows.latest(rows.load(path)) for path in paths}
    return {path: rows for path, rows in found.items() if rows}


def _themselves(machines: dict[Path, list[Row]]) -> dict[Path, list[Row]]:
    """Without those that play another: they have a page, and no part in README's numbers."""
    return {path: found for path, found in machines.items() if not found[-1].machine.get("played")}


def block(root: Path) -> str:
    """Markdown for the rows in ``root/bench/results``; links are relative to ``root``."""
    machines = recorded(root)
    if not machines:
        return NO_ROWS
    own = _themselves(machines)
    compared = [comparison for found in own.values() for comparison in comparisons(found)]
    return "\n\n".join(
        [
            "**How much faster a training step is** than PEFT's, and **how near to free**: fastpeft's and PEFT's time "
            "as a multiple of the frozen base's alone, 1.00 being an adapter for free.",
            _table(list(own.values())),
            f"bfloat16, rank {RANK}; M×K×N are M tokens through a layer from K to N features, the small Llama has "
            f"{_MODEL.layers} blocks of width {_MODEL.hidden} and reads {_MODEL.tokens} tokens; the frozen base is "
            "dense, QLoRA's too. Medians over rounds in which all take turns; – is not measured.",
            f"![A training step as a multiple of the frozen base's]({PICTURE.as_posix()})",
            "All cases on record of these machines, of every size, dtype and method, from the least to the most. PEFT "
            "at its fastest is PEFT as it comes, under autocast or, where that was measured, compiled:",
            _bullets([*(_range(compared, phase) for phase in _PHASES), _slower(compared), _kept(compared)]),
            "Each machine has a page of all its cases, also where it played a lesser one:",
            _bullets([_origin(path, found) for path, found in machines.items()]),
        ]
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(machines: Sequence[Sequence[Row]]) -> str:
    columns = [chosen(found) for found in machines]
    names = [f"{found[-1].where}<br>{layer(found)}" for found in machines]
    lines = [
        [label, *(_cell(column.get(label)) for column in columns)]
        for label in LABELS
        if any(label in column for column in columns)
    ]
    return table.markdown_table(["training step"], names, lines)


def _cell(comparison: Comparison | None) -> str:
    if comparison is None:
        return "–"
    speed_up, ours, theirs = comparison.speed_up, comparison.over_base(FASTPEFT), comparison.over_base(PEFT)
    if speed_up is None or ours is None or theirs is None:
        return "parity fails"
    gain = f"{_times(speed_up)} faster" if speed_up >= 1 else f"{_times(1 / speed_up)} slower"
    return f"**{gain}**<br>{table.multiple(ours)}, PEFT {table.multiple(theirs)}"


def _times(ratio: float) -> str:
    """Two digits, or as many as stand before the point."""
    return f"{ratio:.{2 if ratio < 1 else 1 if ratio < 10 else 0}f}×"


def _range(compared: Sequence[Comparison], phase: str) -> str:
    """What fastpeft gains and costs, from the worst case to the best."""
    own = [comparison for comparison in compared if comparison.ours.phase == phase]
    measures = {
        "PEFT's speed": [comparison.speed_up for comparison in own],
        "that of PEFT at its fastest": [comparison.speed_up_over_fastest for comparison in own],
        "the frozen base's time": [comparison.over_base(FASTPEFT) for comparison in own],
    }
    spreads = [f"{_spread(found)} {name}" for name, ratios in measures.items() if (found := _known(ratios))]
    return f"{_PHASES[phase]} ({len(own)}): {'; '.join(spreads) or 'no ratio'}"


def _known(ratios: Sequence[float | None]) -> list[float]:
    return [ratio for ratio in ratios if ratio is not None]


def _spread(ratios: Sequence[float]) -> str:
    return f"{_times(min(ratios))} to {_times(max(ratios))} (median {_times(statistics.median(ratios))})"


def _slower(compared: Sequence[Comparison]) -> str:
    """Names the cases in which PEFT, in its fastest way, takes less time, the worst first; and what has no ratio."""
    rated = [(ratio, comparison.ours) for comparison in compared if (ratio := comparison.speed_up_over_fastest)]
    slower = sorted(((ratio, row) for ratio, row in rated if ratio < 1), key=lambda pair: pair[0])
    named = [f"{row.title}, {row.phase}, {row.where} ({_times(ratio)})" for ratio, row in slower[:_NAMED]]
    failing = sum(comparison.ours.against is None for comparison in compared)
    return (
        f"slower than PEFT at its fastest: {len(slower) or 'none'}"
        + (f", {'' if len(slower) <= _NAMED else 'the slowest '}{'; '.join(named)}" if named else "")
        + (f"; wrong, and so without a speed: {failing}" if failing else "")
    )


def _kept(compared: Sequence[Comparison]) -> str:
    shares = _known([comparison.kept_share for comparison in compared])
    if not shares:
        return "memory kept from forward to backward: not measured"
    return (
        f"memory kept from forward to backward: {min(shares):.2%} to {max(shares):.0%} of what PEFT keeps "
        f"(median {statistics.median(shares):.0%})"
    )


def _origin(path: Path, found: Sequence[Row]) -> str:
    page_of_all, lines = path.with_suffix(".md"), path
    return f"[{page_of_all.name}]({page_of_all.as_posix()}), [rows]({lines.as_posix()}): {table.origin(found)}"


if __name__ == "__main__":
    command()

"""What a call of a layer costs beside its arithmetic, of which a small one has little: ``python -m
fastpeft.bench.per_call``.

The interpreter's and torch's own time: one token through a layer 64 wide, thousands of calls, contestants in turns. A
round repeats each call until the fastest has taken five milliseconds.
Rows are appended to ``bench/results/<machine>-per-call.jsonl``, the table beside them is drawn from the newest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from fastpeft.experiments.models import METHODS
from fastpeft.experiments.timing import interleave, ratios, summary

from .cases import LayerCase
from .contestants import BASE, FASTPEFT, PEFT
from .measure import Run, record_kernels
from .play import isa_option
from .table import spread

WIDTH = 64
ROUNDS = 60  # of hundreds of calls each: about ten thousand
MOST_OF_PEFTS = 0.5
"""fastpeft's call is meant to take at most so much of PEFT's."""
PHASES = {"generate": "evaluation", "forward": "forward, with autograd", "step": "forward and backward"}


def measure(methods: Sequence[str], rounds: int, run: Run) -> Iterator[dict[str, Any]]:
    """A row for every method and phase, in float32."""
    for method in methods:
        case = LayerCase(1, WIDTH, WIDTH, "fp32", method=method)
        runners = {who.name: who.setup(case) for who in (BASE, PEFT, FASTPEFT)}
        for phase in PHASES:
            samples = interleave({name: runner.phase(phase) for name, runner in runners.items()}, rounds)
            yield {
                **run.facts(),
                "method": method,
                "phase": phase,
                "width": WIDTH,
                "rank": case.rank,
                "rounds": rounds,
                "seconds": {name: summary(each.wall) for name, each in samples.items()},
                "over_peft": summary(ratios(samples[FASTPEFT.name].wall, samples[PEFT.name].wall)),
            }


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Microseconds of each, and fastpeft's over PEFT's with its quartiles."""
    first = found[0]
    lines = [
        f"{first['machine']['cpu']}, {first['threads']} threads, {first['instruction_set']} kernels, "
        f"{first['run'][:10]}, commit {str(first['commit'])[:9]}. One token through a layer {first['width']} wide, "
        f"float32, rank {first['rank']}; medians over {first['rounds']} rounds of hundreds of calls, in µs.",
        "",
        "| method | | base | PEFT | fastpeft | fastpeft / PEFT | meant |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        base, peft, ours = (f"{row['seconds'][who.name]['median'] * 1e6:.1f}" for who in (BASE, PEFT, FASTPEFT))
        what = f"{METHODS[row['method']]} | {PHASES[row['phase']]}"
        lines.append(f"| {what} | {base} | {peft} | {ours} | {spread(row['over_peft'])} | {MOST_OF_PEFTS} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=ROUNDS, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"))
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Repeatable.  [all]")
@isa_option("fastpeft.bench.per_call")
def command(rounds: int, out: Path, methods: Sequence[str]) -> None:
    """Times a call's own cost against PEFT's."""
    record_kernels("per-call", lambda run: measure(methods or list(METHODS), rounds, run), markdown, out)


if __name__ == "__main__":
    command()

"""What a side-by-side training found: a table for the terminal, a plot, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

_LAST_SHARE = 10
_COLORS = ("#d1495b", "#00798c")


@dataclass(frozen=True)
class Result:
    """One run: the loss and the wall seconds of each step, and what was measured after the last one."""

    name: str
    losses: list[float]
    seconds: list[float]
    seconds_per_step: float
    test_loss: float
    test_accuracy: float
    peak_bytes: int
    kept_bytes: int
    trainable_parameters: int

    @property
    def last_loss(self) -> float:
        """Mean training loss over the last tenth of the steps."""
        return fmean(self.losses[-max(len(self.losses) // _LAST_SHARE, 1) :])


@dataclass(frozen=True)
class _Row:
    """A number of a :class:`Result`, as it is printed for a run and as it is compared with another run's."""

    title: str
    value: Callable[[Result], float]
    show: Callable[[float], str]
    compare: Callable[[float, float], str]


def _difference(form: str) -> Callable[[float, float], str]:
    return lambda value, base: form.format(value - base)


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}×"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


_ROWS = (
    _Row("training loss, last tenth of the steps", lambda run: run.last_loss, "{:.4f}".format, _difference("{:+.4f}")),
    _Row("test loss", lambda run: run.test_loss, "{:.4f}".format, _difference("{:+.4f}")),
    _Row("test accuracy", lambda run: run.test_accuracy, "{:.1%}".format, _difference("{:+.1%}")),
    _Row("seconds per step, median", lambda run: run.seconds_per_step, "{:.3f}".format, _ratio),
    _Row("peak memory", lambda run: run.peak_bytes, _mebibytes, _ratio),
    _Row("kept for backward", lambda run: run.kept_bytes, _mebibytes, _ratio),
    _Row("trainable parameters", lambda run: run.trainable_parameters, "{:,}".format, _ratio),
)


def results_table(results: Sequence[Result]) -> Table:
    """A column for each run, then one for each run but the first that sets it against the first."""
    base, *others = results
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for title in (*(run.name for run in results), *(f"{run.name} / {base.name}" for run in others)):
        table.add_column(title, justify="right")
    for row in _ROWS:
        shown = (row.show(row.value(run)) for run in results)
        table.add_row(row.title, *shown, *(row.compare(row.value(run), row.value(base)) for run in others))
    return table


def write_json(path: Path, settings: dict[str, Any], results: Sequence[Result]) -> None:
    """Writes the settings and every number of every run, each step's loss and seconds among them."""
    path.write_text(json.dumps({"settings": settings, "runs": [asdict(run) for run in results]}, indent=1) + "\n")


def draw_losses(path: Path, title: str, results: Sequence[Result]) -> None:
    """Writes a PNG with the training losses of all runs: on the left by step, on the right by seconds spent in steps.

    The lines are exponential means over the steps; the raw losses stand behind them in a paler colour.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for order, (run, color) in enumerate(zip(results, _COLORS, strict=True)):
        steps = range(1, len(run.losses) + 1)
        width = 4.0 - 2.5 * order  # the later line is the thinner one: the first stays visible under it
        for axes, x in ((by_step, steps), (by_time, list(accumulate(run.seconds)))):
            axes.plot(x, run.losses, color=color, alpha=0.18, linewidth=0.8)
            axes.plot(x, smoothed(run.losses), color=color, alpha=0.55 + 0.45 * order, linewidth=width, label=run.name)
    by_step.set(title="by step", xlabel="step", ylabel="training loss")
    by_time.set(title="by time", xlabel="seconds spent in training steps")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    by_step.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path)


def smoothed(values: Sequence[float], weight: float = 0.1) -> list[float]:
    """The exponential mean up to each value, each new one counting ``weight``; early ones weighted to sum to 1."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total += weight * (value - total)
        mass += weight * (1.0 - mass)
        means.append(total / mass)
    return means

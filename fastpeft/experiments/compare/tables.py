"""Summaries as tables: Markdown, CSV and LaTeX files, and one for the terminal."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import words
from .summary import IN_PLAIN, Summary, comparisons, mean, median

Value = float | int | str | None


@dataclass(frozen=True)
class Column:
    """One thing that is told of every method.

    Attributes:
        key: its name in the CSV file, with the unit.
        title: its heading elsewhere.
        note: what it means.
        value: the number, as the CSV file has it and as tables are sorted by it.
        show: how it is printed.
    """

    key: str
    title: str
    note: str
    value: Callable[[Summary], Value]
    show: Callable[[Summary], str]


def _column(
    key: str, title: str, show: Callable[[float | None], str], value: Callable[[Summary], float | None], note: str
) -> Column:
    return Column(key, title, note, value, lambda own: show(value(own)))


def _score(own: Summary) -> str:
    return "failed" if own.score is None else words.spread(own.score, own.unit)


def _gap(own: Summary) -> str:
    if own.gap_interval is None:
        return words.points(own.gap)
    return f"{words.points(own.gap)} [{words.points(own.gap_interval[0])}, {words.points(own.gap_interval[1])}]"


def _others(own: Summary) -> str:
    """The metrics beside the score, on the scale that they have: f1 0.845."""
    others = ((name, spread.mean) for name, spread in own.scores.items() if name != own.task["metric"])
    return ", ".join(f"{name} {value:.3f}" for name, value in others)


def _runs(own: Summary) -> str:
    done, failed = len(own.by_seed), len(own.failures)
    return f"{done} of {done + failed}" if failed else str(done)


COLUMNS = (
    Column(
        "method", "method", "What was trained; its settings are in the CSV file.", lambda s: s.label, lambda s: s.label
    ),
    Column(
        "score", "score", "The task's metric on the test split, mean over the seeds ± their standard deviation; in "
        "percent where higher is better.", lambda s: mean(s.score), _score,
    ),
    Column(
        "gap_points", "gap", "Score minus full fine-tuning's, in the score's points, and in brackets its 95 % interval "
        "(bootstrap over the seeds): one that holds 0 shows no difference.", lambda s: s.gap, _gap,
    ),
    _column(
        "retention", "retained", words.percent, lambda s: s.retention,
        "Score over full fine-tuning's, both counted from zero, not from the untrained model's; inverted where "
        "lower is better.",
    ),
    Column(
        "scores", "other metrics", "On the test split as well, mean over the seeds.", lambda s: _others(s) or None,
        lambda s: _others(s) or words.NOTHING,
    ),
    _column("trainable", "trainable", words.count, lambda s: s.trainable, "Trained parameters, the head's too."),
    _column("share", "share", words.share, lambda s: s.share, "Trainable parameters over all of the model's."),
    _column(
        "reduction", "fewer", lambda n: words.NOTHING if n is None else f"{words.count(n)}×", lambda s: s.reduction,
        "How many parameters full fine-tuning trains for each one that this method trains.",
    ),
    Column(
        "loss", "test loss", "Mean loss on the test split.", lambda s: mean(s.loss),
        lambda s: words.spread(s.loss),
    ),
    _column(
        "step_seconds", "step", words.duration, lambda s: s.step_seconds,
        "Seconds of a training step, median. Machines drift from line to line; the two ratios beside it do not.",
    ),
    _column(
        "step_over_full", "vs full", words.times, lambda s: median(s.against_full),
        "A step's seconds over full fine-tuning's, median over rounds in which both ran.",
    ),
    _column(
        "speed_up_over_peft", "vs PEFT", words.times, lambda s: median(s.speed_up),
        "Plain PEFT's seconds for a step over this method's: above 1 is faster.",
    ),
    _column("training_seconds", "training", words.duration, lambda s: s.training_seconds, "The whole training."),
    _column(
        "samples_per_second", "samples/s", words.count, lambda s: s.samples_per_second, "Training samples in a second."
    ),
    _column("peak_bytes", "peak memory", words.size, lambda s: s.peak, "The most memory that a training step holds."),
    _column("kept_bytes", "kept", words.size, lambda s: s.kept, "Memory of what forward keeps for backward."),
    _column("adapter_file_bytes", "file", words.size, lambda s: s.adapter_file, "What is saved of the training."),
    _column(
        "latency_seconds", "latency", words.duration, lambda s: s.latency,
        "Seconds of a forward pass as trained; comparable with the merged one beside it, not from line to line.",
    ),
    _column(
        "merged_latency_seconds", "merged", words.duration, lambda s: s.merged_latency,
        "The same after the adapter is merged into the weights, where it can be.",
    ),
    _column(
        "forgetting", "forgetting", words.times, lambda s: s.forgetting,
        "Perplexity on other text after the training over that before: above 1 the model forgot.",
    ),
    Column(
        "runs", "runs", "Runs that ended, one a seed; of how many if some failed. Plain PEFT runs with the first seed "
        "alone.", lambda s: len(s.by_seed), _runs,
    ),
)  # fmt: skip
NARROW = ("method", "score", "retention", "trainable", "step_over_full", "speed_up_over_peft", "peak_bytes")


def shown(every: Sequence[Summary], columns: Iterable[Column] = COLUMNS) -> list[Column]:
    """The columns in which at least one of ``every`` has something; the method, the score and the runs always."""
    always = ("method", "score", "runs")
    return [column for column in columns if column.key in always or any(column.value(own) is not None for own in every)]


def failures(every: Iterable[Summary]) -> list[str]:
    """A line for each method that has runs without a result, with the reasons."""
    return [f"{own.label}: {words.failures(own)}" for own in every if own.failures]


def terminal_table(every: Sequence[Summary]) -> RenderableType:
    """A narrow table for each task and model, at most 100 columns wide, with what failed under it."""
    parts: list[RenderableType] = []
    groups = comparisons(every)
    for group, scope in zip(groups, words.scopes(groups), strict=True):
        columns = shown(group, (column for column in COLUMNS if column.key in NARROW))
        table = Table(box=SIMPLE_HEAD, title=f"{scope} · {words.metric(group[0])}", padding=(0, 1, 0, 0))
        for column in columns:
            named = column.key == "method"
            table.add_column(column.title, justify="left" if named else "right", no_wrap=named)
        for own in group:
            table.add_row(*(Text(_narrow(column, own)) for column in columns))
        parts += [table, *(Text(line) for line in failures(group))]
    return Group(*parts)


def _narrow(column: Column, own: Summary) -> str:
    """A fused method's line in plain PEFT stands right below its own and need not repeat the name."""
    return f"  {IN_PLAIN}" if column.key == "method" and own.label.endswith(IN_PLAIN) else column.show(own)


def write_markdown(path: Path, every: Sequence[Summary]) -> None:
    """A section for each task and model: the table, what failed, what each column means."""
    from tabulate import tabulate

    parts, groups = [], comparisons(every)
    for group, scope in zip(groups, words.scopes(groups), strict=True):
        columns = shown(group)
        cells = [[_markdown(column.show(own)) for column in columns] for own in group]
        align = ["left" if column.key == "method" else "right" for column in columns]
        titles = [column.title for column in columns]
        parts += [
            f"## {scope}",
            f"Score: {words.metric(group[0])}.",
            tabulate(cells, titles, tablefmt="pipe", colalign=align, disable_numparse=True),
            *(f"- failed: {_markdown(line)}" for line in failures(group)),
            "\n".join(f"- **{column.title}**: {column.note}" for column in columns),
        ]
    path.write_text("\n\n".join(parts) + "\n")


def write_latex(path: Path, every: Sequence[Summary]) -> None:
    """A ``tabular`` for each task and model (package booktabs), what failed under it; read by ``\\input``."""
    from tabulate import tabulate

    parts, groups = [], comparisons(every)
    for group, scope in zip(groups, words.scopes(groups), strict=True):
        columns = shown(group)
        cells = [[column.show(own) for column in columns] for own in group]
        align = ["left" if column.key == "method" else "right" for column in columns]
        titles = [column.title for column in columns]
        parts += [
            f"\\paragraph{{{_latex(f'{scope}, {words.metric(group[0])}')}}}",
            tabulate(cells, titles, tablefmt="latex_booktabs", colalign=align, disable_numparse=True),
            *(f"Failed: {_latex(line)}" for line in failures(group)),
        ]
    path.write_text("\n\n".join(parts) + "\n")


def write_csv(path: Path, every: Sequence[Summary]) -> None:
    """A line for each summary: what it is of, then the numbers of :data:`COLUMNS`, not rounded."""
    about: dict[str, Callable[[Summary], Value]] = {
        "task": lambda own: own.task["name"],
        "metric": lambda own: own.task["metric"],
        "model": lambda own: own.model["name"],
        "machine": lambda own: own.machine,
        "threads": lambda own: own.threads,
        "name": lambda own: own.method,
        "engine": lambda own: own.engine,
        "settings": lambda own: _pairs(own.settings),
        "training": lambda own: _pairs(own.training),
    }
    numbers = {column.key: column.value for column in COLUMNS}
    further: dict[str, Callable[[Summary], Value]] = {
        "score_deviation": lambda own: None if own.score is None else own.score.deviation,
        "gap_low": lambda own: own.gap_interval and own.gap_interval[0],
        "gap_high": lambda own: own.gap_interval and own.gap_interval[1],
        "failures": lambda own: words.failures(own) or None,
    }
    fields = {**about, **numbers, **further}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows([read(own) for read in fields.values()] for own in every)


def _pairs(settings: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}={value}" for name, value in settings.items())


def _latex(text: str) -> str:
    from tabulate import LATEX_ESCAPE_RULES

    return text.translate(str.maketrans(LATEX_ESCAPE_RULES))


def _markdown(text: str) -> str:
    for letter in "\\|*_<>[]`":
        text = text.replace(letter, f"\\{letter}")
    return text

"""Rows as pictures, each as wide as a page: times over the frozen base's, of all cases of a method or of a few."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpeft.experiments.models import METHODS

from .contestants import BASE, CONTESTANTS, FASTPEFT, PEFT, PEFT_AUTOCAST
from .rows import Row
from .summary import LABELS, Comparison, chosen, layer
from .table import multiple, origin

_COLORS = {"peft": "#d1495b", "peft-autocast": "#edae49", "peft-compiled": "#8d6a9f", "fastpeft": "#00798c"}
_COLORS["fastpeft-compiled"] = "#66b3a6"
_TICKS = (0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50)
_FEW_TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)  # of an axis that spans more than _WIDE
_WIDE = 20
_WIDTH, _HIGHEST, _DPI = 9.0, 12.0, 100  # inches and dots per inch: a picture is shown as large as it was drawn
_INCHES_PER_LINE = 0.23
_INCHES_PER_COMPARISON = 0.5
_BARS = (PEFT, PEFT_AUTOCAST, FASTPEFT)


def pictures(rows: Sequence[Row], path: Path) -> dict[str, Path]:
    """Where :func:`draw` puts the picture of each method: beside ``path``, the file of the rows."""
    methods = dict.fromkeys(row.case["method"] for row in _with_ratio(rows))
    return {method: path.with_name(f"{path.stem}-{method}.png") for method in methods}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG for each method: a panel for each dtype and dropout, a line for each shape and phase.

    Only what has a ratio is drawn, so nothing whose parity fails.
    """
    for method, picture in pictures(rows, path).items():
        _draw_method([row for row in _with_ratio(rows) if row.case["method"] == method], picture)


def _with_ratio(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.contestant != BASE.name and row.against is not None]


def _draw_method(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row.case["dtype"] for row in rows))
    dropouts = sorted({row.case["dropout"] for row in rows})
    labels = {dtype: list(dict.fromkeys(_label(row) for row in rows if row.case["dtype"] == dtype)) for dtype in dtypes}
    heights = [max(len(labels[dtype]), 3) for dtype in dtypes]
    height = 1.2 + _INCHES_PER_LINE * sum(heights) + 0.6 * len(dtypes)
    figure = Figure(figsize=(_WIDTH, min(height, _HIGHEST)), layout="constrained")
    panels = figure.subplots(
        len(dtypes), len(dropouts), squeeze=False, sharex="row", sharey="row", height_ratios=heights
    )
    contestants = [contestant for contestant in CONTESTANTS if any(row.contestant == contestant.name for row in rows)]
    for dtype, line_of_panels in zip(dtypes, panels, strict=True):
        for dropout, axes in zip(dropouts, line_of_panels, strict=True):
            for i, contestant in enumerate(contestants):
                own = [
                    row
                    for row in rows
                    if (row.contestant, row.case["dtype"], row.case["dropout"]) == (contestant.name, dtype, dropout)
                ]
                ratios = [row.against[BASE.name] for row in own if row.against is not None]
                shift = (i - (len(contestants) - 1) / 2) * 0.18
                axes.errorbar(
                    [ratio["median"] for ratio in ratios],
                    [labels[dtype].index(_label(row)) + shift for row in own],
                    xerr=[
                        [ratio["median"] - ratio["q1"] for ratio in ratios],
                        [ratio["q3"] - ratio["median"] for ratio in ratios],
                    ],
                    fmt="D" if contestant is FASTPEFT else "o",
                    markersize=5 if contestant is FASTPEFT else 4,
                    color=_COLORS[contestant.name],
                    label=contestant.label,
                    elinewidth=1.2,
                )
            dropped = f"dropout {dropout:g}" if dropout else "no dropout"
            axes.set_title(f"{METHODS[rows[0].case['method']]}, {dtype}, {dropped}", loc="left", fontsize=10)
            _set_lines(axes, labels[dtype])
            _set_multiples(axes)
    _explain(
        figure,
        "Wall time as a multiple of the frozen base alone (the line at 1×): less is better",
        panels[0][0].get_legend_handles_labels(),
    )
    figure.supxlabel(textwrap.fill(origin(rows), 150), fontsize=7, color="gray")
    _save(figure, path)


def draw_summary(machines: Sequence[Sequence[Row]], path: Path) -> None:
    """Writes a PNG: a panel for the rows of each machine, three bars for each of the few cases that README shows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 1.2 + _INCHES_PER_COMPARISON * len(LABELS)), layout="constrained")
    panels = figure.subplots(1, len(machines), squeeze=False, sharex=True, sharey=True)[0]
    for axes, rows in zip(panels, machines, strict=True):
        _draw_bars(axes, chosen(rows))
        axes.set_title(f"{rows[-1].where}\nlayer {layer(rows)}", loc="left", fontsize=9)
        _set_lines(axes, LABELS)
        axes.set_xscale("log")
    panels[0].set_xlim(right=panels[0].get_xlim()[1] * 1.5)  # room for the number beside the longest bar
    for axes in panels:
        _set_multiples(axes)
    _explain(
        figure,
        "A training step as a multiple of the frozen base's alone (the line at 1×): less is better",
        panels[0].get_legend_handles_labels(),
    )
    _save(figure, path)


def _draw_bars(axes: Any, comparisons: Mapping[str, Comparison]) -> None:
    """From 1, the frozen base alone, to each contestant's multiple of it."""
    for i, contestant in enumerate(_BARS):
        lines, multiples = [], []
        for line, label in enumerate(LABELS):
            value = comparisons[label].over_base(contestant) if label in comparisons else None
            if value is not None:
                lines.append(line + (i - 1) * 0.27)
                multiples.append(value)
        bars = axes.barh(
            lines,
            [value - 1 for value in multiples],
            left=1,
            height=0.25,
            color=_COLORS[contestant.name],
            label=contestant.label,
        )
        axes.bar_label(bars, [multiple(value) for value in multiples], padding=2, fontsize=7.5)
    for line, label in enumerate(LABELS):
        if label not in comparisons:
            axes.text(1.05, line, "not measured", color="gray", fontsize=8, verticalalignment="center")


def _set_lines(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", labelsize=8.5)
    for edge in range(1, len(labels)):
        axes.axhline(edge - 0.5, color="black", alpha=0.08, linewidth=0.8)


def _set_multiples(axes: Any) -> None:
    from matplotlib import ticker

    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.FixedLocator(_FEW_TICKS if high > _WIDE * low else _TICKS))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g×"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(axis="x", labelbottom=True, labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _explain(figure: Any, title: str, legend: tuple[Sequence[Any], Sequence[str]]) -> None:
    figure.legend(
        *legend, loc="outside upper center", ncols=len(legend[1]), frameon=False, title=title, title_fontsize=10.5
    )


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def _label(row: Row) -> str:
    return f"{row.case['shape']}  {row.phase}"

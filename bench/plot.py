"""Rows as a picture: each contestant's time over the frozen base's, median and quartiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastpeft.experiments.models import METHODS

from .contestants import BASE, CONTESTANTS, FASTPEFT
from .rows import Row
from .table import origin

_COLORS = {"peft": "#d1495b", "peft-autocast": "#edae49", "peft-compiled": "#8d6a9f", "fastpeft": "#00798c"}
_TICKS = (0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
_INCHES_PER_LINE = 0.34


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG to ``path``: a panel for each method, dtype and dropout, a line for each shape and phase.

    Only what has a ratio is drawn, so nothing whose parity fails.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.contestant != BASE.name and row.against is not None]
    if not drawn:
        raise ValueError("rows hold no ratio to draw")
    groups = list(dict.fromkeys(_group(row) for row in drawn))
    dropouts = sorted({row.case["dropout"] for row in drawn})
    labels = {group: list(dict.fromkeys(_label(row) for row in drawn if _group(row) == group)) for group in groups}
    heights = [max(len(labels[group]), 3) for group in groups]
    figure = Figure(figsize=(4 + 4.5 * len(dropouts), 2.2 + _INCHES_PER_LINE * sum(heights) + 0.8 * len(groups)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(
        len(groups), len(dropouts), squeeze=False, sharex="row", sharey="row", height_ratios=heights
    )
    contestants = [contestant for contestant in CONTESTANTS if any(row.contestant == contestant.name for row in drawn)]
    for group, line_of_panels in zip(groups, panels, strict=True):
        for dropout, axes in zip(dropouts, line_of_panels, strict=True):
            axes.axvline(1.0, color="black", linewidth=1)
            for i, contestant in enumerate(contestants):
                own = [
                    row
                    for row in drawn
                    if (row.contestant, _group(row), row.case["dropout"]) == (contestant.name, group, dropout)
                ]
                ratios = [row.against[BASE.name] for row in own if row.against is not None]
                median = [ratio["median"] for ratio in ratios]
                shift = (i - (len(contestants) - 1) / 2) * 0.16
                axes.errorbar(
                    median,
                    [labels[group].index(_label(row)) + shift for row in own],
                    xerr=[
                        [ratio["median"] - ratio["q1"] for ratio in ratios],
                        [ratio["q3"] - ratio["median"] for ratio in ratios],
                    ],
                    fmt="D" if contestant is FASTPEFT else "o",
                    markersize=6 if contestant is FASTPEFT else 5,
                    color=_COLORS[contestant.name],
                    label=contestant.label,
                    elinewidth=1.5,
                )
            axes.set_xscale("log")
            axes.set_title(f"{group}, {f'dropout {dropout:g}' if dropout else 'no dropout'}", loc="left", fontsize=11)
            axes.set_yticks(range(len(labels[group])), labels[group])
            axes.set_ylim(len(labels[group]) - 0.5, -0.5)
            axes.xaxis.set_major_locator(ticker.FixedLocator(_TICKS))
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g×"))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.tick_params(axis="x", labelbottom=True, labelsize=9)
            axes.grid(axis="x", alpha=0.3)
            for edge in range(1, len(labels[group])):
                axes.axhline(edge - 0.5, color="black", alpha=0.08, linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(contestants),
        frameon=False,
        title="An adapter beside its frozen base: wall time, 1× is the base alone, less is better",
        title_fontsize=13,
    )
    figure.supxlabel(origin(rows), fontsize=7, color="gray")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _group(row: Row) -> str:
    return f"{METHODS[row.case['method']]}, {row.case['dtype']}"


def _label(row: Row) -> str:
    return f"{row.case['shape']}  {row.phase}"

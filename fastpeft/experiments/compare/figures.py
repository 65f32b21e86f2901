"""Each picture, of summaries of one task, model and machine: a figure, or None where nothing belongs on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import TYPE_CHECKING

from . import words
from .rows import FULL, PLAIN, UNTRAINED
from .style import FAMILIES, MARKERS, Style, family, label_points, new_figure
from .summary import Point, Summary, median, usual, without_plain, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINE = 0.21  # inches of a method's line
_LABEL = 0.28  # inches of a plot's height that each labelled point needs
_ENOUGH = 0.9  # of full fine-tuning's score
_ASIDE = 0.04  # between points of different lines at one place, where neighbours are 1 apart
_SMALL = 7.5  # points, of the numbers at bars
_DECADES = 30  # an axis is logarithmic where the largest number is this many times the least


def _shown(group: Sequence[Summary], *needed: str) -> list[Summary]:
    """Each method once, in its usual variant: those that have all that is ``needed``."""
    return [
        own for own in usual(without_plain(group)) if all(getattr(own, name) is not None for name in ("score", *needed))
    ]


def _score(own: Summary) -> float:
    assert own.score is not None
    return own.score.mean / own.unit


def _deviation(own: Summary) -> float:
    assert own.score is not None
    return (own.score.deviation or 0.0) / own.unit


def _legend(figure: Figure, methods: Iterable[Summary], style: Style) -> None:
    from matplotlib.lines import Line2D

    used = {family(own) for own in methods}
    handles = [
        Line2D([], [], linestyle="", marker=MARKERS[name], color=style.families[i], label=name)
        for i, name in enumerate(FAMILIES)
        if name in used
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.2, columnspacing=1.2)


def _scatter(
    methods: Sequence[Summary],
    style: Style,
    x: Callable[[Summary], float],
    xlabel: str,
    area: Callable[[Summary], float] = lambda own: 42.0,
) -> Figure:
    """The score against ``x``; ``area`` is a point's size."""
    from matplotlib.ticker import EngFormatter

    figure = new_figure(max(5.4, _LABEL * len(methods)))
    axes = figure.subplots()
    if max(map(x, methods)) > _DECADES * min(map(x, methods)):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for own in methods:
        axes.errorbar(x(own), _score(own), _deviation(own) or None, color=style.color(own), elinewidth=1, capsize=2)
        axes.scatter(
            x(own), _score(own), s=area(own), c=style.color(own), marker=MARKERS[family(own)], edgecolors=style.paper,
            linewidths=0.6, zorder=3,
        )  # fmt: skip
    axes.set(xlabel=xlabel, ylabel=words.metric(methods[0]))
    axes.margins(x=0.14, y=0.12)
    axes.grid()
    _legend(figure, methods, style)
    places, heights = [(x(own), _score(own)) for own in methods], [_deviation(own) for own in methods]
    label_points(axes, style, places, heights, [own.label for own in methods])
    return figure


def score_by_parameters(group: Sequence[Summary], style: Style) -> Figure | None:
    methods = [own for own in _shown(group, "trainable") if own.method != UNTRAINED and own.trainable]
    if not methods:
        return None
    return _scatter(methods, style, lambda own: float(own.trainable or 0), "trainable parameters")


def score_by_time(group: Sequence[Summary], style: Style) -> Figure | None:
    methods = [own for own in _shown(group, "training_seconds", "share") if own.training_seconds and own.share]
    if not methods:
        return None

    def area(own: Summary) -> float:
        """Grows with the logarithm of the share: the shares span five powers of ten."""
        return max(30.0, 180.0 + 45.0 * log10(own.share or 1.0))

    return _scatter(methods, style, lambda own: own.training_seconds or 0.0, "seconds of training", area)


def curves(group: Sequence[Summary], style: Style) -> Figure | None:
    methods = [own for own in usual(without_plain(group)) if len(own.curve) > 1]
    families = [name for name in FAMILIES if any(family(own) == name for own in methods)]
    if not methods:
        return None
    figure = new_figure(0.4 + 1.6 * len(families))
    panels = figure.subplots(len(families), 2, squeeze=False, sharex=True, sharey="col")
    reads: tuple[Callable[[Point], float | None], ...] = (lambda p: p.train_loss, lambda p: p.valid_loss)
    for name, line in zip(families, panels, strict=True):
        members = [own for own in methods if family(own) == name]
        for i, own in enumerate(members):
            look = {"color": style.lines[i % len(style.lines)], "linestyle": ("-", "--", ":")[i % 3], "linewidth": 1.6}
            for axes, read in zip(line, reads, strict=True):
                points = [(point.step, value) for point in own.curve if (value := read(point)) is not None]
                axes.plot([step for step, _ in points], [value for _, value in points], label=own.label, **look)
        line[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        line[0].set_ylabel("training loss")
        line[1].set_ylabel("validation loss")
        line[0].set_title(name, loc="left", fontweight="bold")
        for axes in line:
            axes.grid()
            axes.set_xmargin(0)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    return figure


@dataclass(frozen=True)
class _Bars:
    """A panel of bars, a line for each method: what is measured, and how it is written at the end of a bar."""

    title: str
    value: Callable[[Summary], float | None]
    show: Callable[[float], str]
    mark: float | None = None


def _bars(methods: Sequence[Summary], style: Style, panels: Sequence[_Bars]) -> Figure | None:
    """The first of ``methods`` at the top; a bar that a method has no number for is left out."""
    if not methods:
        return None
    figure = new_figure(0.9 + _LINE * max(len(methods), 3))
    lines = range(len(methods))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        values = [panel.value(own) for own in methods]
        bars = axes.barh(lines, [value or 0.0 for value in values], 0.72, color=[style.color(own) for own in methods])
        shown = ["" if value is None else panel.show(value) for value in values]
        patch = {"facecolor": style.paper, "edgecolor": "none", "pad": 0.5}  # over the mark
        axes.bar_label(bars, shown, padding=3, fontsize=_SMALL, color=style.ink, bbox=patch)
        if panel.mark is not None:
            axes.axvline(panel.mark, color=style.ink, linewidth=1, linestyle="--", zorder=0.9)  # behind the bars
        axes.set_title(panel.title, loc="left")
        axes.set_yticks(lines, [own.label for own in methods])
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.margins(x=0.3)
        axes.grid(axis="x")
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
    return figure


def time_and_memory(group: Sequence[Summary], style: Style) -> Figure | None:
    """A step's time beside full fine-tuning's, which took turns with it, where that is known: machines drift."""
    methods = _shown(group, "step_seconds")
    time = _Bars("milliseconds of a step", lambda own: own.step_seconds and own.step_seconds * 1e3, "{:.3g}".format)
    if all(own.against_full is not None for own in methods):
        time = _Bars("a step, of full fine-tuning's", lambda own: median(own.against_full), "{:.2f}×".format)
    methods.sort(key=lambda own: time.value(own) or 0.0)
    panels = (
        time,
        _Bars("peak memory, MiB", lambda own: own.peak and own.peak / 2**20, "{:,.0f}".format),
        _Bars("kept for backward, MiB", lambda own: own.kept and own.kept / 2**20, "{:,.0f}".format),
    )
    return _bars(methods, style, panels)


def retention(group: Sequence[Summary], style: Style) -> Figure | None:
    methods = [own for own in _shown(group, "retention") if own.method != FULL]
    methods.sort(key=lambda own: -(own.retention or 0.0))
    panel = _Bars(
        "% of full fine-tuning's score", lambda own: 100 * (own.retention or 0), "{:.1f}".format, 100 * _ENOUGH
    )
    return _bars(methods, style, [panel])


def speed_up(group: Sequence[Summary], style: Style) -> Figure | None:
    methods = [own for own in usual(group) if own.engine != PLAIN and own.speed_up is not None]
    methods.sort(key=lambda own: -(median(own.speed_up) or 0.0))
    panel = _Bars("times as fast as plain PEFT", lambda own: median(own.speed_up), "{:.2f}×".format, 1.0)
    return _bars(methods, style, [panel])


def _saved_time(own: Summary) -> float | None:
    return None if own.against_full is None else 100 - 100 * own.against_full.median


def efficiency(group: Sequence[Summary], style: Style) -> Figure | None:
    methods = [own for own in _shown(group, "reduction", "retention") if own.method not in (FULL, UNTRAINED)]
    methods.sort(key=lambda own: -(own.retention or 0.0))
    panels = (
        _Bars("% of parameters not trained", lambda own: 100 - 100 / (own.reduction or 1.0), "{:.1f}".format),
        _Bars("% of the score kept", lambda own: 100 * (own.retention or 0.0), "{:.1f}".format),
        _Bars(
            "% of a step's time saved", _saved_time,
            "{:.0f}".format, 0.0,
        ),
    )  # fmt: skip
    return _bars(methods, style, panels)


def sizes(group: Sequence[Summary], style: Style) -> Figure | None:
    """The whole model twice, then what each method saves."""
    sized = [own for own in _shown(group, "model_4bit") if own.method in (UNTRAINED, FULL)]
    if not sized:
        return None
    half = 2 * sized[0].model["parameters"]
    saved = [own for own in _shown(group, "adapter_file") if own.method not in (FULL, UNTRAINED)]
    saved.sort(key=lambda own: -(own.adapter_file or 0.0))
    named = [("the model in 16 bits", half, style.ink), ("the model in 4 bits", sized[0].model_4bit, style.ink)]
    named += [(own.label, own.adapter_file, style.color(own)) for own in saved]
    figure = new_figure(0.9 + _LINE * len(named))
    axes = figure.subplots()
    bars = axes.barh(
        range(len(named)), [float(value or 0) for _, value, _ in named], 0.72, color=[c for *_, c in named]
    )
    axes.bar_label(bars, [words.size(value) for _, value, _ in named], padding=2, fontsize=_SMALL, color=style.ink)
    axes.set_xscale("log")
    axes.set_yticks(range(len(named)), [name for name, *_ in named])
    axes.set_ylim(len(named) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("bytes")
    return figure


def score_by_rank(group: Sequence[Summary], style: Style) -> Figure | None:
    lines = _lines(group, "rank", r"-(r\d+|half)$")
    if not lines:
        return None
    ranks = sorted({int(rank) for line in lines for rank in line})
    figure = _joined(lines, style, "rank", lambda rank, aside: int(rank) * 2**aside)
    axes = figure.axes[0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    return figure


def score_by_targets(group: Sequence[Summary], style: Style) -> Figure | None:
    lines = _lines(group, "targets", r"-(attention|default|qv)$")
    if not lines:
        return None
    targets = sorted({name for line in lines for name in line})
    figure = _joined(lines, style, "layers that are adapted", lambda name, aside: targets.index(name) + aside)
    figure.axes[0].set_xticks(range(len(targets)), targets)
    return figure


def _lines(group: Sequence[Summary], setting: str, suffix: str) -> list[dict[str, Summary]]:
    """What differs by ``setting`` alone, in one line by its values: runs of a grid, and methods named after it."""
    lines: dict[str, dict[str, Summary]] = {}
    for own in (own for own in without_plain(group) if own.settings.get(setting) is not None):
        method = re.sub(suffix, "", own.method)
        others = {name: value for name, value in own.settings.items() if name != setting}
        line = lines.setdefault(f"{method} {sorted(others.items())} {sorted(own.training.items())}", {})
        line.setdefault(words_of(own.settings[setting]), replace(own, method=method))
    return [line for line in lines.values() if len(line) > 1]


def _joined(
    lines: Sequence[dict[str, Summary]], style: Style, xlabel: str, place: Callable[[str, float], float]
) -> Figure:
    """A line each, a little beside the others so that none hides another's bars; ``place`` is where a value stands."""
    figure = new_figure(4.2)
    axes = figure.subplots()
    for i, line in enumerate(lines):
        aside = _ASIDE * (i - (len(lines) - 1) / 2)
        members = sorted(((place(value, aside), own) for value, own in line.items()), key=lambda member: member[0])
        axes.errorbar(
            [at for at, _ in members],
            [_score(own) for _, own in members],
            [_deviation(own) for _, own in members],
            color=style.lines[i % len(style.lines)], linestyle=("-", "--", ":")[i % 3], capsize=2,
            marker=MARKERS[family(members[0][1])], label=members[0][1].method,
        )  # fmt: skip
    axes.set(xlabel=xlabel, ylabel=words.metric(next(iter(lines[0].values()))))
    axes.grid()
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def sensitivity(group: Sequence[Summary], style: Style) -> Figure | None:
    """A line for each variant of the methods that have several, best first."""
    own = [one for one in without_plain(group) if one.score is not None]
    counts = Counter(one.method for one in own)
    methods = [method for method in counts if counts[method] > 1]
    if not methods:
        return None
    variants = [one for method in methods for one in sorted((o for o in own if o.method == method), key=_score)[::-1]]
    figure = new_figure(0.9 + _LINE * len(variants))
    axes = figure.subplots()
    for line, one in enumerate(variants):
        axes.errorbar(
            _score(one),
            line,
            xerr=_deviation(one) or None,
            color=style.color(one),
            marker=MARKERS[family(one)],
            capsize=2,
        )
    for line in range(1, len(variants)):
        if variants[line].method != variants[line - 1].method:
            axes.axhline(line - 0.5, color=style.pale, linewidth=1)
    axes.set_yticks(range(len(variants)), [one.label for one in variants])
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(words.metric(variants[0]))
    return figure

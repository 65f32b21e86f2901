"""README's small table of the comparison on record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import words
from .rows import PLAIN, UNTRAINED, Rows
from .summary import Summary, comparisons, median, summaries, usual, without_plain

SHOWN = (UNTRAINED, "full", "lora", "dora", "qlora", "houlsby", "bitfit", "loreft", "prefix")
_COLUMNS: dict[str, Callable[[Summary], str]] = {
    "retained": lambda own: words.percent(own.retention),
    "trainable": lambda own: words.count(own.trainable),
    "memory of a step": lambda own: words.size(own.peak),
    "file": lambda own: words.size(own.adapter_file),
}


def block(folder: Path) -> str:
    """Markdown: a line for each method of :data:`SHOWN` that is on record in ``folder``, and what it is of.

    Of several comparisons the first.
    """
    from tabulate import tabulate

    every = comparisons(usual(summaries(Rows(folder).rows)))
    if not every:
        return "No rows recorded yet."
    group = every[0]
    plain = {own.method: own for own in group if own.engine == PLAIN}
    own = {one.method: one for one in without_plain(group)}
    chosen = [own[name] for name in SHOWN if name in own]
    lines = [
        [
            one.label,
            words.spread(one.score, one.unit),
            *(show(one) for show in _COLUMNS.values()),
            _step(one, plain.get(one.method)),
        ]
        for one in chosen
    ]
    titles = [words.metric(group[0]), *_COLUMNS, "a step, of full fine-tuning's"]
    align = ["left", *("right" for _ in titles)]
    return "\n\n".join(
        [
            tabulate(lines, ["", *titles], tablefmt="pipe", colalign=align, disable_numparse=True),
            _origin(group),
        ]
    )


def _step(own: Summary, plain: Summary | None) -> str:
    against = words.times(median(own.against_full))
    if plain is None or plain is own:
        return against
    return f"**{against}**, PEFT {words.times(median(plain.against_full))}"


def _origin(group: Sequence[Summary]) -> str:
    first = next(own for own in group if own.method != UNTRAINED)
    counts, training = sorted({len(own.by_seed) for own in group if own.engine != PLAIN}), first.training
    seeds = " or ".join(map(str, counts))
    spread = "one seed, so that a point or two is noise" if counts == [1] else f"mean ± deviation over {seeds} seeds"
    return (
        f"{first.model['title']}, on {first.task['title']}; {training['steps']} steps of {training['batch_size']} "
        f"texts, {training['dtype']}, on {first.machine}; {spread}. Retained: of full fine-tuning's score. A step's "
        "time is a multiple of full fine-tuning's, with which it took turns; bold is fastpeft's."
    )

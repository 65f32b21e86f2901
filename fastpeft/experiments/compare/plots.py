"""Summaries as pictures, one idea each, light or dark, as PNG or SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from . import figures
from .style import DARK, LIGHT, Style, drawing
from .summary import Summary, comparisons

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 140
_COLORS = 256  # of a PNG


@dataclass(frozen=True)
class Picture:
    """One kind of picture.

    Attributes:
        name: of its file.
        title: what it shows, in words; ``{metric}`` and ``{Metric}`` stand for the task's.
        reading: how to read it, with the same words.
        figure: draws it for the summaries of one comparison; None where nothing of them belongs on it.
    """

    name: str
    title: str
    reading: str
    figure: Callable[[Sequence[Summary], Style], Figure | None]


def draw(every: Sequence[Summary], folder: Path, style: Style = LIGHT) -> list[Path]:
    """Writes a PNG of each picture that has something to show for each task and model.

    Returns:
        The files: ``<task>-<model>-<picture>.png``, with ``-dark`` before the suffix in that style; a number is added
        to the model's name where two comparisons would have the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, group in named_comparisons(every):
        for picture in PICTURES:
            if (content := render(picture, group, style)) is not None:
                paths.append(folder / file_name(name, picture, style))
                paths[-1].write_bytes(content)
    return paths


def file_name(comparison: str, picture: Picture, style: Style) -> str:
    return f"{comparison}-{picture.name}{'-dark' if style is DARK else ''}.png"


def named_comparisons(every: Iterable[Summary]) -> list[tuple[str, list[Summary]]]:
    """What can be compared with each other, with a name for files: task and model."""
    named: dict[str, list[Summary]] = {}
    for group in comparisons(every):
        own = group[0]
        name = re.sub(r"[^a-z0-9]+", "-", f"{own.task['name']}-{own.model['name']}".lower()).strip("-")
        number = next(number for number in count(1) if _numbered(name, number) not in named)
        named[_numbered(name, number)] = group
    return list(named.items())


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def render(picture: Picture, group: Sequence[Summary], style: Style = LIGHT, form: str = "png") -> bytes | None:
    """The picture of one comparison as a file of the form ``png`` or ``svg``; None where nothing belongs on it."""
    with drawing(style):
        figure = picture.figure([own for own in group if own.score is not None], style)
        if figure is None:
            return None
        file = BytesIO()
        figure.savefig(file, format=form, dpi=_DPI, metadata={"Date": None} if form == "svg" else None)
    return _with_palette(file) if form == "png" else file.getvalue()


def _with_palette(file: BytesIO) -> bytes:
    """The PNG with a palette in the place of full colours: a third of the bytes, the same to the eye."""
    from PIL import Image

    small = BytesIO()
    with Image.open(file) as image:
        few = image.convert("RGB").quantize(_COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(small, "png", optimize=True)
    return small.getvalue()


PICTURES = (
    Picture(
        "score-by-parameters",
        "{Metric} against trainable parameters",
        "Up is better, left is leaner: each step of the lower axis is ten times as many trained parameters. Bars "
        "span one standard deviation over the seeds; points whose bars overlap are hardly apart.",
        figures.score_by_parameters,
    ),
    Picture(
        "retention",
        "How much of full fine-tuning's {metric} each method keeps",
        "Longer is better; right of the dashed line at 90 % little is lost, above 100 % the method beats full fine-"
        "tuning.",
        figures.retention,
    ),
    Picture(
        "score-by-time",
        "{Metric} against training time",
        "Up is better, left is faster. The larger a point, the larger the share of the parameters that is trained.",
        figures.score_by_time,
    ),
    Picture(
        "time-and-memory",
        "What a training step costs",
        "Shorter is better in all three: the time of a step, the most memory that it holds, and the part of it that"
        " forward keeps for backward. The fastest method is at the top.",
        figures.time_and_memory,
    ),
    Picture(
        "efficiency",
        "What is saved, and what is kept",
        "Longer is better. Each beside full fine-tuning: parameters that are not trained, {metric} that is kept, "
        "and time of a step that is saved; left of zero a step takes longer.",
        figures.efficiency,
    ),
    Picture(
        "speed-up",
        "How much faster a step is than in plain PEFT",
        "The same method, run by fastpeft and by PEFT alone, in turns: right of the dashed line fastpeft is faster.",
        figures.speed_up,
    ),
    Picture(
        "curves",
        "Training and validation loss on the way",
        "Lower is better, and where a line goes flat a method has learnt what it will. A validation loss that rises"
        " again while the training loss falls is overfitting.",
        figures.curves,
    ),
    Picture(
        "score-by-rank",
        "{Metric} against the rank",
        "A line joins runs that differ by the rank alone (alpha is twice the rank where it is not set). Where it is "
        "flat, a smaller rank is enough.",
        figures.score_by_rank,
    ),
    Picture(
        "score-by-targets",
        "{Metric} against the layers that are adapted",
        "A line joins runs that differ by the adapted layers alone.",
        figures.score_by_targets,
    ),
    Picture(
        "sensitivity",
        "How much the settings matter",
        "Each line is one choice of settings, named where it differs from the method's usual one; the further the "
        "points of a method spread, the more its settings need care.",
        figures.sensitivity,
    ),
    Picture(
        "sizes",
        "What has to be stored",
        "Shorter is better; each step of the axis is ten times as many bytes. The model is stored once, in 16 or in"
        " 4 bits, what a method trained once for each task.",
        figures.sizes,
    ),
)

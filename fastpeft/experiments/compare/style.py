"""What the pictures share: colours that stay apart for colour-blind readers, families of methods, labels of points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.0  # inches
FONT = 9.5  # points
OTHERS = "others"
_FAMILIES = {
    "whole model or a part": ("none", "full", "head", "top"),
    "LoRA": ("lora", "rslora", "adalora"),
    "DoRA": ("dora",),
    "4-bit base": ("qlora", "qdora"),
    "vectors and biases": ("vera", "ia3", "bitfit", "ln"),
    "prompts": ("prefix", "prompt", "p"),
    "adapters": ("houlsby", "pfeiffer"),
}
FAMILIES = (*_FAMILIES, OTHERS)
MARKERS = dict(zip(FAMILIES, "*soD^vPX", strict=True))


@dataclass(frozen=True)
class Style:
    """Colours of one variant of the pictures; ``families`` has one for each of :data:`FAMILIES`."""

    name: str
    paper: str
    ink: str
    pale: str
    families: tuple[str, ...]

    def color(self, own: Summary) -> str:
        return self.families[FAMILIES.index(family(own))]

    @property
    def lines(self) -> tuple[str, ...]:
        """For lines that are told apart by colour alone."""
        return self.families[1:]


# Okabe and Ito's palette (Color Universal Design, 2008), lightened where the paper is dark.
LIGHT = Style(
    "light", "#ffffff", "#1f2328", "#d0d7de",
    ("#1f2328", "#0072b2", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#d55e00", "#5b2c83"),
)  # fmt: skip
DARK = Style(
    "dark", "#0d1117", "#e6edf3", "#3d444d",
    ("#e6edf3", "#4aa8e0", "#f0b63a", "#e09cc3", "#2fc79a", "#8fd3fb", "#f5813f", "#b08cff"),
)  # fmt: skip


def family(own: Summary) -> str:
    """Of methods: by the first word of the method's name."""
    word = own.method.split("-")[0]
    return next((name for name, members in _FAMILIES.items() if word in members), OTHERS)


@contextmanager
def drawing(style: Style) -> Iterator[None]:
    """Within it matplotlib's new figures have the style."""
    import matplotlib

    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), style.ink
    )
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), style.paper)
    settings: Any = {
        **ink,
        **paper,
        "font.size": FONT,
        "axes.titlesize": FONT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": style.pale,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": FONT - 1,
        "svg.hashsalt": "fastpeft",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def label_points(
    axes: Axes, style: Style, places: Sequence[tuple[float, float]], heights: Sequence[float], labels: Sequence[str]
) -> None:
    """Writes each label beside its point, so that none hides another or a point or its bar; a thin line leads there.

    Args:
        heights: of each point's bar, to either side.

    The axes must be drawn whole, their limits included: texts are placed by what is there.
    """
    from textalloc import allocate

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    x, y = ([place[i] for place in places] for i in range(2))
    allocate(
        axes, x, y, list(labels), x_scatter=x, y_scatter=y, x_lines=[[at, at] for at in x],
        y_lines=[[at - height, at + height] for at, height in zip(y, heights, strict=True)],
        textsize=FONT - 1.5, margin=0.006, min_distance=0.015, max_distance=0.6, nbr_candidates=1500,
        linecolor=style.ink, linewidth=0.5, textcolor=style.ink, avoid_label_lines_overlap=True,
    )  # fmt: skip

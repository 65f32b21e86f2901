"""A machine's page: the table and the pictures of its rows, beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import plot, table
from .rows import Row


def text(rows: Sequence[Row], path: Path) -> str:
    """The page in Markdown; ``path`` is the file of the rows."""
    names = {method: picture.name for method, picture in plot.pictures(rows, path).items()}
    return table.markdown(rows, names)


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes the page and draws its pictures."""
    path.with_suffix(".md").write_text(text(rows, path), encoding="utf-8")
    plot.draw(rows, path)

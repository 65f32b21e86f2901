"""The report of a comparison: tables, pictures and a page, written together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..output import write_together
from . import tables
from .literature import load_literature
from .page import render_page
from .plots import DARK, LIGHT, PICTURES, file_name, named_comparisons, render
from .summary import Row, summaries

PAGE = "page.html"


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Writes ``table.md``, ``table.csv``, ``table.tex``, the pictures of :mod:`.plots` as PNG, light and dark, and
    ``page.html``, which needs no other file. All are replaced together.

    Raises:
        ValueError: there are no rows.
    """
    every = summaries(rows)
    pictures = {
        file_name(name, picture, style): content
        for name, group in named_comparisons(every)
        for picture in PICTURES
        for style in (LIGHT, DARK)
        if (content := render(picture, group, style)) is not None
    }
    page = render_page(rows, every, pictures, load_literature())
    writers: dict[str, Callable[[Path], object]] = {
        "table.md": partial(tables.write_markdown, every=every),
        "table.csv": partial(tables.write_csv, every=every),
        "table.tex": partial(tables.write_latex, every=every),
        **{name: partial(Path.write_bytes, data=content) for name, content in pictures.items()},
        PAGE: lambda path: path.write_text(page, encoding="utf-8"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_together(folder, writers)

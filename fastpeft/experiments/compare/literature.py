"""What papers report of the methods that are compared here: their numbers, not this machine's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Reported:
    """One number of a paper.

    Attributes:
        method: the name that ``fastpeft compare`` has for it, or None.
        title: the paper's name for it.
        trained: trainable parameters as the paper states them, a share or a number.
    """

    method: str | None
    title: str
    trained: str | None
    score: float


@dataclass(frozen=True)
class Finding:
    """A part of one table of one paper: methods on one model and benchmark."""

    benchmark: str
    model: str
    metric: str
    paper: str
    table: str
    url: str
    results: tuple[Reported, ...]


def load_literature() -> tuple[Finding, ...]:
    """The findings of ``literature.json``, which names the table of the paper of each."""
    entries = json.loads((files(__package__) / "literature.json").read_text(encoding="utf-8"))
    return tuple(_finding(entry) for entry in entries)


def _finding(entry: Mapping[str, Any]) -> Finding:
    return Finding(**{**entry, "results": tuple(Reported(**result) for result in entry["results"])})

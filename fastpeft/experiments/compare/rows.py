"""One JSON line for each run, kept in a file that a stop at any moment leaves usable.

A job is known by its key, a fingerprint of all that was asked for: what is on record is not done again. It has a row
for each of its ``engines``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"
FULL, UNTRAINED = "full", "none"  # the methods that others are compared with
PLAIN = "peft"  # the engine; the rows of a fused method in plain PEFT have the method's name
Row = dict[str, Any]
"""docs/compare.md names its fields."""


def key_of(asked: Mapping[str, Any]) -> str:
    """The same for the same things asked for, on every machine."""
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Rows:
    """The rows of a folder: those of before, and those that are added."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there. What a stop left of a last run is cut off: it is done again.

        Raises:
            ValueError: a line that is no row, which is not the last.
        """
        self.path = folder / FILE
        self.rows: list[Row] = []
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                self.rows.append({"key": row["key"], "engines": row["engines"], **row})
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path}, line {number} is no row: {error!r}") from error
        whole = self._whole()
        if sum(map(len, lines[:whole])) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(sum(map(len, lines[:whole])))
        del self.rows[whole:]

    def _whole(self) -> int:
        """How many rows there are without those of a last run whose other engines' rows are missing."""
        if not self.rows:
            return 0
        key, engines = self.rows[-1]["key"], self.rows[-1]["engines"]
        last = [row for row in self.rows if row["key"] == key]
        return len(self.rows) - (0 if len(last) == len(engines) else len(last))

    def has(self, key: str) -> bool:
        """Whether a run is on record, also one that failed."""
        return any(row["key"] == key for row in self.rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Appends the rows of one run in one write, which is on the disk afterwards."""
        new = [without_nan(row) for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
        self.rows += new


def without_nan(value: Any) -> Any:
    """The value with None for numbers that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return value

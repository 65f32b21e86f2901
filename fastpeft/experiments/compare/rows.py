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
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

FILE = "rows.jsonl"
FULL, UNTRAINED = "full", "none"  # the methods that others are compared with
PLAIN = "peft"  # the engine; the rows of a fused method in plain PEFT have the method's name
Row = dict[str, Any]
"""docs/compare.md names its fields."""
FIELDS = (
    *("engine", "trainable", "total", "score", "scores", "valid_score", "loss", "best_step", "curve", "seconds"),
    *("samples_per_second", "against", "latency", "forgetting", "memory"),
)
"""Of a row: what the run alone decides."""
_ASKED = (
    *("key", "engines", "machine", "threads", "task", "texts", "model", "method", "title", "settings", "training"),
    *("seed", "measured", "failed", "preset"),
)


def key_of(asked: Mapping[str, Any]) -> str:
    """The same for the same things asked for, on every machine."""
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Rows:
    """The rows of a folder: those of before, and those that are added."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there, and changes nothing: what a stop left of a last run does not count, and is cut off when
        rows are added.

        Raises:
            ValueError: a line that is no row, which is not torn.
        """
        self.path = folder / FILE
        self.rows: list[Row] = []
        content = self.path.read_bytes() if self.path.exists() else b""
        self._size, ends, end = len(content), [0], 0
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    self.rows.append(_row(line))
            except ValueError as error:
                if number == len(lines) and not line.endswith(b"\n") and not isinstance(error, _NoRow):
                    break  # torn
                raise ValueError(f"{self.path}, line {number} is no row: {error}") from error
            end += len(line)
            if line.strip():
                ends.append(end)
        whole = self._whole()
        self._end = end if whole == len(self.rows) else ends[whole]
        del self.rows[whole:]

    def _whole(self) -> int:
        """How many rows there are without those of a last run whose other engines' rows are missing."""
        if not self.rows:
            return 0
        last = list(takewhile(lambda row: row["key"] == self.rows[-1]["key"], reversed(self.rows)))
        return len(self.rows) - len(last) % len(self.rows[-1]["engines"])

    def has(self, key: str) -> bool:
        """Whether a run is on record, also one that failed."""
        return any(row["key"] == key for row in self.rows)

    def failed(self, key: str) -> bool:
        """Whether the last that is on record of a run is that it failed."""
        return next((row["failed"] is not None for row in reversed(self.rows) if row["key"] == key), False)

    def add(self, rows: Iterable[Row]) -> None:
        """Appends the rows of one run in one write, which is on the disk afterwards."""
        new = [without_nan(row) for row in rows]
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in new).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() == self._size > self._end:  # nobody else has written meanwhile
                file.truncate(self._end)
            if self._last_byte(file) not in (b"", b"\n"):
                lines = b"\n" + lines
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
            self._size = self._end = file.tell()
        self.rows += new

    @staticmethod
    def _last_byte(file: IO[bytes]) -> bytes:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        return file.read(1)


class _NoRow(ValueError):
    """JSON that is something else."""


def _row(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError("it is no text in UTF-8") from error
    except ValueError as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(row, dict):
        raise _NoRow("it is no object with fields")
    if missing := [name for name in (*_ASKED, *FIELDS) if name not in row]:
        raise _NoRow(f"it lacks {', '.join(missing)}")
    return row


def without_nan(value: Any) -> Any:
    """The value with None for numbers that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return value

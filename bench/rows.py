"""Measurements as data: one JSON line each, with all that is needed to know what was measured, where and on what."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastpeft.experiments.models import METHODS

from .cases import DTYPES

Summary = dict[str, float]
"""``min``, ``q1``, ``median``, ``q3``."""


@dataclass(frozen=True)
class Row:
    """One contestant in one phase of one case.

    Attributes:
        run: start of the ``fastpeft bench`` that measured it, ISO 8601 in UTC; shared by its rows.
        date: when this row was measured.
        machine: ``name, played, cpu, cores, memory_gib, features, system``; of what ran on a GPU ``name, gpu, …``.
        versions: of python, torch, peft, transformers, fastpeft.
        commit: fastpeft's git commit; None outside of its repository.
        dirty: whether tracked files differed from it, results left out.
        threads: of torch.
        case: ``kind, shape, dtype, rank, dropout`` and what else describes it.
        phase: forward, step or generate.
        contestant: base, peft, peft-autocast, peft-compiled, fastpeft, fastpeft-compiled or base-float32.
        backend: what ran fastpeft's op (the CPU's with its instruction set); None for the others.
        rounds: samples behind each summary.
        seconds: wall seconds per call; None when the contestant could not run.
        cpu_seconds: processor seconds per call, summed over threads.
        against: ratios of wall seconds, round by round, to ``base``, to ``peft`` and, where it was measured, to
            ``base-float32``; None while parity fails.
        kept_bytes: what autograd keeps for the backward pass; None for ``generate``.
        parity: what ``parity.check`` found for the case.
        refused: why the contestant could not run.
    """

    run: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    threads: int
    case: dict[str, Any]
    phase: str
    contestant: str
    backend: str | None
    rounds: int
    seconds: Summary | None
    cpu_seconds: Summary | None
    against: dict[str, Summary] | None
    kept_bytes: int | None
    parity: dict[str, Any]
    refused: str | None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Raises ValueError where the line's fields are not exactly a row's."""
        values = json.loads(line)
        expected = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != expected:
            found = set(values) if isinstance(values, dict) else {type(values).__name__}
            raise ValueError(
                f"a row must have the fields of {cls.__name__}; "
                f"missing: {sorted(expected - found)}, unknown: {sorted(found - expected)}"
            )
        values["case"] = {"method": "lora", "device": "cpu"} | values["case"]  # what rows without these are of
        return cls(**values)

    @property
    def title(self) -> str:
        """Names the case in a sentence."""
        case = self.case
        return f"{METHODS[case['method']]} {case['shape']} {case['dtype']}, dropout {case['dropout']:g}"

    @property
    def where(self) -> str:
        """Names the GPU, or the processor and its cores."""
        played = self.machine.get("played")  # rows of before have none
        playing = f" playing {played}" if played else ""
        return self.machine.get("gpu") or f"{self.machine['cpu']}{playing}, {self.machine['cores']} cores"

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for the rows of the contestants that are compared with each other."""
        return (self.threads, json.dumps(self.case, sort_keys=True), self.phase)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for rows that measure the same thing, on whatever commit."""
        return (*self.place, self.contestant)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds ``rows`` to the JSON lines in ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)


def write(path: Path, row: dict[str, Any], table: str) -> None:
    """Adds a row of a device's kernels to the JSON lines in ``path`` and puts the table of its run beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    path.with_suffix(".md").write_text(table, encoding="utf-8")


def load(path: Path) -> list[Row]:
    """All rows of ``path``, oldest first. Raises ValueError naming the line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(Row.from_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def latest(rows: Sequence[Row]) -> list[Row]:
    """The newest of the rows that measure the same thing, with as many threads as the very last one; by method, dtype,
    dropout and size."""
    threads = rows[-1].threads if rows else 0
    newest = {row.identity: row for row in rows if row.threads == threads}
    return sorted(newest.values(), key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    case = row.case
    size = [case[name] for name in ("M", "K", "N")] if case["kind"] == "layer" else [case["tokens"], case["hidden"]]
    kinds = list(METHODS).index(case["method"]), list(DTYPES).index(case["dtype"])
    return (*kinds, case["dropout"], case["kind"], *size, case["rank"])

"""How good fastpeft means to be: bounds on its rows, and what was reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .cases import DTYPES, METHODS
from .contestants import FASTPEFT, PEFT
from .rows import Row

STATED_FOR = "a 2-core Xeon with AMX"
_LARGE = ("512×2048×2048", "2048×2048×2048", "512×4096×4096")


def times(rival: str) -> Callable[[Row, Row], float | None]:
    """Median ratio of wall seconds to ``rival``'s; None while parity fails."""
    return lambda row, peft: None if row.against is None else row.against[rival]["median"]


def kept_over_needed(row: Row, peft: Row) -> float | None:
    """Kept bytes over those of ``x`` as it came, ``u [M, r]`` in float32 and the seed."""
    case = row.case
    x, u, seed = case["M"] * case["K"] * DTYPES[case["dtype"]].itemsize, case["M"] * case["rank"] * 4, 8
    return None if row.kept_bytes is None else row.kept_bytes / (x + u + (seed if case["dropout"] else 0))


def kept_over_peft(row: Row, peft: Row) -> float | None:
    """Kept bytes over PEFT's."""
    return None if row.kept_bytes is None or not peft.kept_bytes else row.kept_bytes / peft.kept_bytes


@dataclass(frozen=True)
class Bound:
    """``measure(row, PEFT's row)`` is at most ``limit`` on each of fastpeft's rows that fit; None fits all."""

    text: str
    limit: float
    measure: Callable[[Row, Row], float | None]
    kind: str | None = None
    dtype: str | None = None
    phase: str | None = None
    dropout: bool | None = None
    shapes: Sequence[str] | None = None
    method: str | None = None

    def fits(self, row: Row) -> bool:
        return (
            row.contestant == FASTPEFT.name
            and row.case["rank"] == 16
            and self.method in (None, row.case["method"])
            and self.kind in (None, row.case["kind"])
            and self.dtype in (None, row.case["dtype"])
            and self.phase in (None, row.phase)
            and self.dropout in (None, row.case["dropout"] > 0)
            and (self.shapes is None or row.case["shape"] in self.shapes)
        )


def _of(method: str, *bounds: Bound) -> tuple[Bound, ...]:
    return tuple(replace(bound, method=method, text=f"{METHODS[method]} {bound.text}") for bound in bounds)


BOUNDS = (
    *_of(
        "lora",
        Bound("layer: forward over the base", 1.08, times("base"), "layer", "bf16", "forward", False, _LARGE),
        Bound("layer: step over the base", 1.12, times("base"), "layer", "bf16", "step", False, _LARGE),
        Bound("layer: step over the base", 1.18, times("base"), "layer", "bf16", "step", True, _LARGE),
        Bound("model: step over the base", 1.12, times("base"), "model", "bf16", "step", False),
        Bound("model: step over the base", 1.15, times("base"), "model", "bf16", "step", True),
        Bound("kept: x, u and the seed alone", 1.0, kept_over_needed, "layer", phase="step"),
        Bound("kept: share of PEFT's", 0.6, kept_over_peft, phase="step", dropout=True),
    ),
    *_of(
        "dora",
        Bound("layer: step over the base", 1.22, times("base"), "layer", "bf16", "step", False, _LARGE),
        Bound("layer: step over the base", 2.2, times("base"), "layer", "bf16", "step", True, _LARGE),
        Bound("model: step over the base", 1.25, times("base"), "model", "bf16", "step", False),
        Bound("model: step over the base", 2.0, times("base"), "model", "bf16", "step", True),
        Bound("kept: share of PEFT's", 0.4, kept_over_peft, dtype="bf16", phase="step"),
    ),
    Bound("not slower than PEFT", 1.0, times("peft"), dtype="fp32"),
    Bound("one token: not slower than PEFT", 1.0, times("peft"), phase="generate"),
)


@dataclass(frozen=True)
class Finding:
    """One bound on one row; ``where`` is empty and ``measured`` None when no row fits the bound."""

    bound: Bound
    where: str
    measured: float | None
    verdict: str

    @property
    def missed(self) -> bool:
        return self.verdict not in ("pass", "not measured")


def check(rows: Sequence[Row]) -> list[Finding]:
    """Every bound on every row that it is about; a row whose parity fails misses its bounds on time."""
    peft = {_place(row): row for row in rows if row.contestant == PEFT.name}
    findings = []
    for bound in BOUNDS:
        fitting = [row for row in rows if bound.fits(row)]
        if not fitting:
            findings.append(Finding(bound, "", None, "not measured"))
        for row in fitting:
            measured = bound.measure(row, peft[_place(row)])
            where = f"{row.title}, {row.phase}"
            if measured is None:
                findings.append(Finding(bound, where, None, "miss: parity fails"))
            else:
                findings.append(Finding(bound, where, measured, "pass" if measured <= bound.limit else "miss"))
    return findings


def _place(row: Row) -> tuple[object, ...]:
    return row.identity[:-1]

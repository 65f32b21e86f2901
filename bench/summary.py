"""The few cases that README shows of each machine, and how fastpeft compares with PEFT in any case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.experiments.models import METHODS

from .cases import DROPOUTS, RANK
from .contestants import BASE, FASTPEFT, PEFT, PEFT_AUTOCAST, PEFT_COMPILED, Contestant
from .rows import Row

_LAYERS = {"cpu": "512×4096×4096", "cuda": "4096×4096×4096"}  # of one size, with as many tokens as keep each busy
_SHOWN = {
    METHODS[method] + (", dropout" if dropout else "") + (", a small Llama" if kind == "model" else ""): {
        "method": method,
        "kind": kind,
        "dropout": dropout,
        "dtype": "bf16",
        "rank": RANK,
    }
    for kind, methods in (("layer", ("lora", "dora", "qlora")), ("model", ("lora",)))
    for method in methods
    for dropout in DROPOUTS
}
LABELS = tuple(_SHOWN)
"""Names of the cases that are shown, in the order of the table."""


@dataclass(frozen=True)
class Comparison:
    """One phase of one case: the row of each contestant that was measured, by its name."""

    rows: Mapping[str, Row]

    @property
    def ours(self) -> Row:
        return self.rows[FASTPEFT.name]

    def over_base(self, contestant: Contestant) -> float | None:
        """The contestant's time as a multiple of the frozen base's; None where there is none."""
        row = self.rows.get(contestant.name)
        return None if row is None or row.against is None else row.against[BASE.name]["median"]

    @property
    def speed_up(self) -> float | None:
        """PEFT's time, as PEFT comes, over fastpeft's; None while parity fails."""
        return None if self.ours.against is None else 1 / self.ours.against[PEFT.name]["median"]

    @property
    def speed_up_over_fastest(self) -> float | None:
        """The same with the fastest of PEFT as it comes, under autocast and compiled."""
        if self.ours.against is None:
            return None
        others = [ratio for peft in (PEFT, PEFT_AUTOCAST, PEFT_COMPILED) if (ratio := self.over_base(peft)) is not None]
        return min(others) / self.ours.against[BASE.name]["median"] if others else None

    @property
    def kept_share(self) -> float | None:
        """Bytes kept for the backward pass over those that PEFT keeps."""
        peft = self.rows.get(PEFT.name)
        return None if peft is None or not peft.kept_bytes else (self.ours.kept_bytes or 0) / peft.kept_bytes


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """The rows of one machine, those of one phase of one case together, where fastpeft is among them."""
    places: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        places.setdefault(row.place, {})[row.contestant] = row
    return [Comparison(place) for place in places.values() if FASTPEFT.name in place]


def chosen(rows: Sequence[Row]) -> dict[str, Comparison]:
    """The training steps of one machine that are shown, by the names in :data:`LABELS`; what has no rows is absent."""
    steps = [comparison for comparison in comparisons(rows) if comparison.ours.phase == "step"]
    return {label: step for label, wanted in _SHOWN.items() for step in steps if _fits(step.ours.case, wanted)}


def layer(rows: Sequence[Row]) -> str:
    """The shape of the layer that is shown of one machine."""
    return _LAYERS[rows[-1].case["device"]]


def _fits(case: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return case.items() >= wanted.items() and (case["kind"] == "model" or case["shape"] == _LAYERS[case["device"]])

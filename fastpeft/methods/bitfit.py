"""BitFit: biases alone are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .blocks import chosen_blocks
from .method import Method, Plan, as_tuple


@dataclass(frozen=True)
class BitFit(Method):
    """Trains biases and nothing else (Ben Zaken et al., "BitFit", 2021).

    Args:
        names: only biases with one of these in their dotted name, as a whole: ``("query", "intermediate.dense")``.
        layers: only biases in these blocks; when left out, also those outside of all blocks.

    Raises:
        TypeError, ValueError: a setting is of another kind, or out of its range.
    """

    names: tuple[str, ...] | None = None

    name: ClassVar[str] = "bitfit"
    no_merge: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        as_tuple(self, "names", str, "names")

    def plan(self, model: nn.Module) -> Plan:
        biases = [name for name, _ in model.named_parameters() if is_bias(name)]
        if not biases:
            raise ValueError(
                f"model (a {type(model).__name__}) has no biases for BitFit to train: no parameter is called bias or "
                "..._bias"
            )
        if self.layers is not None:
            blocks = tuple(f"{block.name}." for block in chosen_blocks(model, self.layers))
            biases = [name for name in biases if name.startswith(blocks)]
        if self.names is not None:
            idle = [name for name in self.names if not any(_has(bias, name) for bias in biases)]
            if idle:
                raise ValueError(f"names must each stand for a bias, but none has {idle[0]!r} in its name")
            biases = [bias for bias in biases if any(_has(bias, name) for name in self.names)]
        if not biases:
            raise ValueError(f"names and layers must leave a bias to train, got {self.names} and {self.layers}")
        return Plan(parameters=biases)


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def _has(bias: str, name: str) -> bool:
    return f".{name}." in f".{bias}."

"""Houlsby's and Pfeiffer's adapters: where the bottlenecks stand in a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .blocks import Block, Projection, chosen_blocks
from .bottleneck import ACTIVATIONS, Bottleneck
from .method import Addition, Method, Plan, check_size

CHILD = "adapter"


@dataclass(frozen=True)
class _Adapters(Method):
    bottleneck: int = 64
    activation: str = "gelu"

    no_merge: ClassVar[str | None] = (
        "a bottleneck is not linear: an activation stands between its two matrices, so no weight computes the same"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("bottleneck", self.bottleneck)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    def _places(self, block: Block) -> Iterator[Projection]:
        yield block.feed_forward_output()

    def plan(self, model: nn.Module) -> Plan:
        places = [place for block in chosen_blocks(model, self.layers) for place in self._places(block)]
        return Plan([Addition(place.name, place.module, CHILD, self._bottleneck(place)) for place in places])

    def _bottleneck(self, place: Projection) -> Bottleneck:
        return Bottleneck(place.width, self.bottleneck, self.activation, beside=place.module)


@dataclass(frozen=True)
class Houlsby(_Adapters):
    """Two bottlenecks a block, on the outputs of attention and of the feed-forward, before each is added to the
    residual stream (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019).

    Args:
        bottleneck: the width ``r`` that ``h [..., d]`` is projected down to.
        activation: ``gelu``, ``relu``, ``silu`` or ``tanh``.

    Raises:
        TypeError, ValueError: a setting is of another kind, or out of its range.
    """

    name: ClassVar[str] = "houlsby"

    def _places(self, block: Block) -> Iterator[Projection]:
        yield block.attention_output()
        yield from super()._places(block)


@dataclass(frozen=True)
class Pfeiffer(_Adapters):
    """One bottleneck a block, on the output of the feed-forward before it is added to the residual stream (Pfeiffer et
    al., "AdapterFusion", 2020). AdapterHub's reads the sum of the two; see ``docs/methods.md``.

    Args:
        bottleneck, activation: as for :class:`Houlsby`.

    Raises:
        TypeError, ValueError: a setting is of another kind, or out of its range.
    """

    activation: str = "relu"

    name: ClassVar[str] = "pfeiffer"

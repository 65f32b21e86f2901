"""LoReFT: a block's output is edited within a low-rank subspace, at some positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from .blocks import Block, chosen_blocks
from .method import Addition, Hooked, Method, Plan, check_size, place_beside, to_own_dtype
from .positions import Padding, parse

CHILD = "loreft"


@dataclass(frozen=True)
class LoReFT(Method):
    """``h + Rᵀ(W h + b − R h)`` on the outputs of blocks (Wu et al., "ReFT", 2024, arXiv 2404.03592).

    Args:
        rank: rows of ``R`` and ``W [r, d]``, at most the width ``d`` of the model.
        positions: the tokens that are edited, padding not counted: ``"f4+l4"`` the first and the last four, ``"f4"`` or
            ``"l4"`` those alone, ``"all"``. While text is generated with a cache, the new tokens are edited only with
            ``"all"``.

    Raises:
        TypeError, ValueError: a setting is of another kind, or out of its range.
    """

    rank: int = 4
    positions: str = "f4+l4"

    name: ClassVar[str] = "loreft"
    no_merge: ClassVar[str | None] = (
        "it edits a block's output after the residual sum, which no weight of the block makes alone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("rank", self.rank)
        parse(self.positions)

    def plan(self, model: nn.Module) -> Plan:
        blocks = chosen_blocks(model, self.layers)
        positions = parse(self.positions)
        paddings = {} if positions is None else {id(block.owner): Padding(positions) for block in blocks}
        edits = [Addition(block.name, block.module, CHILD, self._edit(block, paddings)) for block in blocks]
        hooks = []
        for owner in {id(block.owner): block.owner for block in blocks}.values():
            if (padding := paddings.get(id(owner))) is not None:
                hooks.append(partial(owner.register_forward_pre_hook, padding.begin, with_kwargs=True))
                hooks.append(partial(owner.register_forward_hook, padding.end, always_call=True))
        return Plan(edits, hooks)

    def _edit(self, block: Block, paddings: dict[int, Padding]) -> Edit:
        projection = block.attention_output()
        if self.rank > projection.width:
            raise ValueError(f"rank must be at most the width of {block.name}, {projection.width}, got {self.rank}")
        return Edit(projection.width, self.rank, paddings.get(id(block.owner)), beside=projection.module)


class Edit(Hooked):
    """``h + Rᵀ((W − R) h + b)`` for the chosen tokens of ``h [B, T, d]``, or for all of them.

    ``R`` has orthonormal rows: they are those of ``basis [r, d]`` after Gram-Schmidt, by a QR decomposition whose
    triangle has a positive diagonal, which makes it unique and smooth. (torch's parametrization for this cannot be
    pickled.) ``W`` starts as ``R`` and ``b`` as zero, so that a fresh edit changes nothing; the authors' code starts
    with a random ``W``.
    """

    def __init__(self, width: int, rank: int, padding: Padding | None, beside: nn.Module) -> None:
        super().__init__()
        self.padding = padding
        self.basis = nn.Parameter(torch.empty(rank, width))
        self.source = nn.Linear(width, rank)
        place_beside(self, beside)
        nn.init.orthogonal_(self.basis)
        with torch.no_grad():
            self.source.weight.copy_(self.rotation())
            self.source.bias.zero_()

    def rotation(self) -> Tensor:
        """``R [r, d]``, in the dtype of ``basis``."""
        basis = self.basis.to(torch.promote_types(self.basis.dtype, torch.float32))  # QR knows no 16-bit floats
        columns, triangle = torch.linalg.qr(basis.mT)
        return (columns * triangle.diagonal().sign()).mT.to(self.basis.dtype)

    def forward(self, h: Tensor) -> Tensor:
        if self.padding is None:
            return self._edited(h)
        chosen = self.padding.chosen(h)
        return h.index_put(chosen, self._edited(h[chosen]))

    def _edited(self, h: Tensor) -> Tensor:
        x = to_own_dtype(h, self.basis)
        R = self.rotation()
        change = nn.functional.linear(x, self.source.weight - R, self.source.bias)  # [..., r]
        return (x + change @ R).to(h.dtype)

    def extra_repr(self) -> str:
        return f"positions={'all' if self.padding is None else self.padding.positions}"

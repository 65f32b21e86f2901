"""Which tokens of each sequence a method works on, and how a hook deep in a model comes to know the padding."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_GRAMMAR = re.compile(r"f([1-9]\d*)|l([1-9]\d*)|f([1-9]\d*)\+l([1-9]\d*)")


@dataclass(frozen=True)
class Positions:
    """The ``first`` tokens of a sequence and its ``last`` ones, padding not counted."""

    first: int
    last: int

    def mask(self, attention_mask: Tensor) -> Tensor:
        """The chosen tokens of ``attention_mask [B, T]``, which is not 0 where a token is real: ``[B, T]``, boolean.

        Padding may stand on either side, or between. A token that is among the first and the last is one token.
        """
        real = attention_mask != 0
        rank = real.cumsum(1)  # 1 for the first real token
        return real & ((rank <= self.first) | (rank > rank[:, -1:] - self.last))


def parse(text: object) -> Positions | None:
    """``"f4+l4"``: the first and the last four tokens; ``"f4"`` or ``"l4"``: those alone; ``"all"``: None.

    Raises:
        ValueError: ``text`` is none of these.
    """
    if text == "all":
        return None
    found = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"positions must be like 'f4+l4', 'f4', 'l4', or 'all', got {text!r}")
    return Positions(int(found[1] or found[3] or 0), int(found[2] or found[4] or 0))


CACHE_NAMES = ("past_key_values", "cache")
"""What transformers calls the cached keys and values: up to 5.23, and since."""


class Padding:
    """Notes a model's attention mask at the start of each forward pass, for the hooks on its blocks.

    ``begin`` and ``end`` are hooks of that model. It has to be called with the mask ``[B, T]``; without one every token
    is real. In a pass that continues from cached keys and values no token is chosen: those that are generated are no
    part of the sequence that was given.
    """

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self._pass: _Pass | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs | inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        continued = cache is not None and cache.get_seq_length() > 0
        self._pass = _Pass(self.positions, given.get("attention_mask"), continued)

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pass = None

    def chosen(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of each chosen token of ``h [B, T, d]``: two ``[n]``, int64.

        Raises:
            RuntimeError: no pass is going on. ValueError: the mask is not that of ``h``.
        """
        if self._pass is None:
            raise RuntimeError(
                "a block was called outside of its model's forward pass, where its padding is not known. Checkpointing "
                "has to recompute the block's forward, as transformers 5.23 does, and not its hooks; or choose "
                "positions='all'"
            )
        return self._pass.chosen(h)


class _Pass:
    """One forward pass; all of its blocks work on the same tokens."""

    def __init__(self, positions: Positions, attention_mask: Any, continued: bool) -> None:
        self._positions, self._attention_mask, self._continued = positions, attention_mask, continued
        self._found: tuple[Tensor, Tensor] | None = None

    def chosen(self, h: Tensor) -> tuple[Tensor, Tensor]:
        if self._found is None:
            rows, columns = self._mask(h).nonzero(as_tuple=True)
            self._found = rows, columns
        return self._found

    def _mask(self, h: Tensor) -> Tensor:
        if self._continued:
            return torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
        mask = self._attention_mask
        if mask is None:
            mask = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        if not isinstance(mask, Tensor) or mask.shape != h.shape[:2]:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask must have shape [B, T] = {list(h.shape[:2])}, got {shape}")
        return self._positions.mask(mask.to(h.device))

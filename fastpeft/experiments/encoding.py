"""Texts with what is to be learnt of them, and the tensors that a model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of a position that is nobody's target: torch's cross-entropy leaves it out


@dataclass(frozen=True)
class Examples:
    """Texts, and for each its second text and its label where the task has these.

    ``labels`` are classes (int), numbers (float), or None for texts whose next tokens are to be learnt; ``blocks`` then
    is how many blocks of tokens are made of them at most.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[int] | list[float] | None = None
    blocks: int | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int]) -> Examples:
        """The examples at ``index``."""

        def chosen(values: Any) -> Any:
            return None if values is None else [values[i] for i in index]

        return Examples(chosen(self.texts), chosen(self.pairs), chosen(self.labels), self.blocks)


@dataclass(frozen=True)
class Encoded:
    """Texts as a model takes them, padded on the right.

    ``input_ids``, ``attention_mask`` and, for pairs of a tokenizer that tells the two apart, ``token_type_ids`` are
    int64 ``[n, length]``. ``labels`` are classes, int64 ``[n]``; numbers, float32 ``[n]``; or the tokens themselves,
    int64 ``[n, length]``, -100 where padding is.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_type_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Encoded:
        """The texts at ``index [m]``."""
        return self._each(lambda tensor: tensor[index])

    def trimmed(self) -> Encoded:
        """The same without the columns on the right in which every text is padding."""
        width = int(self.attention_mask.sum(1).max())
        return self._each(lambda tensor: tensor[:, :width] if tensor.dim() == 2 else tensor)

    def to(self, device: torch.device | str) -> Encoded:
        """The same on ``device``."""
        return self._each(lambda tensor: tensor.to(device))

    def inputs(self) -> dict[str, Tensor]:
        """What the model takes by keyword, the labels left out."""
        named = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return named if self.token_type_ids is None else named | {"token_type_ids": self.token_type_ids}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Encoded:
        types = None if self.token_type_ids is None else change(self.token_type_ids)
        return Encoded(change(self.input_ids), change(self.attention_mask), change(self.labels), types)


def encode(examples: Examples, tokenizer: Any, length: int) -> Encoded:
    """Every example as ``length`` tokens, cut or padded on the right.

    Texts without labels become as many blocks of ``length`` tokens as they fill, each text's last one padded; of more
    than ``examples.blocks``, so many remain, evenly spread. They need a fast tokenizer.
    """
    settings = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    settings |= {"padding_side": "right"}
    if examples.labels is None:
        tokens = tokenizer(examples.texts, return_overflowing_tokens=True, **settings)
        return _blocks(tokens["input_ids"], tokens["attention_mask"], examples.blocks)
    pairs = examples.pairs
    if pairs is not None and tokenizer.sep_token is None:
        pairs = ["\n" + text for text in pairs]  # a causal LM's tokenizer puts nothing between the two
    tokens = tokenizer(examples.texts, pairs, **settings)
    types = None if pairs is None else tokens.get("token_type_ids")
    dtype = torch.float32 if isinstance(examples.labels[0], float) else torch.int64
    return Encoded(tokens["input_ids"], tokens["attention_mask"], torch.tensor(examples.labels, dtype=dtype), types)


def _blocks(input_ids: Tensor, attention_mask: Tensor, most: int | None) -> Encoded:
    index = (attention_mask.sum(1) >= 2).nonzero().flatten()  # of a single token nothing is to be foretold
    if most is not None and most < len(index):
        index = index[torch.arange(most) * len(index) // most]
    input_ids, attention_mask = input_ids[index], attention_mask[index]
    return Encoded(input_ids, attention_mask, input_ids.masked_fill(attention_mask == 0, IGNORED))

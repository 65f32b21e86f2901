"""DoRA's norm, kept while W, A, B and s are unchanged: it does not depend on the tokens.

Gradient accumulation, activation checkpointing and evaluation ask for it again and again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import dispatch, extension, ops
from .backends.base import PARTS, Backend
from .call import Weight
from .four_bit import FourBit

_NUMBER = 8  # bytes of a number in a fingerprint


class NormCache:
    """The norm of the last ``W, A, B, s``.

    A tensor counts as unchanged while it has the same storage, place in it and version counter, and the same bytes:
    optimizers, ``merge`` and others also write through ``.data``, which no counter sees. Of ``W`` a call looks at as
    many of its parts as ``Backend.parts_watched`` allows for its tokens, at all of them in a long call or of a small
    ``W``, at others in each call, so that some calls together have seen it all. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None  # what is kept as one: threads may share a layer
        self._turn = 0

    def get(
        self,
        weight: Tensor | FourBit,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dtype: torch.dtype,
        backend: str | None,
        *,
        tokens: int = 1,
    ) -> Tensor:
        """``‖W + s B A‖`` of each row, of stacked experts too, see ``fastpeft::dora_norm``, for a call with so many
        tokens; not to be written to."""
        of_weight = Weight.of(weight)
        data, quant, blocksize = of_weight
        settings = scaling, dtype, backend
        watched = not (torch.compiler.is_compiling() or ops.is_transformed())
        watcher = _watcher(of_weight, A, B) if watched else None
        if watcher is None:
            return _norm(of_weight, A, B, settings)
        identity = extension.built().identity
        kept, key, weight_key = self._kept, (settings, identity([A, B])), (blocksize, identity([data, *quant]))
        small, large = _memory(of_weight, A, B)
        seen = None
        if kept is not None and kept.weight_key == weight_key:
            count = watcher.parts_watched(data, tokens)
            self._turn = first = (self._turn + count) % PARTS // count * count
            now = watcher.fingerprint(small, large, first, count)
            if _parts_are_those_of(kept.seen, now, first, count):
                if kept.key == key and now[:_NUMBER] == kept.seen[:_NUMBER]:
                    return kept.norm
                seen = now[:_NUMBER] + kept.seen[_NUMBER:]  # in training A and B are others in each step, W is not
        seen = seen or watcher.fingerprint(small, large)
        with torch.inference_mode(False):  # training may follow an evaluation, and cannot keep an inference tensor
            norm = _norm(of_weight, A, B, settings)
        storages = [StorageWeakRef(t.untyped_storage()) for t in (A, B, data, *quant)]
        self._kept = _Kept(key, weight_key, seen, norm, storages)
        return norm

    def __deepcopy__(self, memo: object) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()


class _Kept(NamedTuple):
    key: tuple[Any, ...]
    weight_key: tuple[Any, ...]
    seen: bytes
    norm: Tensor
    storages: list[StorageWeakRef]  # so that their addresses are not given to others; their data may be freed


def _norm(weight: Weight, A: Tensor, B: Tensor, settings: tuple[Any, ...]) -> Tensor:
    return ops.call_dora_norm(weight._replace(data=weight.data.detach()), A.detach(), B.detach(), *settings)


def _watcher(weight: Weight, A: Tensor, B: Tensor) -> Backend | None:
    """The backend that sees changes of them; None where one could stay unseen."""
    for t in (weight.data, A, B, *weight.quant):
        known = type(t) is Tensor or type(t) is torch.nn.Parameter
        if not known or t.is_inference() or not _in_order(t).is_contiguous():
            return None
    return dispatch.watcher(weight.data)


def _memory(weight: Weight, A: Tensor, B: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The small tensors that a norm depends on, and the large ones."""
    small, large = [_in_order(A), _in_order(B)], [_in_order(weight.data)]
    if weight.quant:
        code, absmax, *nested = weight.quant
        return [*small, code, *nested], [*large, absmax]
    return small, large


def _parts_are_those_of(every: bytes, some: bytes, first: int, count: int) -> bool:
    """Whether the fingerprints of some parts of the large tensors are what that of all parts has at their place."""
    size, step, at = _NUMBER * count, _NUMBER * PARTS, _NUMBER * (1 + first)
    found = (some[start : start + size] for start in range(_NUMBER, len(some), size))
    return all(part == every[at + i * step : at + i * step + size] for i, part in enumerate(found))


def _in_order(tensor: Tensor) -> Tensor:
    """A view whose elements follow each other, where there is one: a Conv1D's weight comes transposed, and PEFT keeps
    the B of stacked experts with the experts innermost."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))

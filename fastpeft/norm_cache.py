"""DoRA's norm, kept while W, A, B and s are unchanged: it does not depend on the tokens.

Gradient accumulation, activation checkpointing and evaluation ask for it again and again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import ops
from .backends import native
from .nf4 import FourBit, weight_operands


class NormCache:
    """The norm of the last ``W, A, B, s``.

    A tensor counts as unchanged while it has the same storage, place in it and version counter. As optimizers and
    ``merge`` also write through ``.data``, which no counter sees, ``A`` and ``B`` are compared by all their values,
    and ``W`` by one of each row. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None  # key and norm as one: threads may share a layer

    def get(
        self, weight: Tensor | FourBit, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, backend: str | None
    ) -> Tensor:
        """``‖W + s B A‖`` of each row, see ``fastpeft::dora_norm``; not to be written to."""
        data, quant, blocksize = weight_operands(weight)
        tensors = data.detach(), A.detach(), B.detach()
        settings = blocksize, scaling, dtype, backend
        key = None if torch.compiler.is_compiling() else _key(*tensors, quant, settings)
        if key is None:
            return ops.call_dora_norm(tensors[0], quant, blocksize, *tensors[1:], scaling, dtype, backend)
        kept = self._kept
        if kept is None or kept[0] != key:
            kept = key, ops.call_dora_norm(tensors[0], quant, blocksize, *tensors[1:], scaling, dtype, backend)
            self._kept = kept
        return kept[1]

    def __deepcopy__(self, memo: object) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()


def _key(
    weight: Tensor, A: Tensor, B: Tensor, quant: list[Tensor], settings: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """What the norm depends on; None where a change could stay unseen."""
    if any(type(t) is not Tensor or t.is_inference() for t in (weight, A, B, *quant)):
        return None
    rows = weight if weight.is_contiguous() else weight.t()  # a Conv1D's
    every = A.shape[1] // 2 if quant else rows.shape[1] + 1
    values = native.fingerprint(A), native.fingerprint(B), native.fingerprint(rows, max(1, every))
    if None in values:
        return None
    return settings, values, *(_identity(t) for t in (weight, A, B, *quant))


def _identity(t: Tensor) -> tuple[Any, ...]:
    # The weak reference keeps the storage's address from being given to another one, not its data from being freed.
    return StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.shape, t.stride(), t.dtype, t._version

"""Bytes that autograd keeps between a forward pass and its backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class KeptForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Counts what the forward passes inside this context save for their backward.

    ::

        with KeptForBackward(model.parameters()) as kept:
            loss = model(**batch).loss
        print(kept.bytes)

    A storage counts once, whole, however many saved tensors share it. Storages in ``parameters`` (and so every view
    of a parameter) do not count: they exist with or without the step. A cast copy of a parameter counts.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage
        return tensor

    def __enter__(self) -> KeptForBackward:
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        """Bytes of all storages kept so far."""
        return sum(storage.nbytes() for storage in self._storages.values())

"""How much memory a training step needs, counted exactly and for one model at a time.

Both models of a side-by-side run live in one process, so its resident set says nothing about either, and what it
keeps of freed memory says little about any. Tensors are counted instead, as ``torch.cuda.max_memory_allocated`` does
on a GPU: every allocation of torch's allocator during one step, on top of what the model and its optimizer hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind ``tensors``; memory that several of them share is counted once."""
    return sum(storage.nbytes() for storage in _storages(tensors).values())


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that ``forward()`` keeps for its backward pass, beyond the parameters and buffers of ``model`` and the
    statistics of its 4-bit weights.

    Whatever is saved counts with its whole memory (a saved view keeps all of it alive), once.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update(_storages([tensor]))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    own = _storages([*model.parameters(), *model.buffers(), *_statistics(model)])
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside its 4-bit weights, nested or not."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = getattr(state, "state2", None)


def peak_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> int:
    """The highest number of bytes in tensors of ``model``, ``optimizer`` and ``step()`` while ``step()`` runs.

    Gradients are dropped first, so that the step allocates its own.
    """
    optimizer.zero_grad(set_to_none=True)
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    before = held_bytes([*model.parameters(), *model.buffers(), *states])
    if next(model.parameters()).is_cuda:
        others = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - others
    with profile(profile_memory=True) as recorded:
        step()
    events = (event for event in recorded.kineto_results.events() if event.name() == "[memory]")
    return before + max(accumulate((event.nbytes() for event in events), initial=0))


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages behind ``tensors`` by address; holding them keeps an address from being given out again."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages}

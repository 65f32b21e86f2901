"""Which examples each training step takes."""

from __future__ import annotations

import torch
from torch import Tensor

_POOL = 16  # batches


def data_order(count: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """Which of ``count`` examples each step takes, ``[steps, batch_size]``: epoch after epoch, each one shuffled."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)


def by_length(order: Tensor, lengths: Tensor, seed: int) -> Tensor:
    """The batches ``order [steps, batch_size]`` made anew so that examples of like length share one: little is padded.

    The examples of every 16 batches are sorted by their ``lengths [count]`` and cut into batches again, which come in
    any order.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for pool in order.split(_POOL):
        examples = pool.flatten()
        batches = examples[lengths[examples].argsort(stable=True)].view_as(pool)
        pools.append(batches[torch.randperm(len(pool), generator=generator)])
    return torch.cat(pools)

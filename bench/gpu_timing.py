"""How long the GPU takes for a call, without the host: calls replayed as a CUDA graph, over operands too large for its
cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastpeft.experiments.timing import interleave, summary

CACHES_OF_OPERANDS = 3
MOST_COPIES = 64
DEVICE = "cuda"


def copies_of(bytes_of_one: int) -> int:
    """How many sets of operands it takes until none is still in the cache when its turn comes again."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(MOST_COPIES, max(2, -(-CACHES_OF_OPERANDS * cache // bytes_of_one)))


def replay_of(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """All the calls, as one graph to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def seconds_per_call(
    contestants: Mapping[str, Sequence[Callable[[], Any]]], rounds: int
) -> dict[str, dict[str, float] | str]:
    """The summary of each contestant's seconds, in interleaved rounds; of one that cannot be captured the reason."""
    replays, refused = dict[str, Callable[[], None]](), dict[str, str]()
    for name, calls in contestants.items():
        try:
            replays[name] = replay_of(calls)
        except Exception as error:  # a rival that waits for the GPU, or has no kernel: a result of the measurement
            torch.cuda.synchronize()
            refused[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    samples = interleave(replays, rounds, torch.cuda.synchronize)
    timed = {name: summary([s / len(contestants[name]) for s in found.wall]) for name, found in samples.items()}
    return {name: timed.get(name, refused.get(name, "")) for name in contestants}

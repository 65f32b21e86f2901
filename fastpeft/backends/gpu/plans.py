"""Which plan computes a product with W by Triton's kernels: by what was measured, see ``python -m
fastpeft.bench.gpu_plans``.

``plans.json`` holds, for every GPU that was measured, its compute capability, its number of multiprocessors and the
fastest plan at each of some shapes. The nearest entry counts: of the same GPU, or of the one most like it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("plans.json")
LAUNCH_BOUND_TOKENS = 16
ENDINGS = ("plain", "masked", "scaled", "scaled, masked")
SHOWN_TOKENS = (1, 512, 4096)


class Plan(Enum):
    """How a product with W and the low-rank part are computed; named as on the CPU (csrc/cpu/plan.h).

    ``base_first``: the vendor's product, then a kernel that adds the low-rank part, the scales and the bias.
    ``low_rank_first``: the low-rank part, then the vendor's product added onto it, the vendor's too: where nothing is
    masked or scaled. ``one_accumulator``: one kernel, both in the same float32 sums. ``one_accumulator_persistent``:
    another such, a program for each multiprocessor and operands moved in tiles by the copy engine.
    """

    base_first = "base_first"
    low_rank_first = "low_rank_first"
    one_accumulator = "one_accumulator"
    one_accumulator_persistent = "one_accumulator_persistent"


SHARED = Plan.one_accumulator, Plan.one_accumulator_persistent
"""The plans in which one kernel computes all of it."""


class Product(NamedTuple):
    """What a plan is for: ``[M, K] x [K, N]`` in a dtype (``"bfloat16"``), and what follows or masks it.

    ``ending``: ``"plain"``: the low-rank part and a bias; ``"masked"``: a mask on the low-rank part (dx with dropout);
    ``"scaled"``: DoRA; ``"scaled, masked"``: DoRA over dropped-out inputs, a second product.
    """

    M: int
    K: int
    N: int
    dtype: str
    ending: str


@dataclass(frozen=True, eq=False)
class MeasuredGpu:
    """What ``plans.json`` says of one GPU."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    plans: Sequence[tuple[Product, Plan]]


def plans_for(ending: str, shared: Sequence[Plan]) -> list[Plan]:
    """Those that can compute such a product; ``shared``: those of :data:`SHARED` that its operands allow for."""
    low_rank_first = [Plan.low_rank_first] if ending == "plain" else []
    return [
        Plan.base_first,
        *low_rank_first,
        *(p for p in shared if p is Plan.one_accumulator or ending != "scaled, masked"),
    ]


def choose(product: Product, device: torch.device, shared: tuple[Plan, ...]) -> Plan:
    """The plan for a product on this device, see :func:`plans_for`. Asks the GPU for nothing but its name."""
    return _choose(product, _nearest_gpu(device.index or 0) if device.type == "cuda" else None, shared)


def describe(K: int, N: int, dtype: torch.dtype, device: torch.device, shared: tuple[Plan, ...]) -> str:
    """The plans of a layer at a few numbers of tokens, and what they go by."""
    gpu = _nearest_gpu(device.index or 0) if device.type == "cuda" else None
    lines = []
    for tokens in SHOWN_TOKENS:
        plans = {e: choose(Product(tokens, K, N, name_of(dtype), e), device, shared).value for e in ENDINGS}
        lines.append(
            f"{tokens} token{'s' * (tokens > 1)}: " + ", ".join(f"{plan} ({ending})" for ending, plan in plans.items())
        )
    origin = "by the equations, no GPU was measured" if gpu is None else f"as measured on {gpu.name}"
    return f"plans {origin}: {'; '.join(lines)}"


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4096)
def _choose(product: Product, gpu: MeasuredGpu | None, shared: tuple[Plan, ...]) -> Plan:
    possible = plans_for(product.ending, shared)
    alike = [] if gpu is None else [(p, plan) for p, plan in gpu.plans if _kind(p) == _kind(product)]
    measured = [(p, plan) for p, plan in alike if plan in possible]
    if measured:
        return min(measured, key=lambda entry: _distance(entry[0], product))[1]
    # By the equations. Of a few tokens the launches are the time, and base_first has two fewer.
    return Plan.low_rank_first if product.ending == "plain" and product.M > LAUNCH_BOUND_TOKENS else Plan.base_first


def _kind(product: Product) -> tuple[str, str]:
    return product.dtype, product.ending


def _distance(a: Product, b: Product) -> float:
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(a[:3], b[:3], strict=True))


@lru_cache
def _nearest_gpu(index: int) -> MeasuredGpu | None:
    facts = torch.cuda.get_device_properties(index)
    return nearest_gpu(measured_gpus(), facts.name, (facts.major, facts.minor), facts.multi_processor_count)


def nearest_gpu(
    gpus: Sequence[MeasuredGpu], name: str, capability: tuple[int, int], multiprocessors: int
) -> MeasuredGpu | None:
    """The GPU of this name, or else the one of the nearest capability and size; None where none was measured."""

    def distance(gpu: MeasuredGpu) -> tuple[bool, int, int, float]:
        major, minor = (abs(a - b) for a, b in zip(gpu.capability, capability, strict=True))
        return gpu.name != name, major, minor, abs(math.log2(gpu.multiprocessors / multiprocessors))

    return min(gpus, key=distance, default=None)


@lru_cache
def measured_gpus() -> tuple[MeasuredGpu, ...]:
    """All of ``plans.json``."""
    return tuple(
        MeasuredGpu(
            gpu["name"],
            (gpu["capability"][0], gpu["capability"][1]),
            gpu["multiprocessors"],
            tuple((Product(*entry[:-1]), Plan(entry[-1])) for entry in gpu["plans"]),
        )
        for gpu in json.loads(TABLE.read_text())
    )

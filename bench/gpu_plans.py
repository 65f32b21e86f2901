"""The plans of the Triton backend's product with W on this GPU, at many shapes: ``python -m fastpeft.bench.gpu_plans``.

Rows are appended to ``bench/results/<gpu>-plans.jsonl`` with their table beside them; ``--record`` puts the fastest
plan at each shape into ``fastpeft/backends/gpu/plans.json``, which fastpeft chooses by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from fastpeft.backends.gpu import compose, plans, triton
from fastpeft.backends.gpu.kernel_set import Kernels, Mask, Tail
from fastpeft.backends.gpu.plans import ENDINGS, Plan, Product

from . import gpu_timing
from .cases import DTYPES
from .measure import Run, record_kernels

RANK = 16
THRESHOLD = 3277  # p = 0.05
# What matters most comes first, should the time run out.
TOKENS = (4096, 2048, 512, 8192, 128, 16, 1)
LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 2048))  # inputs, outputs


def calls(of: Kernels, product: Product, device: str) -> dict[str, Callable[[], Any]]:
    """The frozen base's product, and every plan's by name; fresh operands."""
    dtype = getattr(torch, product.dtype)
    x = torch.randn(product.M, product.K, device=device, dtype=dtype)
    weight = torch.randn(product.N, product.K, device=device, dtype=dtype)
    q = torch.randn(product.M, RANK, device=device)
    right = torch.randn(product.N, RANK, device=device)
    scaled, masked = "scaled" in product.ending, "masked" in product.ending
    seed = torch.tensor(7, device=device)
    mask = Mask(THRESHOLD if masked else 0, 1.05 if masked else 1.0, seed)
    c = torch.rand(product.N, device=device) if scaled else None
    z = torch.empty(product.M, product.N, device=device, dtype=dtype) if scaled and product.M > 1 else None
    tail = Tail(q, right, 2.0, 0 if scaled else mask.threshold, seed, c, z)

    def planned(plan: Plan) -> Callable[[], Any]:
        if scaled:
            return lambda: compose.dora_product(of, x, weight, [tail], [mask], plan)
        return lambda: compose.product(of, x, weight, tail, plan)

    base = {"base": lambda: torch.nn.functional.linear(x, weight)}
    possible = plans.plans_for(product.ending, of.shared_plans(x, weight, RANK))
    return base | {plan.value: planned(plan) for plan in possible}


def measure(dtype: str, rounds: int, run: Run) -> Iterator[dict[str, Any]]:
    """A row for every layer, number of tokens and ending."""
    of, name = triton.kernels(), plans.name_of(DTYPES[dtype])
    for K, N in LAYERS:
        for M in TOKENS:
            for ending in ENDINGS:
                product = Product(M, K, N, name, ending)
                bytes_of_one = (M * K + N * K + M * N) * DTYPES[dtype].itemsize
                copies = gpu_timing.copies_of(bytes_of_one)
                sets = [calls(of, product, gpu_timing.DEVICE) for _ in range(copies)]
                found = gpu_timing.seconds_per_call({plan: [each[plan] for each in sets] for plan in sets[0]}, rounds)
                yield {
                    **run.facts(),
                    "product": product._asdict(),
                    "rank": RANK,
                    "base_seconds": found.pop("base"),
                    "seconds": found,
                }


def fastest(row: dict[str, Any]) -> str:
    """The plan with the smallest median."""
    timed = {plan: found["median"] for plan, found in row["seconds"].items() if isinstance(found, dict)}
    return min(timed, key=timed.__getitem__)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Each plan as a multiple of the frozen base, the fastest in bold."""
    first, names = found[0], [plan.value for plan in Plan]
    lines = [
        f"{first['machine']['gpu']}, rank {RANK}, {first['run'][:10]}, commit {str(first['commit'])[:9]}. "
        "Medians of the time on the GPU, × the frozen base.",
        "",
        f"| tokens x inputs x outputs | dtype | ending | base, µs | {' | '.join(names)} |",
        f"|---|---|---|---:|{'---:|' * len(names)}",
    ]
    for row in found:
        product, base, best = row["product"], row["base_seconds"]["median"], fastest(row)
        cells = []
        for name in names:
            seconds = row["seconds"].get(name)
            text = f"{seconds['median'] / base:.2f}" if isinstance(seconds, dict) else ""
            cells.append(f"**{text}**" if name == best else text)
        shape = f"{product['M']} x {product['K']} x {product['N']}"
        lines.append(f"| {shape} | {product['dtype']} | {product['ending']} | {base * 1e6:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def recorded(found: Sequence[dict[str, Any]], table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``plans.json`` with this GPU's entry in the place of an older one."""
    machine = found[0]["machine"]
    plans = [[*row["product"].values(), fastest(row)] for row in found]
    facts = {"name": machine["gpu"], "capability": machine["capability"], "multiprocessors": machine["multiprocessors"]}
    return [*(gpu for gpu in table if gpu["name"] != machine["gpu"]), facts | {"plans": plans}]


def recording(found: Iterable[dict[str, Any]], table: Path | None) -> Iterator[dict[str, Any]]:
    """``found``, each row put into ``table``, a copy of plans.json, when it comes."""
    known = json.loads(table.read_text()) if table is not None and table.exists() else []
    so_far = []
    for row in found:
        so_far.append(row)
        if table is not None:
            lines = ",\n".join(json.dumps(gpu) for gpu in recorded(so_far, known))
            new = table.with_suffix(".new")  # whoever is ended while it writes leaves the older table
            new.write_text(f"[\n{lines}\n]\n")
            new.replace(table)
        yield row


@click.command()
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option("--rounds", type=click.IntRange(min=2), default=7, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"))
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), help="A copy of plans.json to add to.")
def command(dtype: str, rounds: int, out: Path, record: Path | None) -> None:
    """Times the plans of the Triton backend against the frozen base."""
    record_kernels("plans", lambda run: recording(measure(dtype, rounds, run), record), markdown, out, "cuda")


if __name__ == "__main__":
    command()

"""The CPU's ways to compute a product with its low-rank part, at many shapes: ``python -m fastpeft.bench.cpu_plans``.

What ``csrc/cpu/plan.cpp`` chooses by. Each plan's forward, and its backward of x, are timed against the
frozen base's in the same rounds. Rows are appended to ``bench/results/<machine>-plans.jsonl``, the table beside them is
drawn from the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from fastpeft import extension, ops
from fastpeft.call import Adapters, BackwardCall, ForwardCall, Kept, Needs, Weight
from fastpeft.experiments.timing import interleave, ratios, summary

from .measure import Run, record_kernels
from .play import isa_option

RANK = 16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = (1, 4, 16, 64, 256, 512, 2048)
LAYERS = ((384, 384), (1024, 1024), (1024, 2816), (2816, 1024), (2048, 2048), (4096, 4096))  # inputs, outputs
MOST_TOKENS_OF_DOTS = 16
LARGEST = 2048 * 2048 * 2048  # M N K


def plans(dtype: torch.dtype, tokens: int, forward: bool) -> list[str]:
    """Names of the plans that can be asked for."""
    names = ["base_first", "low_rank_first", "one_accumulator"]
    if forward and tokens <= MOST_TOKENS_OF_DOTS:
        names.append("dots")
    return names


def calls(
    dtype: torch.dtype, tokens: int, inputs: int, outputs: int, forward: bool
) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    """The frozen base's call, and every plan's by name."""
    x, dy, W = (torch.randn(shape, dtype=dtype) for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs)))
    adapters = Adapters([torch.randn(RANK, inputs)], [torch.randn(outputs, RANK)], [], [1.0], [0.0])
    weight, needs = Weight.of(W), Needs.of([True, False, False, False, False], 1)
    op, call = (
        (ops.lora_linear, ForwardCall(x, weight, None, adapters, False).flat())
        if forward
        else (ops.lora_linear_backward, BackwardCall(dy, None, weight, adapters, Kept(None, []), needs).flat())
    )
    base = (lambda: torch.nn.functional.linear(x, W)) if forward else (lambda: dy @ W)
    return base, {name: by_plan(name, op, call) for name in plans(dtype, tokens, forward)}


def by_plan(name: str, op: Callable[..., Any], call: Sequence[Any]) -> Callable[[], Any]:
    """The op by the plan of this name."""
    C = extension.built()

    def run() -> Any:
        C.force_plan(getattr(C.Plan, name))
        try:
            return op(*call, "cpu")
        finally:
            C.force_plan(None)

    return run


def measure(dtype_name: str, rounds: int, run: Run) -> Iterator[dict[str, Any]]:
    """A row for every direction, layer and number of tokens."""
    for inputs, outputs in LAYERS:
        for tokens in TOKENS:
            if tokens * inputs * outputs > LARGEST:
                continue
            for forward in (True, False):
                base, planned = calls(DTYPES[dtype_name], tokens, inputs, outputs, forward)
                samples = interleave({"base": base, **planned}, rounds)
                yield {
                    **run.facts(),
                    "dtype": dtype_name,
                    "direction": "forward" if forward else "backward of x",
                    "shape": [tokens, inputs, outputs],
                    "rank": RANK,
                    "base_seconds": summary(samples["base"].wall),
                    "against_base": {
                        name: summary(ratios(samples[name].wall, samples["base"].wall)) for name in planned
                    },
                }


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The table of one run's rows: each plan as a multiple of the frozen base, the fastest in bold."""
    first = found[0]
    names = list(dict.fromkeys(name for row in found for name in row["against_base"]))
    lines = [
        f"{first['machine']['cpu']}, {first['threads']} threads, {first['instruction_set']} kernels, rank {RANK}, "
        f"{first['run'][:10]}, commit {str(first['commit'])[:9]}. Medians, × the frozen base.",
        "",
        f"| tokens x inputs x outputs | dtype | direction | base, ms | {' | '.join(names)} |",
        f"|---|---|---|---:|{'---:|' * len(names)}",
    ]
    for row in found:
        medians = {name: against["median"] for name, against in row["against_base"].items()}
        best = min(medians.values())
        cells = [
            ""
            if name not in medians
            else f"**{medians[name]:.2f}**"
            if medians[name] == best
            else f"{medians[name]:.2f}"
            for name in names
        ]
        shape = " x ".join(map(str, row["shape"]))
        milliseconds = f"{row['base_seconds']['median'] * 1e3:.3f}"
        lines.append(f"| {shape} | {row['dtype']} | {row['direction']} | {milliseconds} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=7, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Repeatable.  [all]")
@isa_option("fastpeft.bench.cpu_plans")
def command(rounds: int, out: Path, dtypes: Sequence[str]) -> None:
    """Times the CPU's plans against the frozen base."""
    record_kernels(
        "plans", lambda run: (row for dtype in dtypes or DTYPES for row in measure(dtype, rounds, run)), markdown, out
    )


if __name__ == "__main__":
    command()

"""The CPU's kernels against this machine's floor: ``python -m fastpeft.bench.cpu_kernels``.

Each sweep of docs/kernels.md is timed beside the base product it accompanies, and compared with the larger of two
times: its operations at the rate that the vendor's large product reaches here, and its bytes at the rate of a copy.
Rows are appended to ``bench/results/<machine>-kernels.jsonl``, the table beside them is drawn from the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from fastpeft import ops
from fastpeft.call import Adapters, BackwardCall, Kept, Needs, Weight
from fastpeft.experiments.timing import interleave, summary

from .cpu_plans import by_plan
from .measure import Run, record_kernels
from .play import isa_option

TOKENS, WIDTH, RANK, DROPOUT = 512, 2048, 16, 0.05
PEAK_SIZE, COPY_BYTES = 2048, 1 << 28
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def sweeps(dtype: torch.dtype, tokens: int, width: int, rank: int) -> dict[str, tuple[Callable[[], Any], int, int]]:
    """Name → (call, operations, bytes that have to move) of every sweep over a ``[tokens, width]`` matrix.

    The other side of the layer has one feature, so that a call's time is the sweep's. The part of dx comes with the
    product ``dy W`` of that one feature, which the floor counts.
    """
    size, seed = dtype.itemsize, torch.tensor([1])
    wide, narrow, u = (
        torch.randn(tokens, width, dtype=dtype),
        torch.randn(tokens, 1, dtype=dtype),
        torch.randn(tokens, rank),
    )
    A_wide, A_one, B_wide, B_one = (torch.randn(s) for s in ((rank, width), (rank, 1), (width, rank), (1, rank)))
    W_wide, W_tall = torch.randn(1, width, dtype=dtype), torch.randn(width, 1, dtype=dtype)

    def backward(
        operands: tuple[Tensor, Tensor, Tensor], A: Tensor, B: Tensor, p: float, dx: bool, dA: bool, dB: bool
    ) -> Callable[[], Any]:
        dy, x, W = operands
        adapters, needs = Adapters([A], [B], [], [1.0], [p], seed), Needs(dx, False, False, [dA], [dB], [])
        call = BackwardCall(dy, x, Weight.of(W), adapters, Kept(u, []), needs)
        return by_plan("base_first", ops.lora_linear_backward, call.flat())

    product, matrix = 2 * tokens * width * rank, tokens * width * size
    found = {
        "v": (backward((wide, narrow, W_tall), A_one, B_wide, 0, False, True, False), product, matrix),
        "dB": (backward((wide, narrow, W_tall), A_one, B_wide, 0, False, False, True), product, matrix),
        "v, dB": (backward((wide, narrow, W_tall), A_one, B_wide, 0, False, True, True), 2 * product, matrix),
    }
    for name, p in (("", 0.0), (", dropout", DROPOUT)):
        side = ((narrow, wide, W_wide), A_wide, B_one, p)
        found |= {
            f"dA{name}": (backward(*side, False, True, False), product, matrix),
            f"dx{name}": (backward(*side, True, False, False), product + 2 * tokens * width, 3 * matrix),
            f"dA, dx{name}": (backward(*side, True, True, False), 2 * product + 2 * tokens * width, 4 * matrix),
        }
    return found


def measure(dtype_name: str, rounds: int, run: Run) -> list[dict[str, Any]]:
    """One row for each sweep, with the rates of this machine that its floor is made of."""
    dtype = DTYPES[dtype_name]
    side = torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=dtype)
    source, target = (torch.zeros(COPY_BYTES // 4) for _ in range(2))
    timed = sweeps(dtype, TOKENS, WIDTH, RANK)
    calls = {name: call for name, (call, _, _) in timed.items()}
    samples = interleave({"product": lambda: side @ side.t(), "copy": lambda: target.copy_(source), **calls}, rounds)
    rate = 2 * PEAK_SIZE**3 / summary(samples["product"].wall)["min"]
    bandwidth = 2 * COPY_BYTES / summary(samples["copy"].wall)["min"]
    found = []
    for name, (_, operations, moved) in timed.items():
        seconds = summary(samples[name].wall)
        floor = max(operations / rate, moved / bandwidth)
        found.append(
            {
                **run.facts(),
                "sweep": name,
                "dtype": dtype_name,
                "shape": [TOKENS, WIDTH],
                "rank": RANK,
                "operations": operations,
                "bytes": moved,
                "operations_per_second": rate,
                "bytes_per_second": bandwidth,
                "seconds": seconds,
                "floor_seconds": floor,
                "share_of_floor": floor / seconds["median"],
            }
        )
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    """The table of one run's rows."""
    first = found[0]
    lines = [
        f"{first['machine']['cpu']}, {first['threads']} threads, {first['instruction_set']} kernels, "
        f"x [{TOKENS}, {WIDTH}], rank {RANK}, {first['run'][:10]}, commit {str(first['commit'])[:9]}.",
        "",
        "| sweep | dtype | MFLOP | MiB | ms, median | floor, ms | share of the floor |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        lines.append(
            f"| {row['sweep']} | {row['dtype']} | {row['operations'] / 1e6:.1f} | {row['bytes'] / 2**20:.1f} | "
            f"{row['seconds']['median'] * 1e3:.3f} | {row['floor_seconds'] * 1e3:.3f} | {row['share_of_floor']:.0%} |"
        )
    rates = {row["dtype"]: row for row in found}
    peaks = ", ".join(f"{name} {row['operations_per_second'] / 1e9:.0f} GFLOP/s" for name, row in rates.items())
    lines += ["", f"Floors from: {peaks}; copy {first['bytes_per_second'] / 2**30:.1f} GiB/s."]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=31, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Repeatable.  [all]")
@isa_option("fastpeft.bench.cpu_kernels")
def command(rounds: int, out: Path, dtypes: Sequence[str]) -> None:
    """Times the CPU's kernels against this machine's floor."""
    record_kernels(
        "kernels", lambda run: [row for dtype in dtypes or DTYPES for row in measure(dtype, rounds, run)], markdown, out
    )


if __name__ == "__main__":
    command()

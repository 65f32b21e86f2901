"""Where the CUDA backend's two compositions part: ``python -m fastpeft.bench.gpu_compositions``.

A layer's training step, put together in C++ and in Python, one after the other without waiting for the GPU: the longer
of what the host and the GPU take. ``HOST_BOUND`` in ``fastpeft/backends/cuda.py`` is to lie where they change places.
Rows are appended to ``bench/results/<gpu>-compositions.jsonl`` with their table beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from fastpeft import functional
from fastpeft.backends import cuda

from . import gpu_timing
from .measure import Run, record_kernels
from .timing import interleave, summary

RANK = 16
WIDTHS = (2048, 4096)  # inputs and outputs
TOKENS = (64, 512, 1024, 2048, 4096)
DROPOUT = (0.0, 0.05)
COMPOSITIONS = {"C++": 1 << 62, "Python": 0}  # the HOST_BOUND that makes it of every call


def steps(tokens: int, width: int, dropout_p: float, device: str) -> dict[str, Callable[[], Any]]:
    """The frozen base's step, and each composition's, on the same operands."""
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(width, width, device=device).bfloat16()
    dy = torch.randn(tokens, width, device=device).bfloat16()
    A, B = (torch.randn(shape, device=device, requires_grad=True) for shape in ((RANK, width), (width, RANK)))

    def composed(bound: int) -> Callable[[], Any]:
        def step() -> Any:
            cuda.HOST_BOUND = bound
            y = functional.lora_linear(x, weight, None, A, B, 2.0, dropout_p, backend="cuda")
            return torch.autograd.grad(y, (x, A, B), dy)

        return step

    base = {"base": lambda: torch.autograd.grad(torch.nn.functional.linear(x, weight), x, dy)}
    return base | {name: composed(bound) for name, bound in COMPOSITIONS.items()}


def measure(rounds: int, run: Run) -> Iterator[dict[str, Any]]:
    """A row for every width, number of tokens and dropout."""
    multiprocessors, bound = run.machine["multiprocessors"], cuda.HOST_BOUND
    try:
        for width in WIDTHS:
            for tokens in TOKENS:
                for dropout_p in DROPOUT:
                    samples = interleave(
                        steps(tokens, width, dropout_p, gpu_timing.DEVICE), rounds, torch.cuda.synchronize
                    )
                    yield {
                        **run.facts(),
                        "tokens": tokens,
                        "width": width,
                        "rank": RANK,
                        "dropout": dropout_p,
                        "multiply_adds": tokens * width**2 // multiprocessors,
                        "bound": bound,
                        "seconds": {name: summary(found.wall) for name, found in samples.items()},
                    }
    finally:
        cuda.HOST_BOUND = bound


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Each composition as a multiple of the frozen base, the faster one in bold."""
    first = found[0]
    lines = [
        f"{first['machine']['gpu']}, bfloat16, rank {RANK}, {first['run'][:10]}, commit {str(first['commit'])[:9]}. "
        f"Medians of a training step, × the frozen base; C++ is taken up to {first['bound'] / 1e6:.0f} million "
        "multiply-adds a multiprocessor.",
        "",
        f"| tokens x width² | dropout | multiply-adds, millions | base, µs | {' | '.join(COMPOSITIONS)} |",
        f"|---|---:|---:|---:|{'---:|' * len(COMPOSITIONS)}",
    ]
    for row in found:
        base, *both = (row["seconds"][name]["median"] for name in ("base", *COMPOSITIONS))
        cells = [f"**{s / base:.2f}**" if s == min(both) else f"{s / base:.2f}" for s in both]
        facts = f"{row['tokens']} x {row['width']}²", f"{row['dropout']:g}", f"{row['multiply_adds'] / 1e6:.0f}"
        lines.append(f"| {' | '.join([*facts, f'{base * 1e6:.1f}', *cells])} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=9, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"))
def command(rounds: int, out: Path) -> None:
    """Times both compositions of the CUDA backend."""
    record_kernels("compositions", lambda run: list(measure(rounds, run)), markdown, out, "cuda")


if __name__ == "__main__":
    command()

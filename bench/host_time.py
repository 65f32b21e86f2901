"""What a GPU step costs the host, measured without a GPU: ``python -m fastpeft.bench.host_time``, in a checkout.

With few tokens a GPU waits for the host: for the interpreter, torch's dispatcher and autograd. All of that runs here,
on small CPU tensors; fastpeft's step is the ``cuda`` backend's, whose kernels are stand-ins that launch nothing
(stub_gpu.cpp), torch's operations compute, which takes little time at this size. What a driver takes for each launch
would come on top; fastpeft makes the fewest.
Rows are appended to ``bench/results/<machine>-host-time.jsonl``, the table beside them is drawn from the newest.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

import fastpeft
from fastpeft import build, dispatch
from fastpeft.backends.gpu import compose, cuda
from fastpeft.experiments.models import METHODS
from fastpeft.experiments.timing import interleave, ratios, summary
from fastpeft.peft import readers

from .cases import LayerCase
from .contestants import BASE, FASTPEFT, PEFT, PEFT_AUTOCAST
from .measure import Run, record_kernels
from .table import spread

TOKENS, WIDTH = 129, 16  # the fewest tokens that lora_linear takes
ROUNDS = 60  # of some hundred calls each
CONTESTANTS = (BASE, PEFT, PEFT_AUTOCAST, FASTPEFT)
PHASES = {"forward": "forward", "step": "forward and backward"}
CASES = (("lora", 0.0), ("lora", 0.05), ("dora", 0.0))


@contextmanager
def stub() -> Iterator[ctypes.CDLL]:
    """Within, the ``cuda`` backend takes CPU tensors, launches nothing and counts: ``stub_launches()``. DoRA's norm is
    not kept, and c not looked at, as on a GPU.

    Raises:
        fastpeft.build.BuildError: no compiler, or no sources.
    """
    here = Path(__file__).resolve().parent
    command = [*build.find_compiler(), *build.COMPILE_FLAGS, "-I", str(here.parent / "csrc")]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        library, objects = Path(folder, "stub_gpu.so"), Path(folder, "objects")
        build.compile_and_link(
            here, [here / "stub_gpu.cpp"], lambda _: command, [*command, "-shared"], [], library, objects
        )
        loaded = ctypes.CDLL(str(library))
        loaded.stub_launchers.restype = ctypes.c_void_p
        launchers = loaded.stub_launchers()
        for target, name, stand_in in (
            (cuda, "launchers", lambda: launchers),
            (cuda, "place_of", lambda tensor: (0, 0)),
            (cuda.CudaBackend, "refuses", lambda self, *operands: compose.refusal(*operands)),
            (dispatch, "watcher", lambda tensor: None),
            (readers, "is_readable", lambda tensor: False),
        ):
            patches.enter_context(mock.patch.object(target, name, stand_in))
        yield loaded


def measure(rounds: int, run: Run) -> Iterator[dict[str, Any]]:
    """A row for every case and phase, in bfloat16, by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stub() as library:
            for method, dropout in CASES:
                case = LayerCase(TOKENS, WIDTH, WIDTH, "bf16", method=method, dropout=dropout)
                runners = {who.name: who.setup(case) for who in CONTESTANTS}
                fastpeft.patch(runners[FASTPEFT.name].model, backend="cuda")
                for phase in PHASES:
                    calls = {name: runner.phase(phase) for name, runner in runners.items()}
                    before = library.stub_launches()
                    calls[FASTPEFT.name]()
                    launches = library.stub_launches() - before
                    samples = interleave(calls, rounds)
                    yield {
                        **run.facts(),
                        "threads": 1,
                        "method": method,
                        "dropout": dropout,
                        "phase": phase,
                        "tokens": TOKENS,
                        "width": WIDTH,
                        "rank": case.rank,
                        "rounds": rounds,
                        "launches": launches,
                        "seconds": {name: summary(each.wall) for name, each in samples.items()},
                        "over_peft": summary(ratios(samples[FASTPEFT.name].wall, samples[PEFT.name].wall)),
                    }
    finally:
        torch.set_num_threads(threads)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Microseconds of each, and fastpeft's over PEFT's with its quartiles."""
    first = found[0]
    lines = [
        f"{first['machine']['cpu']}, one thread, {first['run'][:10]}, commit {str(first['commit'])[:9]}. What a GPU "
        f"step costs the host, without a GPU: {first['tokens']} tokens through a layer {first['width']} wide, bfloat16"
        f", rank {first['rank']}; medians over {first['rounds']} rounds of hundreds of calls, in µs.",
        "",
        "| method | dropout | | base | PEFT | PEFT, autocast | fastpeft | its launches | fastpeft / PEFT |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        times = " | ".join(f"{row['seconds'][who.name]['median'] * 1e6:.0f}" for who in CONTESTANTS)
        what = f"{METHODS[row['method']]} | {row['dropout']:g} | {PHASES[row['phase']]}"
        lines.append(f"| {what} | {times} | {row['launches']} | {spread(row['over_peft'])} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--rounds", type=click.IntRange(min=2), default=ROUNDS, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"))
def command(rounds: int, out: Path) -> None:
    """Times what a GPU step costs the host against PEFT's."""
    record_kernels("host-time", lambda run: measure(rounds, run), markdown, out)


if __name__ == "__main__":
    command()

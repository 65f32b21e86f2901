"""The command ``fastpeft bench``: its options, and what it does one after the other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastpeft import extension
from fastpeft.experiments import provenance
from fastpeft.experiments.models import FOUR_BIT_METHODS, METHODS
from fastpeft.experiments.options import Probability
from fastpeft.experiments.packages import MissingPackage, require_package

from . import bounds, page, rows, table
from .cases import (
    DEVICES,
    DROPOUTS,
    DTYPES,
    GPU_LAYER_SHAPES,
    LAYER_SHAPES,
    RANK,
    Case,
    LayerCase,
    ModelCase,
)
from .contestants import BASE_FLOAT32, CONTESTANTS, FASTPEFT_SHARED, SHARING_METHODS
from .measure import Run, measure
from .play import isa_option

QUICK_SHAPES = ((1, 2048, 2048), (512, 1024, 1024), (512, 2048, 2048))


class Shape(click.ParamType):
    """``MxKxN`` as three positive integers."""

    name = "MxKxN"

    def convert(
        self, value: str | tuple[int, int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)[x×]([1-9]\d*)", value)
        if match is None:
            self.fail(f"expected three positive integers such as 512x2048x2048, got {value!r}", param, ctx)
        M, K, N = (int(group) for group in match.groups())
        return M, K, N


def choose_cases(
    shapes: Sequence[tuple[int, int, int]],
    dtypes: Sequence[str],
    rank: int,
    dropouts: Sequence[float],
    methods: Sequence[str],
    device: str = "cpu",
    *,
    layer: bool,
    model: bool,
) -> list[Case]:
    """Layers at each shape, and the model, by each method at each dtype and dropout."""
    settings = list(itertools.product(methods, dtypes, dropouts))
    layers = [LayerCase(*shape, dtype, rank, p, method, device) for method, dtype, p in settings for shape in shapes]
    models = [ModelCase(dtype, rank, p, method, device) for method, dtype, p in settings]
    return [*(layers if layer else []), *(models if model else [])]


@click.command("bench", short_help="Time PEFT and fastpeft side by side with the frozen base.")
@click.option("--quick", is_flag=True, help="About a minute: LoRA in bf16, three layer shapes, nothing compiled.")
@click.option("--layer", is_flag=True, help="Only single layers (unless --model is given too).")
@click.option("--model", is_flag=True, help="Only the small Llama-shaped model (unless --layer is given too).")
@click.option(
    "--shape", "shapes", type=Shape(), metavar="MxKxN", multiple=True, help="Layers of this shape instead; repeatable."
)
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, help="Repeatable.  [all]")
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Repeatable.  [bf16, fp32; on a GPU bf16]"
)
@click.option("--rank", type=click.IntRange(min=1), default=RANK, show_default=True)
@click.option("--dropout", "dropouts", type=Probability(), multiple=True, help="Repeatable.  [0, 0.05]")
@click.option("--rounds", type=click.IntRange(min=2), default=15, show_default=True, help="Samples of each contestant.")
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="PEFT and fastpeft under torch.compile too.  [on; off with --quick]",
)
@click.option("--threads", type=click.IntRange(min=1), help="[torch's own choice]")
@isa_option("fastpeft")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("bench/results"), show_default=True
)
@click.option(
    "--plot-only", is_flag=True, help="Measure nothing: table and pictures from the rows recorded on this machine."
)
@click.option("--check", is_flag=True, help="Compare with fastpeft's bounds; exit code 1 when one is missed.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    quick: bool,
    layer: bool,
    model: bool,
    shapes: tuple[tuple[int, int, int], ...],
    device: str,
    methods: tuple[str, ...],
    dtypes: tuple[str, ...],
    rank: int,
    dropouts: tuple[float, ...],
    rounds: int,
    compiled: bool | None,
    threads: int | None,
    out: Path,
    plot_only: bool,
    check: bool,
) -> None:
    """Times the frozen base layer, PEFT (as it comes, under autocast, compiled) and fastpeft (compiled, too) side by
    side.

    They take turns, round by round; each time is divided by the base's of the same round. Before a shape is timed,
    fastpeft's outputs and gradients are compared with PEFT's in float64: while that fails, no speed-up is shown.
    Every measurement is appended as a line of JSON to OUT/<machine>.jsonl; the page with the table (.md) and the
    pictures (-<method>.png) beside it are drawn from these rows.
    """
    try:
        measures_four_bit = not plot_only and (not methods or set(methods) & set(FOUR_BIT_METHODS))
        four_bit = ("bitsandbytes",) if measures_four_bit else ()
        for package in (*four_bit, "matplotlib", "peft", "psutil", "transformers"):
            require_package(package, "pip install 'fastpeft[bench]'")
    except MissingPackage as missing:
        raise click.ClickException(str(missing)) from missing
    console = Console()
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch finds no NVIDIA GPU", param_hint="--device")
    path = out / f"{provenance.machine(device)['name']}.jsonl"
    try:
        recorded = rows.load(path) if path.exists() else []
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if plot_only:
        if not recorded:
            raise click.UsageError(f"--plot-only needs recorded rows, and there are none in {path}")
        shown = rows.latest(recorded)
    else:
        if threads is not None:
            torch.set_num_threads(threads)
        everything = not (layer or model)
        cases = choose_cases(
            shapes or (QUICK_SHAPES if quick else LAYER_SHAPES if device == "cpu" else GPU_LAYER_SHAPES),
            dtypes or (("bf16",) if quick or device == "cuda" else ("bf16", "fp32")),
            rank,
            dropouts or DROPOUTS,
            methods or (("lora",) if quick else tuple(METHODS)),
            device,
            layer=layer or everything,
            model=model or (everything and not quick and not shapes),
        )
        wants_compiled = not quick if compiled is None else compiled
        shown = _run(cases, rounds, wants_compiled, Run.begin(device), path, console)
        recorded += shown
    table.show(shown, console)
    page.write(rows.latest(recorded), path)
    console.print(f"Rows in {path}; their table and pictures in {path.with_suffix('.md')}.")
    if check:
        findings = bounds.check(shown)
        table.show_findings(findings, console)
        if any(finding.missed for finding in findings):
            ctx.exit(1)


def _run(cases: Sequence[Case], rounds: int, compiled: bool, run: Run, path: Path, console: Console) -> list[rows.Row]:
    contestants = [contestant for contestant in CONTESTANTS if compiled or not contestant.compiled]
    widens = extension.C is not None and not extension.C.multiplies_pairs()
    measured: list[rows.Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(
                task, description=f"{METHODS[case.method]} {case.shape} {case.dtype}, dropout {case.dropout:g}"
            )
            beside = [BASE_FLOAT32] if widens and case.device == "cpu" and case.dtype == "bf16" else []
            if case.kind == "model" and case.method in SHARING_METHODS:
                beside.append(FASTPEFT_SHARED)
            found = list(measure(case, [*contestants, *beside], rounds, run))
            rows.append(path, found)
            measured += found
            progress.advance(task)
    return measured

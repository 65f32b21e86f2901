"""``fastpeft demo``: a model is fine-tuned by Hugging Face PEFT and by fastpeft, side by side."""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import fastpeft

from .batches import data_order
from .data import Encoded, Review, encode, read_reviews, split_reviews
from .models import DEMO_MODELS, EXPERTS, FOUR_BIT_METHODS, METHODS, add_adapters, faster_dtype
from .options import Probability
from .output import try_out, write_together
from .pace import TRIAL_STEPS, reason, steps_that_fit
from .packages import MissingPackage, require_package
from .quiet import quieten_libraries
from .report import Result, draw_losses, results_table, write_json
from .training import Run, evaluate, measure_memory, new_run, train_together

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLOT, NUMBERS = "loss.png", "results.json"
_EVALUATION_BATCH = 64
_TESTING_COST = 1 / 3  # of training on as many sentences: no backward pass, less padding
_MEMORY_STEPS = 2
_DROPOUT = 0.05


@dataclass(frozen=True)
class Settings:
    """The options of the command line."""

    model: str
    method: str
    steps: int | None
    dtype: str
    rank: int
    dropout: float
    seed: int
    batch_size: int
    length: int
    test_size: int
    data: Path
    out: Path


@click.command(context_settings={"show_default": True})
@click.option(
    "--model",
    type=click.Choice(list(DEMO_MODELS)),
    default="minilm",
    help="What to fine-tune. qwen3-moe: a mixture of experts, tiny and mostly random.",
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="lora",
    help="What kind of adapters; of qwen3-moe lora, as PEFT has no other on experts.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 10_000),
    show_default="as many as fit about three minutes",
    help="Training steps of each of the two.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    help="Of the frozen model; adapters are float32. auto: the one in which this machine multiplies faster.",
)
@click.option("--rank", type=click.IntRange(1, 256), default=16, help="Of the adapters.")
@click.option(
    "--dropout",
    type=Probability(),
    show_default=f"{_DROPOUT}; 0 for qwen3-moe, as PEFT has none on experts",
    help="Of the adapters' inputs. With 0 the two losses differ by rounding alone.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    help="Of the split, the order of the data, the new weights, the dropout.",
)
@click.option("--batch-size", type=click.IntRange(1, 256), default=32, help="Sentences in a step.")
@click.option("--length", type=click.IntRange(8, 512), default=48, help="Tokens of a sentence; longer ones are cut.")
@click.option("--test-size", type=click.IntRange(1), default=1000, help="Sentences held out to measure the accuracy.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    help="Folder with the source archive of vaderSentiment, which holds the movie reviews.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    help="Folder that the plot and the numbers go to.",
)
def command(**options: Any) -> None:
    """Fine-tune a real model by PEFT and by fastpeft, side by side.

    A pre-trained model learns to tell positive from negative movie reviews through adapters, once by Hugging
    Face PEFT and once by fastpeft: from the same weights, on the same batches, step by step in turn. A table and a
    plot then compare loss, time and memory.
    """
    started = time.perf_counter()
    settings = _settled(options)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported, which reads it once
    quieten_libraries()
    train, test, model_folder = _checked(settings)
    console = Console(highlight=False)
    dtype = faster_dtype() if settings.dtype == "auto" else DTYPES[settings.dtype]
    source = DEMO_MODELS[settings.model]
    with console.status("loading the model"):
        torch.manual_seed(settings.seed)
        model, tokenizer = source.load(model_folder)
        model.to(dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        train_data, test_data = (encode(reviews, tokenizer, settings.length) for reviews in (train, test))
    title = f"{source.title} ({parameters / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')})"
    console.print(f"[bold]{title}[/bold]\n{_introduction(settings, train, test)}")

    steps = settings.steps
    if steps is not None:
        console.print(f"{steps} steps each, as --steps says.")
    else:
        with console.status("measuring the pace of both"):
            paces = trial_paces(model, settings, train_data)
        after = _MEMORY_STEPS + _TESTING_COST * settings.test_size / settings.batch_size
        steps = steps_that_fit(paces, time.perf_counter() - started, after)
        console.print(reason(steps, paces))
    runs = contenders(model, settings, steps)
    for verdict, count in Counter(fastpeft.explain(runs[1].model).verdicts.values()).items():
        console.print(f"Adapted layers of the fastpeft run: {count} × {verdict}", markup=False)
    console.print()
    order = data_order(len(train_data), settings.batch_size, steps, settings.seed)
    train_with_progress(console, runs, train_data, order, settings.seed)
    with console.status("testing both, and counting the memory of one step"):
        results = [measured(run, test_data, train_data.take(order[0])) for run in runs]

    console.print(results_table(results), _notes(settings, results), "", sep="\n")
    _write_report(replace(settings, steps=steps), title, results)
    console.print(
        f"{settings.out / PLOT} shows both loss curves: on the left by step, where they should lie on each other; on "
        "the right by the seconds that the steps took, where the faster one ends first.\n"
        f"{settings.out / NUMBERS} holds the numbers of every step.",
        soft_wrap=True,
    )


def _settled(options: dict[str, Any]) -> Settings:
    """With a dropout, where none was asked for, that the model can have.

    Raises:
        click.BadParameter: PEFT refuses on experts what was asked for.
    """
    experts = DEMO_MODELS[options["model"]].experts
    if experts and options["method"] != "lora":
        raise click.BadParameter(
            f"PEFT adapts experts, which {options['model']} has, by lora alone", param_hint="'--method'"
        )
    if experts and options["dropout"]:
        raise click.BadParameter(
            f"PEFT has no dropout on experts, which {options['model']} has: it must be 0 there. fastpeft has one, by "
            "fastpeft.patch(model, experts_dropout=p)",
            param_hint="'--dropout'",
        )
    if options["dropout"] is None:
        options = options | {"dropout": 0.0 if experts else _DROPOUT}
    return Settings(**options)


def _checked(settings: Settings) -> tuple[list[Review], list[Review], Path]:
    """The reviews to train on and to test on, and the folder of the model; the output folder is there afterwards.

    Raises:
        click.ClickException: something that the demo needs sooner or later is missing or cannot be used.
    """
    try:
        train, test = split_reviews(read_reviews(settings.data), settings.test_size, settings.seed)
        for package in ("matplotlib", "peft", "transformers"):
            require_package(package, "pip install 'fastpeft[demo]'")
        if settings.method in FOUR_BIT_METHODS:
            require_package("bitsandbytes", "pip install bitsandbytes")
        model_folder = DEMO_MODELS[settings.model].find()
    except MissingPackage as error:
        raise click.ClickException(str(error)) from error
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--test-size'") from error
    try:
        try_out(settings.out, (PLOT, NUMBERS))
    except OSError as error:
        raise click.BadParameter(
            f"no report can be written there ({error}); allowed is a folder, or a path where one can be made.",
            param_hint="'--out'",
        ) from error
    return train, test, model_folder


def contenders(model: nn.Module, settings: Settings, steps: int) -> list[Run]:
    """``model`` with new adapters, about to be trained for ``steps`` steps by PEFT and by fastpeft."""
    source = DEMO_MODELS[settings.model]
    adapted = add_adapters(model, settings.method, settings.rank, settings.dropout, steps, source.experts)
    return side_by_side(adapted, source.learning_rate(settings.method))


def trial_paces(model: nn.Module, settings: Settings, data: Encoded) -> dict[str, float]:
    """The seconds that a step of each contender takes, tried on a copy of ``model``.

    What is trained afterwards does not depend on the trial: it leaves torch's generator as it was.
    """
    with torch.random.fork_rng(devices=[]):
        runs = contenders(copy.deepcopy(model), settings, TRIAL_STEPS)
        order = data_order(len(data), settings.batch_size, TRIAL_STEPS, settings.seed)
        train_together(runs, data, order, settings.seed, lambda run: None)
    return {run.name: run.seconds_per_step() for run in runs}


def side_by_side(model: PeftModel, learning_rate: float) -> list[Run]:
    """A run of PEFT and one of fastpeft, from the same weights."""
    fused = copy.deepcopy(model)
    fastpeft.patch(fused)
    return [new_run("PEFT", model, learning_rate), new_run("fastpeft", fused, learning_rate)]


def train_with_progress(console: Console, runs: Sequence[Run], data: Encoded, order: torch.Tensor, seed: int) -> None:
    """:func:`train_together` with a progress bar for each run."""
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[pace]:.3f} s/step"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars = {run.name: progress.add_task(run.name, total=len(order), loss=float("nan"), pace=0.0) for run in runs}

        def on_step(run: Run) -> None:
            progress.update(bars[run.name], advance=1, loss=run.losses[-1], pace=run.seconds_per_step())

        train_together(runs, data, order, seed, on_step)


def measured(run: Run, test: Encoded, batch: Encoded) -> Result:
    """The run's result: judged on ``test``, its memory counted in one more step on ``batch``."""
    test_loss, test_accuracy = evaluate(run, test, _EVALUATION_BATCH)
    peak, kept = measure_memory(run, batch)
    trainable = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    return Result(
        run.name, run.losses, run.seconds, run.seconds_per_step(), test_loss, test_accuracy, peak, kept, trainable
    )


def _introduction(settings: Settings, train: Sequence[Review], test: Sequence[Review]) -> str:
    positive = sum(review.label for review in (*train, *test)) / (len(train) + len(test))
    return (
        f"learns to tell positive from negative movie reviews (SST-2-style: {len(train):,} sentences to train on, "
        f"{len(test):,} to test on, {positive:.0%} positive).\n"
        f"It is frozen and learns through {METHODS[settings.method]} adapters on {_adapted(settings)}: once by PEFT "
        f"{version('peft')}, once by fastpeft {fastpeft.__version__}.\n"
        f"Both start from the same weights and take turns on the same batches of "
        f"{settings.batch_size} × {settings.length} tokens (threads: {torch.get_num_threads()})."
    )


def _adapted(settings: Settings) -> str:
    names = [name.rpartition(".")[2] for name in DEMO_MODELS[settings.model].experts]
    if not names:
        return f"its linear layers (rank {settings.rank}, dropout {settings.dropout:g})"
    return (
        f"its attention and on {' and '.join(names)} of all {EXPERTS} experts of a layer (rank {settings.rank}, no "
        "dropout, as PEFT has none on experts)"
    )


def _write_report(settings: Settings, title: str, results: Sequence[Result]) -> None:
    versions = {"torch": torch.__version__, "peft": version("peft"), "fastpeft": fastpeft.__version__}
    facts = {key: str(value) for key, value in asdict(settings).items()} | versions
    writers = {
        PLOT: lambda path: draw_losses(path, title, results),
        NUMBERS: lambda path: write_json(path, facts, results),
    }
    try:
        write_together(settings.out, writers)
    except OSError as error:
        raise click.ClickException(f"the report could not be written to {settings.out}: {error}") from error


def _notes(settings: Settings, results: Sequence[Result]) -> str:
    accuracy = results[0].test_accuracy
    standard_error = (accuracy * (1.0 - accuracy) / settings.test_size) ** 0.5
    agreement = (
        "The two draw different dropout masks from the same seed, so their losses agree as those of two seeds do, not "
        "digit by digit; with --dropout 0 they differ by rounding alone."
        if settings.dropout
        else "Without dropout the losses of the two differ by rounding alone, which training amplifies."
    )
    if DEMO_MODELS[settings.model].experts:
        agreement += " A router turns rounding into more where a token stands between two experts."
    repacked = (
        "On some processors bitsandbytes repacks 4-bit weights in an evaluation, and PEFT then takes DoRA's norm from "
        "what it cannot read any more: PEFT's test figures are off there (docs/peft.md).\n"
        if settings.method == "qdora"
        else ""
    )
    return (
        f"{agreement} The accuracy has a standard error of {standard_error:.1%}.\n{repacked}"
        "Peak memory: the weights, the optimizer and all other tensors of one training step. Kept for backward: what "
        "the forward pass leaves for the backward pass, the weights not counted."
    )

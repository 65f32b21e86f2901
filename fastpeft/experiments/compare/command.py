"""``fastpeft compare``: trains every method on one task and writes what was found as rows, tables, plots and a page."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import KINDS
from ..models import MODELS, faster_dtype
from ..options import Number
from ..output import try_out
from ..packages import MissingPackage, require_package
from ..quiet import quieten_libraries
from ..refusals import BadOption
from ..tasks import TASKS, Sizes, Task, load_task
from ..training import Run
from .jobs import GRID, PRESETS, Job, Preset, Training, first, jobs
from .laboratory import Laboratory, open_laboratory, origin
from .methods import METHODS
from .recommend import Budget, recommend
from .report import PAGE, write_report
from .rows import FIELDS, FILE, UNTRAINED, Row, Rows
from .runs import Failed, adapt, execute
from .summary import behind_untrained, summaries
from .tables import terminal_table

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_NAMES = 8  # of classes that are shown


@dataclass(frozen=True)
class Settings:
    """The options of the command line that say what is compared."""

    preset: str
    methods: str | None
    seeds: int | None
    steps: int | None
    data: str
    text: str | None
    text_pair: str | None
    label: str | None
    kind: str | None
    model: str
    dtype: str
    lr: tuple[str, ...]
    grid: str | None
    batch_size: int | None
    length: int | None
    valid_size: int | None
    test_size: int | None
    log_with: str | None
    retry_failed: bool
    folder: Path
    out: Path

    @property
    def plan(self) -> Preset:
        """The preset."""
        return PRESETS[self.preset]


@click.command(context_settings={"show_default": True})
@click.option("--preset", type=click.Choice(list(PRESETS)), default="quick", help="How much of everything.")
@click.option("--list", "listed", is_flag=True, help="Say what each method is, and train nothing.")
@click.option("--methods", metavar="NAME,…", help="These instead of the preset's; all: every one.")
@click.option("--seeds", type=click.IntRange(1, 1000), show_default="the preset's", help="Runs of each method.")
@click.option("--steps", type=click.IntRange(1), show_default="the preset's", help="Training steps of each run.")
@click.option(
    "--data",
    default="reviews",
    metavar="WHAT",
    help=f"What is learnt: {', '.join(TASKS)}; a GLUE task; a CSV, JSON lines or Parquet file; a data set's folder or "
    "name on the hub.",
)
@click.option("--text", metavar="COLUMN", show_default="text", help="Column of a file that holds the text.")
@click.option("--text-pair", metavar="COLUMN", help="Column that holds the second text of a pair.")
@click.option("--label", metavar="COLUMN", show_default="label", help="Column that holds what is to be learnt.")
@click.option("--kind", type=click.Choice(KINDS), show_default="what the columns say", help="The kind of the task.")
@click.option(
    "--model", default="minilm", help=f"What is fine-tuned: {', '.join(MODELS)}; a folder; a name on the hub."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Of frozen weights and of products; what is trained is float32. auto: the faster one here.",
)
@click.option(
    "--lr", metavar="METHOD=RATE", multiple=True, help="Learning rate of a method instead of its own. Repeatable."
)
@click.option(
    "--grid",
    is_flag=False,
    flag_value="all",
    metavar="[SETTING,…]",
    help=f"Vary settings of each method around its own, one at a time, too. Alone: all of {', '.join(GRID)}.",
)
@click.option("--batch-size", type=click.IntRange(1), show_default="the preset's", help="Examples in a step.")
@click.option("--length", type=click.IntRange(4), show_default="the preset's", help="Tokens of an example, at most.")
@click.option("--valid-size", type=click.IntRange(1), show_default="the preset's", help="Examples to choose by.")
@click.option("--test-size", type=click.IntRange(1), show_default="the preset's", help="Examples to test on.")
@click.option("--log-with", type=click.Choice(["tensorboard"]), help="Log losses there, too, under OUT/logs.")
@click.option("--retry-failed", is_flag=True, help="Do the runs again that are on record as failed.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    help="Folder with the archives that hold the built-in tasks' texts.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/compare"),
    help="Folder of the rows and the report; runs on record there are not done again.",
)
@click.option("--report-only", is_flag=True, help="Train nothing: the report anew, from the rows on record.")
@click.option("--recommend", "advise", is_flag=True, help="Train nothing: say which method to take, from the rows.")
@click.option("--max-memory", type=Number(), metavar="MIB", help="For --recommend: of a step at its peak.")
@click.option("--max-seconds", type=Number(), metavar="S", help="For --recommend: of a step.")
@click.option("--max-parameters", type=Number(), help="For --recommend: trained ones.")
def command(
    listed: bool,
    report_only: bool,
    advise: bool,
    max_memory: float | None,
    max_seconds: float | None,
    max_parameters: float | None,
    **options: Any,
) -> None:
    """Compare fine-tuning methods on real data: accuracy, time, memory, size.

    Each method trains the same pre-trained model on the same task; one that fastpeft fuses also in plain PEFT, beside
    it. A run that is on record in OUT is not done again, so a comparison that was stopped goes on where it was. Under
    accelerate launch every run is spread over its processes.
    """
    quieten_libraries()
    _check_what_goes_together(click.get_current_context(), report_only, advise)
    console = Console(highlight=False)
    settings = Settings(**options)
    if listed:
        for name, method in METHODS.items():
            console.print(f"[bold]{name:15}[/bold] {method.line}", soft_wrap=True)
        return
    rows = _rows(settings.out, reads=advise)
    if advise:
        budget = Budget(max_memory and max_memory * 2**20, max_seconds, None, max_parameters)
        try:
            console.print(str(recommend(rows.rows, budget)), markup=False)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        return
    asked = [] if report_only else compare(settings, rows, console)
    if asked is None:
        return  # the first process reports
    if not rows.rows:
        raise click.ClickException(f"{rows.path} holds no rows yet; without --report-only they are made")
    write_report(rows.rows, settings.out)
    every = summaries(rows.rows)
    console.print(terminal_table(every))
    margin = PRESETS.get(rows.rows[-1]["preset"], settings.plan).margin
    for own in behind_untrained(every, margin):
        console.print(f"{own.label} is not {100 * margin:g} points above the untrained model.")
    console.print(
        f"{settings.out / PAGE} shows all of it with pictures; {settings.out / FILE} holds the rows, and table.md, "
        "table.csv and table.tex beside it the table.",
        soft_wrap=True,
    )
    if asked and all(rows.failed(key) for key in asked):
        raise click.ClickException("every run failed")


def _check_what_goes_together(context: click.Context, report_only: bool, advise: bool) -> None:
    given = {
        option.opts[0]
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    }
    budget = {"--max-memory", "--max-seconds", "--max-parameters"}
    if not advise and given & budget:
        raise click.BadParameter("is for --recommend", param_hint=f"'{min(given & budget)}'")
    reads = "--recommend" if advise else "--report-only" if report_only else None
    if reads and (others := given - {reads, "--out"} - budget):
        raise click.BadParameter(f"{reads} reads the rows of --out as they are", param_hint=f"'{min(others)}'")


def _rows(out: Path, reads: bool) -> Rows:
    try:
        if not reads:
            try_out(out, (FILE, PAGE))
        return Rows(out)
    except OSError as error:
        raise click.BadParameter(f"nothing can be written there ({error})", param_hint="'--out'") from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def compare(settings: Settings, rows: Rows, console: Console) -> list[str] | None:
    """Does the jobs that are not on record; the keys of all that were asked for, or None in all but the first process,
    which has the rows.

    Raises:
        click.ClickException: something that was asked for cannot be had; nothing was trained.
    """
    names = _names(settings)
    rates, grid = _rates(settings.lr, names), _grid(settings.grid)
    try:
        for package in (
            "peft",
            "transformers",
            "accelerate",
            "matplotlib",
            "jinja2",
            "scipy",
            "sklearn",
            "tabulate",
            "textalloc",
        ):
            require_package(package, "pip install 'fastpeft[compare]'")
        if any(METHODS[name].four_bit for name in names):
            require_package("bitsandbytes", "pip install bitsandbytes")
        plan = settings.plan
        sizes = Sizes(valid=settings.valid_size or plan.valid, test=settings.test_size or plan.test)
        task = load_task(
            settings.data,
            text=settings.text,
            text_pair=settings.text_pair,
            label=settings.label,
            kind=settings.kind,
            folder=settings.folder,
            sizes=sizes,
        )
        with console.status("loading the model"):
            accelerator = _accelerator(settings)
            console.quiet = not accelerator.is_main_process
            length = settings.length or plan.length
            laboratory, described = open_laboratory(task, settings.model, length, settings.folder, accelerator)
        batch_size, examples = settings.batch_size or plan.batch_size, described["task"]["train"]
        if batch_size > examples:
            raise BadOption("--batch-size", f"there are {examples} examples to train on, fewer than {batch_size}")
    except MissingPackage as error:
        raise click.ClickException(str(error)) from error
    except BadOption as error:
        raise click.BadParameter(error.problem, param_hint=f"'{error.option}'") from error

    training = Training(
        steps=settings.steps or plan.steps,
        evaluations=plan.evaluations,
        batch_size=batch_size,
        length=length,
        dtype=_dtype(settings.dtype),
    )
    wanted = list(jobs(names, settings.seeds or plan.seeds, training, rates, grid))
    if grid and len(wanted) == len(names) * (settings.seeds or plan.seeds):
        raise click.BadParameter(f"{', '.join(names)} have nothing of {', '.join(grid)}", param_hint="'--grid'")
    context = {name: described[name] for name in ("task", "model", "texts")}
    from accelerate.utils import broadcast_object_list

    recorded = [job.key(context) for job in wanted if job.on_record(rows, context, settings.retry_failed)]
    recorded = broadcast_object_list([recorded])[0]  # the first process alone has them, on many machines
    missing = [job for job in wanted if job.key(context) not in recorded]
    _introduce(console, laboratory.task, described, wanted, missing)
    if laboratory.task.higher_is_better and UNTRAINED in names and len(names) > 1:
        console.print(
            f"Each method is expected at least {100 * plan.margin:g} points above the untrained model's score.",
            soft_wrap=True,
        )
    if laboratory.text_is_missing:
        note = f"What the model forgets is not measured: {laboratory.text_is_missing}."
        console.print(note, markup=False, soft_wrap=True)
    if settings.methods:
        _check(missing, laboratory)
    described = {
        "preset": settings.preset,
        **context,
        **origin(accelerator),
    }
    gc.freeze()  # what is here by now is needed to the end; looking through it after each run takes seconds
    try:
        _do(missing, laboratory, rows, described, context, console)
    finally:
        gc.unfreeze()
    accelerator.end_training()
    return [job.key(context) for job in wanted] if accelerator.is_main_process else None


def _names(settings: Settings) -> list[str]:
    if settings.methods is None:
        return first(settings.plan.methods)
    names = list(METHODS) if settings.methods == "all" else [name.strip() for name in settings.methods.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise click.BadParameter(
            f"unknown method '{unknown[0]}'; there are {', '.join(METHODS)}", param_hint="'--methods'"
        )
    return first(names)


def _grid(given: str | None) -> Sequence[str]:
    names = GRID if given == "all" else () if given is None else tuple(name.strip() for name in given.split(","))
    if unknown := [name for name in names if name not in GRID]:
        raise click.BadParameter(f"unknown setting '{unknown[0]}'; there are {', '.join(GRID)}", param_hint="'--grid'")
    return names


def _rates(given: Iterable[str], names: Sequence[str]) -> dict[str, float]:
    rates = {}
    for text in given:
        name, equals, rate = text.partition("=")
        try:
            if not equals:
                raise ValueError("a method and its rate are wanted: METHOD=RATE")
            if name in rates:
                raise ValueError(f"'{name}' has a rate already")
            if name == UNTRAINED:
                raise ValueError("the untrained model has none")
            if name not in names:
                raise ValueError(f"'{name}' is not among the methods compared: {', '.join(names)}")
            rates[name] = float(rate)
            if not 0.0 < rates[name] < float("inf"):
                raise ValueError(f"a learning rate is a number above 0, not '{rate}'")
        except ValueError as error:
            raise click.BadParameter(f"{text}: {error}", param_hint="'--lr'") from error
    return rates


def _dtype(name: str) -> str:
    return str(faster_dtype()).removeprefix("torch.") if name == "auto" else name


def _accelerator(settings: Settings) -> Accelerator:
    from accelerate import Accelerator

    logs = str(settings.out / "logs")
    accelerator = Accelerator(mixed_precision="no", log_with=settings.log_with, project_dir=logs)
    if settings.log_with:
        accelerator.init_trackers("compare")
    return accelerator


def _introduce(
    console: Console, task: Task, described: Mapping[str, Any], wanted: Sequence[Job], missing: Sequence[Job]
) -> None:
    model, sizes = described["model"], described["task"]
    console.print(
        f"[bold]{model['title']}[/bold] ({model['parameters'] / 1e6:.1f} M parameters) learns {task.title}: "
        f"{sizes['train']:,} examples to train on, {sizes['valid']:,} to choose by, {sizes['test']:,} to test on.",
        soft_wrap=True,
    )
    learnt = task.kind if task.classes is None else f"{len(task.classes)} classes ({_some(task.classes)})"
    console.print(f"What is learnt: {learnt}; the score: {task.metric}.", markup=False, soft_wrap=True)
    on_record = len(wanted) - len(missing)
    training = wanted[0].training
    console.print(
        f"{len(wanted)} runs of {training.steps} steps of {training.batch_size} × {training.length} tokens, "
        f"{training.dtype}" + (f"; {on_record} of them are on record already." if on_record else "."),
        soft_wrap=True,
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown}, …"


def _check(missing: Sequence[Job], laboratory: Laboratory) -> None:
    """Whether each method that was asked for by name can be put on the model and computes."""
    two = laboratory.data["train"].take(torch.arange(2))
    for job in {job.name: job for job in missing}.values():
        try:
            run = laboratory.run(job.name, adapt(job, laboratory).model, 0.0, job.training)
            run.forward(two)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise click.BadParameter(
                f"{job.name} cannot train this model: {reason}", param_hint="'--methods'"
            ) from error


def _do(
    missing: Sequence[Job],
    laboratory: Laboratory,
    rows: Rows,
    described: Mapping[str, Any],
    context: Mapping[str, Any],
    console: Console,
) -> None:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not laboratory.accelerator.is_main_process,
    )
    with progress:
        whole = progress.add_task("runs", total=len(missing))
        for job in missing:
            current = progress.add_task(f"{job.method.title}, seed {job.seed}", total=None)

            def on_step(run: Run, job: Job = job, current: Any = current) -> None:
                done = len(run.losses)
                progress.update(current, completed=done, total=job.steps)
                label = f"{job.name}/{run.name}/seed {job.seed}"
                laboratory.accelerator.log({f"{label}/loss": run.losses[-1]}, step=done)

            found = _rows_of(job, laboratory, described, job.key(context), on_step)
            if laboratory.accelerator.is_main_process:
                rows.add(found)
            for row in found:
                if row["failed"]:
                    said = f"{job.method.title}, seed {job.seed}: {row['failed']}"
                    progress.console.print(said, markup=False, soft_wrap=True)
            progress.remove_task(current)
            progress.advance(whole)
    laboratory.accelerator.wait_for_everyone()


def _rows_of(
    job: Job, laboratory: Laboratory, described: Mapping[str, Any], key: str, on_step: Callable[[Run], object]
) -> list[Row]:
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        found, failed = execute(job, laboratory, on_step), None
    except Failed as error:
        found, failed = [dict.fromkeys(FIELDS)], str(error)
        found[0]["engine"] = "torch"
    common = {
        "key": key,
        "date": started,
        **described,
        "method": job.name,
        "title": job.method.title,
        "settings": json.loads(json.dumps(job.method.settings)),
        "training": job.described(),
        "seed": job.seed,
        "measured": job.measured,
        "engines": [row["engine"] for row in found],
        "failed": failed,
    }
    return [common | row for row in found]

"""One job from the model as it comes to its rows: adapted, timed, trained, judged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastpeft

from ..batches import by_length, data_order
from ..encoding import Encoded
from ..files import LANGUAGE
from ..four_bit import four_bit_bytes
from ..memory import held_bytes
from ..metrics import scores
from ..tasks import Task
from ..timing import interleave, ratios, summary
from ..training import Run, autocast, measure_memory, predict, train_together
from .jobs import Job
from .laboratory import Laboratory, computes_in
from .methods import Adapted, Situation
from .rows import FULL, PLAIN, UNTRAINED, Row

if TYPE_CHECKING:
    from accelerate import Accelerator

FUSED = "fastpeft"
PACE_ROUNDS = 15
LATENCY_ROUNDS = 15
EVALUATION_BATCH = 64
MOST_LOSS = 700.0  # whose perplexity is a number


class Failed(Exception):
    """A run that came to nothing; the message is the reason in its row."""


def execute(job: Job, laboratory: Laboratory, on_step: Callable[[Run], object]) -> list[Row]:
    """What the job's runs found, without what describes the comparison: a row for fastpeft and, of a job that is
    measured, one for plain PEFT where fastpeft fuses the method, else one.

    Raises:
        Failed: with the reason.
        MemoryError, RuntimeError: one of several processes came to nothing.
    """
    try:
        return _execute(job, laboratory, on_step)
    except (ValueError, TypeError, NotImplementedError, AttributeError, ArithmeticError, LookupError) as error:
        raise Failed(f"{type(error).__name__}: {_first_line(error)}") from error
    except (MemoryError, RuntimeError) as error:
        if laboratory.accelerator.num_processes > 1:
            raise  # maybe of this process alone: the others wait for it, and their launcher has to end them
        raise Failed(_first_line(error) or type(error).__name__) from error
    finally:
        laboratory.accelerator.free_memory()  # it holds on to each model that it prepared


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _execute(job: Job, laboratory: Laboratory, on_step: Callable[[Run], object]) -> list[Row]:
    adapted = adapt(job, laboratory)
    with autocast(laboratory.accelerator.device, computes_in(job.training)):
        models = contestants(adapted, beside_plain=job.measured)
    runs = [laboratory.run(engine, model, job.learning_rate, job.training) for engine, model in models.items()]
    pace = paces(job, laboratory, models) if job.measured and job.steps else {}
    curves = train(job, laboratory, runs, on_step)
    return [judged(job, laboratory, adapted, run, curves[run.name], pace) for run in runs]


def adapt(job: Job, laboratory: Laboratory) -> Adapted:
    """The base model with what the method trains, in float32, and all else in the training's dtype."""
    dtype: torch.dtype = getattr(torch, job.training.dtype)
    model = laboratory.base(job.seed)
    torch.manual_seed(job.seed)
    if job.method.four_bit:
        model.to(dtype)  # what 4-bit layers compute in
    adapted = job.method.adapt(model, job.method.settings, Situation(laboratory.task.kind, job.steps))
    for module in adapted.model.modules():
        own = list(module.parameters(recurse=False))
        learns = any(parameter.requires_grad for parameter in own)
        for parameter in own:
            if not parameter.is_floating_point():
                continue
            # A norm computes with its scale and its shift at once: one of them trained keeps both in float32.
            kept = parameter.requires_grad or (learns and parameter.dim() == 1)
            parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    return adapted


def contestants(adapted: Adapted, *, beside_plain: bool) -> dict[str, nn.Module]:
    """The model by the engine that computes it: fastpeft, and PEFT beside it, where fastpeft fuses any layer of it."""
    if adapted.engine == PLAIN and adapted.merges:  # prompts are no layers
        fused = copy.deepcopy(adapted.model) if beside_plain else adapted.model
        if fastpeft.patch(fused).fused:
            return {FUSED: fused, PLAIN: adapted.model} if beside_plain else {FUSED: fused}
    return {adapted.engine: adapted.model}


def paces(job: Job, laboratory: Laboratory, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The wall seconds of a step of each contestant and of full fine-tuning, in rounds; of copies of them."""
    batch = laboratory.data["train"].take(torch.arange(job.training.batch_size))
    with torch.random.fork_rng(devices=[]):
        runs = {
            engine: laboratory.run(engine, copy.deepcopy(model), 0.0, job.training) for engine, model in models.items()
        }
        runs[FULL] = laboratory.yardstick(job.training)
        for run in runs.values():
            run.model.train()
        steps = {name: partial(run.step, batch) for name, run in runs.items()}
        samples = interleave(steps, PACE_ROUNDS, agree=partial(longest, laboratory.accelerator))
    return {name: found.wall for name, found in samples.items()}


def longest(accelerator: Accelerator, seconds: float) -> float:
    """The most that any process says."""
    return float(accelerator.gather(torch.tensor([seconds], device=accelerator.device)).max())


def train(
    job: Job, laboratory: Laboratory, runs: list[Run], on_step: Callable[[Run], object]
) -> dict[str, list[dict[str, Any]]]:
    """Trains the runs in turn, and leaves each with what it was when its validation score was best.

    Returns:
        Its curve: what each evaluation found.
    """
    task, valid = laboratory.task, laboratory.data["valid"]
    looks = {math.ceil(job.steps * (i + 1) / job.training.evaluations) for i in range(job.training.evaluations)}
    curves: dict[str, list[dict[str, Any]]] = {run.name: [] for run in runs}
    best: dict[str, tuple[float, dict[str, Tensor]]] = {}

    def look(run: Run) -> None:
        loss, score = judge(run, task, valid)
        recent = run.losses[-max(1, job.steps // job.training.evaluations) :]
        curves[run.name].append(
            {
                "step": len(run.losses),
                "train_loss": sum(recent) / len(recent) if recent else None,
                "valid_loss": loss,
                "valid_score": score[task.metric],
            }
        )
        worth = _worth(score[task.metric], task.higher_is_better)
        if run.name not in best or worth > best[run.name][0]:
            best[run.name] = worth, trained_state(run.plain_model)

    def after(run: Run) -> None:
        if not math.isfinite(run.losses[-1]):
            raise Failed(f"the loss of step {len(run.losses)} is {run.losses[-1]} ({run.name})")
        if len(run.losses) in looks:
            look(run)
            run.model.train()
        on_step(run)

    if not job.steps:
        for run in runs:
            look(run)
    else:
        data = laboratory.data["train"]
        order = data_order(len(data), job.training.batch_size, job.steps, job.seed)
        order = by_length(order, data.attention_mask.sum(1), job.seed)
        train_together(runs, data, order, job.seed, after)
    for run in runs:
        run.plain_model.load_state_dict(best[run.name][1], strict=False)
    return curves


def _worth(score: float, higher_is_better: bool) -> float:
    """More is better; a score that is no number, as the correlation with a constant, is worth least."""
    if math.isnan(score):
        return -math.inf
    return score if higher_is_better else -score


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def judge(run: Run, task: Task, data: Encoded) -> tuple[float, dict[str, float]]:
    """The loss, and the scores by name."""
    loss, logits = predict(run, data, EVALUATION_BATCH)
    if task.kind == LANGUAGE:
        return loss, {task.metric: math.exp(loss) if loss < MOST_LOSS else math.inf}
    return loss, scores(task.metrics, logits, data.labels)


def judged(
    job: Job,
    laboratory: Laboratory,
    adapted: Adapted,
    run: Run,
    curve: list[dict[str, Any]],
    pace: Mapping[str, list[float]],
) -> Row:
    """The fields of a row that the run alone decides."""
    task, training, model = laboratory.task, job.training, run.plain_model
    loss, score = judge(run, task, laboratory.data["test"])
    trainable = 0 if job.name == UNTRAINED else sum(p.numel() for p in model.parameters() if p.requires_grad)
    best = max(curve, key=lambda point: _worth(point["valid_score"], task.higher_is_better))
    before = laboratory.forgotten_before(training)
    row: Row = {
        "engine": run.name,
        "trainable": trainable,
        "total": laboratory.parameters,
        "score": score[task.metric],
        "scores": score,
        "valid_score": best["valid_score"],
        "loss": loss,
        "best_step": best["step"],
        "curve": curve,
        "seconds": {"step": None, "epoch": None, "training": None},
        "samples_per_second": None,
        "against": {},
        "latency": {"before": None, "merged": None},
        "memory": dict.fromkeys(("peak", "kept", "adapter_file", "model", "model_4bit")),
        "forgetting": None if before is None else {"before": before, "after": laboratory.forgotten(run)},
    }
    if job.measured:
        row["latency"] = latency(run, laboratory, adapted.merges and not job.method.four_bit)
        row["memory"] = memory(job, laboratory, adapted, run)
    if pace:
        whole = sum(run.seconds)
        row["samples_per_second"] = job.steps * training.batch_size / whole
        epoch = len(laboratory.data["train"]) / row["samples_per_second"]
        row["seconds"] = {"step": summary(pace[run.name]), "epoch": epoch, "training": whole}
        row["against"] = {
            name: summary(ratios(pace[run.name], pace[name]))
            for name in (FULL, PLAIN)
            if name in pace and name != run.name and job.name != FULL
        }
    return row


def memory(job: Job, laboratory: Laboratory, adapted: Adapted, run: Run) -> dict[str, int | None]:
    """Bytes: of a step at its peak, kept for its backward pass, of the model, of it in 4 bits, of what is saved."""
    model, batch = run.plain_model, laboratory.data["train"].take(torch.arange(job.training.batch_size))
    trained = held_bytes(p for p in model.parameters() if p.requires_grad)
    sizes = {
        "model": held_bytes([*model.parameters(), *model.buffers()]),
        "model_4bit": four_bit_bytes(laboratory.base(job.seed)) + (0 if job.name in (FULL, UNTRAINED) else trained),
    }
    if job.name == UNTRAINED:
        return {"peak": None, "kept": None, "adapter_file": None, **sizes}
    with TemporaryDirectory() as folder:
        adapted.save(Path(folder))
        sizes["adapter_file"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    peak, kept = measure_memory(run, batch)
    return {"peak": peak, "kept": kept, **sizes}


def latency(run: Run, laboratory: Laboratory, merges: bool) -> dict[str, float | None]:
    """Median wall seconds of one example, as trained and as a plain model again, in turns."""
    one = laboratory.data["test"].take(torch.arange(1)).trimmed().to(run.accelerator.device)
    models = {"before": copy.deepcopy(run.plain_model).eval()}
    if merges:
        with suppress(NotImplementedError):
            adapted: Any = copy.deepcopy(run.plain_model)
            models["merged"] = adapted.merge_and_unload().eval()

    def forward(model: nn.Module) -> Callable[[], object]:
        return lambda: model(**one.inputs())

    with torch.inference_mode(), autocast(run.accelerator.device, run.recipe.autocast):
        samples = interleave({name: forward(model) for name, model in models.items()}, LATENCY_ROUNDS)
    found = {name: summary(sample.wall)["median"] for name, sample in samples.items()}
    return {"before": found["before"], "merged": found.get("merged")}

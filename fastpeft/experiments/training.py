"""The training loop: several runs of one model advance together, step by step on the same batches.

On a shared machine the speed drifts by more than what is to be measured. Runs that take turns step by step meet the
same drift, so their times can be compared; runs one after the other cannot.

Through accelerate: under ``accelerate launch`` each process takes its share of every batch, gradients are averaged,
and an evaluation is shared, too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoding import IGNORED, Encoded
from .four_bit import evaluated_as_trained
from .memory import kept_bytes, peak_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Recipe:
    """How a run learns.

    Attributes:
        learning_rate: of AdamW, at its peak.
        steps: after which a linear decay ends at 0; None keeps the rate.
        warmup: the share of the steps in which the rate rises from 0, linearly.
        clip: the norm that the gradient of a step has at most; None leaves it.
        autocast: the dtype of what autocast computes in; None for the model's own.
    """

    learning_rate: float
    steps: int | None = None
    warmup: float = 0.0
    clip: float | None = None
    autocast: torch.dtype | None = None


@dataclass
class Run:
    """A model in training: the loss and the wall seconds of every step so far."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    schedule: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def plain_model(self) -> nn.Module:
        """The model without what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def step(self, batch: Encoded) -> float:
        """Forward, backward, update; the loss before the update, without what a method adds to regularise itself."""
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        trained, loss = self.forward(batch)
        self.accelerator.backward(trained)
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.schedule.step()
        allocate_ranks = getattr(getattr(self.plain_model, "base_model", None), "update_and_allocate", None)
        if allocate_ranks is not None:  # AdaLoRA
            allocate_ranks(len(self.losses))
        self.losses.append(self.accelerator.reduce(loss, "mean").item())
        self.seconds.append(time.perf_counter() - started)
        return self.losses[-1]

    def forward(self, batch: Encoded) -> tuple[Tensor, Tensor]:
        """:func:`losses_on` the batch, on the run's device and under its autocast."""
        batch = batch.to(self.accelerator.device)
        with autocast(self.accelerator.device, self.recipe.autocast):
            return losses_on(self.model, batch)

    def seconds_per_step(self) -> float:
        """The median over the steps so far."""
        return median(self.seconds)


@cache
def accelerator_on_cpu() -> Accelerator:
    """One process, on the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """The context in which a model computes in ``dtype``; of None in its own."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def new_run(name: str, model: nn.Module, recipe: Recipe | float, accelerator: Accelerator | None = None) -> Run:
    """A run of AdamW over the trainable parameters of ``model``.

    Args:
        recipe: a number is a learning rate that stays.
        accelerator: None for one process on the CPU.
    """
    from transformers import get_constant_schedule, get_linear_schedule_with_warmup

    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    accelerator = accelerator or accelerator_on_cpu()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    nothing = torch.empty(0, requires_grad=True)  # an optimizer wants something, of an untrained model too
    optimizer = torch.optim.AdamW(trainable or [nothing], lr=recipe.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = (
        get_constant_schedule(optimizer)
        if recipe.steps is None
        else get_linear_schedule_with_warmup(optimizer, round(recipe.warmup * recipe.steps), recipe.steps)
    )
    return Run(name, model, optimizer, recipe, schedule, accelerator)


def losses_on(model: nn.Module, batch: Encoded) -> tuple[Tensor, Tensor]:
    """What the model is trained on, its own loss in its own dtype; and the task's loss in float32, detached."""
    output = model(**batch.inputs(), labels=batch.labels)
    return output.loss, task_loss(output.logits.detach().float(), batch.labels)


def task_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """The cross-entropy of classes, ``labels [n]``, or of the next tokens, ``labels [n, length]``, with ``IGNORED``
    among them; the squared error of numbers, which are floating. A prompt's logits come first and count for none."""
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels, reduction=reduction)
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction=reduction)
    following = logits[:, -labels.shape[1] : -1]
    return F.cross_entropy(following.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction)


def train_together(
    runs: Sequence[Run], data: Encoded, order: Tensor, seed: int, on_step: Callable[[Run], object]
) -> None:
    """Trains every run on the batches ``order [steps, batch_size]`` of ``data``; ``on_step`` is called after each step.

    Torch's generator is seeded before each step of each run, so that a run draws the dropout that it would draw alone.
    A batch is as long as its longest text. A forward and backward pass of each run goes ahead unrecorded: what
    libraries do once is nobody's time.
    """
    for run in runs:
        run.model.train()
        run.accelerator.backward(run.forward(data.take(_share(run, order[0])).trimmed())[0])
    for number, index in enumerate(order):
        for run in runs:
            batch = data.take(_share(run, index)).trimmed()
            torch.manual_seed(seed + number)
            run.step(batch)
            on_step(run)


def _share(run: Run, index: Tensor) -> Tensor:
    """What this process takes of a batch."""
    return index[run.accelerator.process_index :: run.accelerator.num_processes]


@torch.inference_mode()
def predict(run: Run, data: Encoded, batch_size: int) -> tuple[float, Tensor]:
    """The mean loss of ``data``, and the logits, on the CPU in float32: ``[n, classes]``, ``[n, 1]`` or, of a language
    model, none. Sentences of like length share a batch to save padding.

    A copy of the model is evaluated, which can be changed for that.
    """
    model = evaluated_as_trained(copy.deepcopy(run.plain_model))
    by_length = data.attention_mask.sum(1).argsort()
    language = data.labels.dim() == 2
    found: list[tuple[Tensor, Tensor]] = []
    loss, targets = torch.zeros(2, dtype=torch.float64).unbind()
    for index in _share(run, by_length).split(batch_size):
        batch = data.take(index).trimmed().to(run.accelerator.device)
        with autocast(run.accelerator.device, run.recipe.autocast):
            logits = model(**batch.inputs()).logits.float()
        loss += task_loss(logits, batch.labels, reduction="sum").cpu()
        targets += int((batch.labels[:, 1:] != IGNORED).sum()) if language else len(index)
        if not language:
            found.append((index, logits.cpu()))
    return _gathered(run, len(data), loss, targets, found)


def _gathered(
    run: Run, count: int, loss: Tensor, targets: Tensor, found: list[tuple[Tensor, Tensor]]
) -> tuple[float, Tensor]:
    """What all processes found, in the data's order."""
    from accelerate.utils import gather_object

    parts = gather_object([(loss.item(), targets.item(), found)])
    mean = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    pairs = [pair for part in parts for pair in part[2]]
    if not pairs:
        return mean, torch.empty(0)
    index, logits = (torch.cat(side) for side in zip(*pairs, strict=True))
    ordered = torch.empty(count, *logits.shape[1:])
    ordered[index] = logits
    return mean, ordered


def evaluate(run: Run, data: Encoded, batch_size: int) -> tuple[float, float]:
    """Mean loss and accuracy (a share of 1) of a classifier over ``data``; see :func:`predict`."""
    loss, logits = predict(run, data, batch_size)
    return loss, float((logits.argmax(1) == data.labels).double().mean())


def measure_memory(run: Run, batch: Encoded) -> tuple[int, int]:
    """Peak bytes of one more step on ``batch``, and bytes kept for its backward pass; see memory.py.

    The step changes the model; ``run`` does not record it.
    """
    run.model.train()
    kept = kept_bytes(run.model, lambda: run.forward(batch)[0])
    extra = Run(run.name, run.model, run.optimizer, run.recipe, run.schedule, run.accelerator)
    return peak_bytes(run.model, run.optimizer, lambda: extra.step(batch)), kept

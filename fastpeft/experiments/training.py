"""The training loop: several runs of one model advance together, step by step on the same batches.

On a shared machine the speed drifts by more than what is to be measured. Runs that take turns step by step meet the
same drift, so their times can be compared; runs one after the other cannot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Encoded
from .memory import kept_bytes, peak_bytes


@dataclass
class Run:
    """A model in training: the loss and the wall seconds of every step so far."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: Encoded) -> float:
        """Forward, backward, update; the loss before the update, without what a method adds to regularise itself."""
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        trained, loss = losses_on(self.model, batch)
        trained.backward()
        self.optimizer.step()
        allocate_ranks = getattr(getattr(self.model, "base_model", None), "update_and_allocate", None)
        if allocate_ranks is not None:  # AdaLoRA
            allocate_ranks(len(self.losses))
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - started)
        return self.losses[-1]

    def seconds_per_step(self) -> float:
        """The median over the steps so far."""
        return median(self.seconds)


def new_run(name: str, model: nn.Module, learning_rate: float) -> Run:
    """A run of AdamW over the trainable parameters of ``model``."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Run(name, model, torch.optim.AdamW(trainable, lr=learning_rate))


def losses_on(model: nn.Module, batch: Encoded) -> tuple[Tensor, Tensor]:
    """What the model is trained on, its own loss in its own dtype; and the mean cross-entropy in float32, detached."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    return output.loss, F.cross_entropy(output.logits.detach().float(), batch.labels)


def train_together(
    runs: Sequence[Run], data: Encoded, order: Tensor, seed: int, on_step: Callable[[Run], object]
) -> None:
    """Trains every run on the batches ``order [steps, batch_size]`` of ``data``; ``on_step`` is called after each step.

    Torch's generator is seeded before each step of each run, so that a run draws the dropout that it would draw alone.
    A forward and backward pass of each goes ahead unrecorded: what libraries do once is nobody's time.
    """
    for run in runs:
        run.model.train()
        losses_on(run.model, data.take(order[0]))[0].backward()
    for number, index in enumerate(order):
        batch = data.take(index)
        for run in runs:
            torch.manual_seed(seed + number)
            run.step(batch)
            on_step(run)


@torch.inference_mode()
def evaluate(model: nn.Module, data: Encoded, batch_size: int) -> tuple[float, float]:
    """Mean loss and accuracy (a share of 1) over ``data``; sentences of like length share a batch to save padding."""
    model.eval()
    by_length = data.attention_mask.sum(1).argsort()
    loss, correct = 0.0, 0
    for index in by_length.split(batch_size):
        batch = data.take(index).trimmed()
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        correct += int((logits.argmax(1) == batch.labels).sum())
    return loss / len(data), correct / len(data)


def measure_memory(run: Run, batch: Encoded) -> tuple[int, int]:
    """Peak bytes of one more step on ``batch``, and bytes kept for its backward pass; see memory.py.

    The step changes the model; ``run`` does not record it.
    """
    run.model.train()
    kept = kept_bytes(run.model, lambda: losses_on(run.model, batch)[0])
    extra = Run(run.name, run.model, run.optimizer)
    return peak_bytes(run.model, run.optimizer, lambda: extra.step(batch)), kept

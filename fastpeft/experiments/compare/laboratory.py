"""What all jobs of a comparison share: the task as tokens, the model as it comes, full fine-tuning to compare with."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import provenance
from ..encoding import Encoded, encode
from ..forgetting import forgotten_text, perplexity
from ..memory import held_bytes
from ..models import MODELS, is_causal, load
from ..packages import MissingPackage
from ..refusals import BadOption
from ..tasks import Task
from ..training import Recipe, Run, autocast, new_run
from .jobs import Training
from .methods import METHODS, Situation
from .rows import FULL

if TYPE_CHECKING:
    from accelerate import Accelerator

SPLITS = ("train", "valid", "test")
_BATCH = 32


@dataclass
class Laboratory:
    """The task, the model and what measures them.

    Attributes:
        task, data: what is learnt; its splits ``train``, ``valid``, ``test`` as tokens.
        load: the model as it comes, in float32, its new head drawn by a seed.
        parameters: how many the model has.
        forgotten: the perplexity of a text that is not learnt, of a run's model; None where there is none.
        text_is_missing: why there is none for a model that could foretell it.
    """

    task: Task
    data: Mapping[str, Encoded]
    load: Callable[[int], nn.Module]
    parameters: int
    accelerator: Accelerator
    forgotten: Callable[[Run], float | None]
    text_is_missing: str | None = None
    _base: tuple[int, nn.Module] | None = field(default=None, repr=False)
    _before: list[float | None] = field(default_factory=list, repr=False)
    _yardstick: Run | None = field(default=None, repr=False)

    def base(self, seed: int) -> nn.Module:
        """A copy of the model; the last seed's is kept."""
        if self._base is None or self._base[0] != seed:
            self._base = seed, self.load(seed)
        return copy.deepcopy(self._base[1])

    def yardstick(self, training: Training) -> Run:
        """Full fine-tuning, whose steps the others' take turns with."""
        if self._yardstick is None:
            adapted = METHODS[FULL].adapt(self.base(0), {}, Situation(self.task.kind, training.steps))
            self._yardstick = self.run(FULL, adapted.model, 0.0, training)
        return self._yardstick

    def forgotten_before(self, training: Training) -> float | None:
        """Of the model as it comes."""
        if not self._before:
            self._before.append(self.forgotten(self.run("base", self.base(0), 0.0, training)))
        return self._before[0]

    def run(self, name: str, model: nn.Module, learning_rate: float, training: Training) -> Run:
        """``model`` about to be trained."""
        recipe = Recipe(learning_rate, training.steps, training.warmup, training.clip, computes_in(training))
        return new_run(name, model, recipe, self.accelerator)


def computes_in(training: Training) -> torch.dtype | None:
    """What autocast is told; float32 needs none."""
    dtype: torch.dtype = getattr(torch, training.dtype)
    return None if dtype == torch.float32 else dtype


def open_laboratory(
    task: Task, model_name: str, length: int, folder: Path, accelerator: Accelerator
) -> tuple[Laboratory, dict[str, Any]]:
    """What all jobs share, and what describes it: of its rows ``task`` and ``model``, and ``texts``, a fingerprint.

    Args:
        model_name: what :func:`models.load` loads.
        length: tokens of an example, at most.
        folder: where the archives of the built-in texts are.

    Raises:
        BadOption: the model cannot be had, or does not read so many tokens.
    """

    def model_of(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return load(model_name, task)[0]

    model, tokenizer = load(model_name, task)
    most = min(getattr(model.config, "max_position_embeddings", length), tokenizer.model_max_length)
    if length > most:
        raise BadOption("--length", f"the model reads {most} tokens at most, not {length}")
    data = {name: encode(getattr(task, name), tokenizer, length) for name in SPLITS}
    parameters = sum(p.numel() for p in model.parameters())
    text, missing = None, None
    if is_causal(model.config):
        try:
            text = encode(forgotten_text(task, folder), tokenizer, length)
        except MissingPackage as error:
            missing = str(error)
    laboratory = Laboratory(task, data, model_of, parameters, accelerator, _forgetting(text), missing)
    described = {
        "task": {
            **{name: getattr(task, name) for name in ("name", "title", "kind", "metric", "higher_is_better")},
            **{name: len(data[name]) for name in SPLITS},
        },
        "model": {
            "name": model_name,
            "title": MODELS[model_name].title if model_name in MODELS else type(model).__name__,
            "parameters": parameters,
            "bytes": held_bytes(model.parameters()),
        },
        "texts": _fingerprint(data),
    }
    return laboratory, described


def _fingerprint(data: Mapping[str, Encoded]) -> str:
    digest = hashlib.sha256()
    for name in SPLITS:
        for tensor in (data[name].input_ids, data[name].labels):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _forgetting(text: Encoded | None) -> Callable[[Run], float | None]:
    def measure(run: Run) -> float | None:
        if text is None:
            return None
        with autocast(run.accelerator.device, run.recipe.autocast):
            return perplexity(copy.deepcopy(run.plain_model), text.to(run.accelerator.device), _BATCH)

    return measure


def origin(accelerator: Accelerator) -> dict[str, Any]:
    """What describes machine and program in a row."""
    commit, dirty = provenance.commit()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "machine": provenance.machine(device),
        "versions": provenance.versions(),
        "commit": commit,
        "dirty": dirty,
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
    }

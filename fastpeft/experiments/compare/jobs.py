"""What there is to do: one job for each method, setting and seed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .methods import METHODS, Method
from .rows import FULL, UNTRAINED, Rows, key_of

LEARNING_RATE, STEPS = "learning_rate", "steps"
_FACTORS = {LEARNING_RATE: (1 / 3, 3.0), STEPS: (0.5, 2.0)}
"""Multiples of what every method has that ``--grid`` tries."""

GRID = (*_FACTORS, *dict.fromkeys(name for method in METHODS.values() for name in method.sweeps))
"""What ``--grid`` varies."""


@dataclass(frozen=True)
class Training:
    """What all methods share.

    Attributes:
        steps: of training; batch_size, length: examples in a step, tokens of each.
        warmup: the share of the steps in which the learning rate rises.
        clip: the norm that a gradient has at most.
        evaluations: how often the validation examples are looked at, the last step among them.
        dtype: in which frozen weights are kept and products are computed; what is trained is float32.
    """

    steps: int
    evaluations: int
    batch_size: int
    length: int
    dtype: str
    warmup: float = 0.06
    clip: float = 1.0


@dataclass(frozen=True)
class Preset:
    """A comparison by name: the methods, and how much of everything.

    Attributes:
        margin: by how much each method is expected to beat the untrained model's score, where higher is better.
    """

    title: str
    methods: tuple[str, ...]
    seeds: int
    steps: int
    evaluations: int
    batch_size: int
    length: int
    valid: int
    test: int
    margin: float


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(
        "a first look, within ten minutes on two cores",
        (UNTRAINED, FULL, "head", "top", "lora", "dora", "qlora", "ia3", "houlsby", "bitfit", "loreft"),
        seeds=1,
        steps=60,
        evaluations=3,
        batch_size=32,
        length=32,
        valid=256,
        test=600,
        margin=0.1,
    ),
    "full": Preset(
        "every method, five seeds; hours",
        tuple(METHODS),
        seeds=5,
        steps=200,
        evaluations=5,
        batch_size=32,
        length=48,
        valid=500,
        test=2000,
        margin=0.05,
    ),
}


@dataclass(frozen=True)
class Job:
    """One method, trained once.

    Attributes:
        measured: whether its time and memory are measured, and it is trained in plain PEFT, too, where fastpeft fuses
            it. Other seeds and settings are trained for their scores.
    """

    name: str
    method: Method
    learning_rate: float
    seed: int
    training: Training
    measured: bool = True

    @property
    def steps(self) -> int:
        """The untrained model has none."""
        return 0 if self.name == UNTRAINED else self.training.steps

    def key(self, context: Mapping[str, Any]) -> str:
        """Of its rows; ``context`` is what describes task and model."""
        asked = {"method": self.name, "settings": self.method.settings, "training": self.described(), "seed": self.seed}
        unmeasured = {} if self.measured else {"measured": False}
        return key_of({**asked, **unmeasured, **context})

    def on_record(self, rows: Rows, context: Mapping[str, Any], but_failed: bool = False) -> bool:
        """Whether ``rows`` have all that it would find; one that was measured has its scores, too.

        Args:
            but_failed: one that failed does not count.
        """
        keys = self.key(context), replace(self, measured=True).key(context)
        return any(rows.has(key) and not (but_failed and rows.failed(key)) for key in keys)

    def described(self) -> dict[str, Any]:
        """A row's ``training``."""
        return {**asdict(self.training), "steps": self.steps, "learning_rate": self.learning_rate}


def jobs(
    names: Sequence[str], seeds: int, training: Training, rates: Mapping[str, float], grid: Collection[str] = ()
) -> Iterator[Job]:
    """Seed by seed, so that a comparison that is stopped early has all methods, if fewer seeds.

    Args:
        rates: learning rates by method, instead of its own.
        grid: of :data:`GRID`; each is varied by itself, beside the methods as they are, with the first seed.
    """
    for seed in range(seeds):
        for name in names:
            method = METHODS[name]
            job = Job(name, method, rates.get(name, method.learning_rate), seed, training, measured=seed == 0)
            yield job
            if seed == 0 and name != UNTRAINED:
                own = replace(job, measured=False)
                yield from (variant for variant in _around(own, grid) if variant != own)


def _around(job: Job, grid: Collection[str]) -> Iterator[Job]:
    for name in grid:
        for factor in _FACTORS.get(name, ()):
            if name == LEARNING_RATE:
                yield replace(job, learning_rate=job.learning_rate * factor)
            else:
                yield replace(job, training=replace(job.training, steps=max(1, round(job.training.steps * factor))))
        for value in job.method.sweeps.get(name, ()):
            if value != job.method.settings.get(name):
                yield replace(job, method=job.method.with_settings(**{name: value}))


def first(names: Sequence[str]) -> list[str]:
    """The names once each, the untrained model and full fine-tuning first: the others are compared with them."""
    front = [name for name in (UNTRAINED, FULL) if name in names]
    return front + [name for name in dict.fromkeys(names) if name not in front]

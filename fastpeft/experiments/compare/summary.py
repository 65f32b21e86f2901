"""Rows of runs, over their seeds: what each method reached and what it cost, beside full fine-tuning and plain PEFT."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean, geometric_mean, stdev
from typing import Any

from .rows import FULL, PLAIN, UNTRAINED

Row = Mapping[str, Any]
IN_PLAIN = "in plain PEFT"  # ends the label of such rows
_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """A number over the seeds: mean, standard deviation (of a sample, ddof 1; None for one seed), number of seeds."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Ratio:
    """How a step's seconds compare, round by round: quartiles, each the geometric mean over the seeds."""

    q1: float
    median: float
    q3: float

    def inverse(self) -> Ratio:
        return Ratio(1 / self.q3, 1 / self.median, 1 / self.q1)


def mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def median(ratio: Ratio | None) -> float | None:
    return None if ratio is None else ratio.median


@dataclass(frozen=True)
class Point:
    """Where the runs stood after ``step`` steps, mean over the seeds that recorded it."""

    step: int
    train_loss: float | None
    valid_loss: float | None
    valid_score: float | None


@dataclass(frozen=True)
class Failure:
    """A run without a result, and why."""

    seed: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """The runs of one method with one choice of settings, training and engine on one task, model and machine.

    What nobody measured is None; so is all that is a number where every run failed.

    Attributes:
        label: the method's title; what tells it from others of the same title is added.
        by_seed: the score of each seed that has one.
        failures: the runs that have none.
        scores: the task's other metrics, by name.
        trainable, total: numbers of parameters.
        step_seconds, epoch_seconds, training_seconds, latency, merged_latency: seconds.
        peak, kept, adapter_file, model_bytes, model_4bit: bytes; the model's as trained, and with a 4-bit base.
        forgetting: perplexity on other text after training over that before.
        gap: score minus full fine-tuning's, in :attr:`unit`; negative is worse where higher is better.
        gap_interval: 95 % of the gap, by :func:`difference_interval`.
        retention: score over full fine-tuning's; the other way round where lower is better. Above 1 beats it.
        reduction: parameters that full fine-tuning trains for each one trained here.
        against_full: a step's seconds over full fine-tuning's.
        speed_up: plain PEFT's seconds for a step over this one's.
    """

    task: Mapping[str, Any]
    texts: str
    model: Mapping[str, Any]
    machine: str
    threads: int
    method: str
    label: str
    settings: Mapping[str, Any]
    training: Mapping[str, Any]
    engine: str
    by_seed: Mapping[int, float]
    failures: tuple[Failure, ...]
    trainable: int | None
    total: int | None
    score: Spread | None
    scores: Mapping[str, Spread]
    valid_score: Spread | None
    loss: Spread | None
    best_step: Spread | None
    curve: tuple[Point, ...]
    step_seconds: float | None
    epoch_seconds: float | None
    training_seconds: float | None
    samples_per_second: float | None
    peak: float | None
    kept: float | None
    adapter_file: float | None
    model_bytes: float | None
    model_4bit: float | None
    latency: float | None
    merged_latency: float | None
    forgetting: float | None
    against_full: Ratio | None
    speed_up: Ratio | None
    gap: float | None = None
    gap_interval: tuple[float, float] | None = None
    retention: float | None = None
    reduction: float | None = None

    @property
    def higher_is_better(self) -> bool:
        return bool(self.task["higher_is_better"])

    @property
    def unit(self) -> float:
        """What a shown score is a multiple of: such as rise to 1 are shown in percent, others as they are."""
        return 0.01 if self.higher_is_better else 1.0

    @property
    def share(self) -> float | None:
        """Trainable parameters over all."""
        return None if self.trainable is None or not self.total else self.trainable / self.total

    @property
    def comparison(self) -> str:
        """The same for summaries that can be compared: one task and its texts, one model, one machine."""
        return _key(self.task, self.texts, self.model, self.machine, self.threads)


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """The runs by task, model, machine, method, settings, training and engine, in the order in which they came.

    A run whose time and memory were not measured is the same on every machine, so it counts on all that measured any.
    Of several rows of one seed the last one counts, of one that was measured and others that one. A fused method's runs
    in plain PEFT follow its own. What a method is compared with is full fine-tuning trained in the same way but for the
    learning rate, or else any; of several the one with the most seeds, the first of these.
    """
    groups: dict[tuple[str, bool], dict[int, Row]] = {}
    for row in _on_each_machine(list(rows)):
        seeds = groups.setdefault((_choice(row), row["engine"] == PLAIN), {})
        if row["measured"] or not seeds.get(row["seed"], row)["measured"]:
            seeds[row["seed"]] = row
    choices = list(dict.fromkeys(choice for choice, _ in groups))
    ordered = [groups[choice, plain] for choice in choices for plain in (False, True) if (choice, plain) in groups]
    found = _with_labels([_summary(list(group.values())) for group in ordered])
    return [own for group in comparisons(found) for own in _beside_full(group)]


def comparisons(every: Iterable[Summary]) -> list[list[Summary]]:
    """What can be compared with each other, in one list each."""
    by_key: dict[str, list[Summary]] = {}
    for own in every:
        by_key.setdefault(own.comparison, []).append(own)
    return list(by_key.values())


def usual(every: Iterable[Summary]) -> list[Summary]:
    """Of each method and engine the variant with the most seeds, the first of these: not what a grid tried around."""
    chosen: dict[tuple[str, str, str], Summary] = {}
    for own in every:
        key = (own.comparison, own.method, own.engine)
        if key not in chosen or len(own.by_seed) > len(chosen[key].by_seed):
            chosen[key] = own
    return list(chosen.values())


def without_plain(every: Sequence[Summary]) -> list[Summary]:
    """All but the runs in plain PEFT of what fastpeft ran as well: the same method, only slower."""
    fused = {_variant(own) for own in every if own.engine != PLAIN and own.score is not None}
    return [own for own in every if own.engine != PLAIN or _variant(own) not in fused]


def behind_untrained(every: Iterable[Summary], margin: float) -> list[Summary]:
    """The trained methods, in their usual variants, that are not ``margin`` above the untrained model's score, where
    higher is better."""
    behind = []
    for group in comparisons(own for own in usual(every) if own.higher_is_better and own.score is not None):
        untrained = next((mean(own.score) for own in group if own.method == UNTRAINED), None)
        if untrained is not None:
            trained = (own for own in group if own.method != UNTRAINED)
            behind += [own for own in trained if (mean(own.score) or 0.0) < untrained + margin]
    return behind


def difference_interval(own: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap of the mean difference: over the seeds in common, unpaired if these are less than 2.

    None where a side has fewer than two seeds. The same numbers give the same interval.
    """
    import numpy as np
    from scipy.stats import bootstrap

    def difference(first: Any, second: Any, axis: int) -> Any:
        return np.mean(first, axis=axis) - np.mean(second, axis=axis)

    shared = sorted(own.keys() & other.keys())
    samples: tuple[list[float], ...]
    statistic: Callable[..., Any]
    if len(shared) >= 2:
        samples, statistic = ([own[seed] - other[seed] for seed in shared],), np.mean
    elif min(len(own), len(other)) >= 2:
        samples, statistic = (list(own.values()), list(other.values())), difference
    else:
        return None
    interval = bootstrap(
        samples, statistic, n_resamples=_RESAMPLES, confidence_level=_LEVEL, method="percentile", rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _on_each_machine(rows: Sequence[Row]) -> list[Row]:
    """The rows, one that was not measured as often as there are machines with rows of its task and model that were."""
    machines: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["measured"]:
            own = machines.setdefault(_task_and_model(row), {})
            own.setdefault(_key(row["machine"]["name"], row["threads"]), row)
    found: list[Row] = []
    for row in rows:
        places = machines.get(_task_and_model(row), {}).values()
        if row["measured"] or not places:
            found.append(row)
        else:
            found += [{**row, "machine": place["machine"], "threads": place["threads"]} for place in places]
    return found


def _task_and_model(row: Row) -> str:
    return _key(row["task"], row["texts"], row["model"])


def _key(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True, default=str)


def _choice(row: Row) -> str:
    """All that tells a group from others but the engine."""
    training = {name: value for name, value in row["training"].items() if name != "seed"}
    machine = row["machine"]["name"]
    return _key(_task_and_model(row), machine, row["threads"], row["method"], row["settings"], training)


def _variant(own: Summary) -> str:
    return _key(own.comparison, own.method, own.settings, own.training)


def _summary(rows: Sequence[Row]) -> Summary:
    first = rows[-1]
    done = [row for row in rows if row["failed"] is None and row["score"] is not None]
    failures = (
        Failure(row["seed"], row["failed"] or "its score is no finite number") for row in rows if row not in done
    )
    last = done[-1] if done else None
    ratios = {name: _ratio([(row["against"] or {}).get(name) for row in done]) for name in ("full", "peft")}

    def average(read: Callable[[Row], Any]) -> float | None:
        return mean(_spread(map(read, done)))

    def memory(name: str) -> float | None:
        return average(lambda row: row["memory"][name])

    return Summary(
        task=first["task"],
        texts=first["texts"],
        model=first["model"],
        machine=first["machine"]["name"],
        threads=first["threads"],
        method=first["method"],
        label=first["title"],
        settings=first["settings"],
        training={name: value for name, value in first["training"].items() if name != "seed"},
        engine=first["engine"],
        by_seed={row["seed"]: row["score"] for row in done},
        failures=tuple(failures),
        trainable=last["trainable"] if last else None,
        total=last["total"] if last else None,
        score=_spread(row["score"] for row in done),
        scores={name: spread for name in (last["scores"] if last else ()) if (spread := _metric(done, name))},
        valid_score=_spread(row["valid_score"] for row in done),
        loss=_spread(row["loss"] for row in done),
        best_step=_spread(row["best_step"] for row in done),
        curve=_curve(done),
        step_seconds=average(lambda row: (row["seconds"]["step"] or {}).get("median")),
        epoch_seconds=average(lambda row: row["seconds"]["epoch"]),
        training_seconds=average(lambda row: row["seconds"]["training"]),
        samples_per_second=average(lambda row: row["samples_per_second"]),
        peak=memory("peak"),
        kept=memory("kept"),
        adapter_file=memory("adapter_file"),
        model_bytes=memory("model"),
        model_4bit=memory("model_4bit"),
        latency=average(lambda row: row["latency"]["before"]),
        merged_latency=average(lambda row: row["latency"]["merged"]),
        forgetting=average(lambda row: row["forgetting"] and row["forgetting"]["after"] / row["forgetting"]["before"]),
        against_full=ratios["full"],
        speed_up=ratios["peft"] and ratios["peft"].inverse(),
    )


def _metric(rows: Sequence[Row], name: str) -> Spread | None:
    return _spread(row["scores"].get(name) for row in rows)


def _spread(values: Iterable[Any]) -> Spread | None:
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return None
    return Spread(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None, len(numbers))


def _ratio(quartiles: Iterable[Mapping[str, float] | None]) -> Ratio | None:
    found = [each for each in quartiles if each is not None]
    if not found:
        return None
    return Ratio(*(geometric_mean(each[name] for each in found) for name in ("q1", "median", "q3")))


def _curve(rows: Sequence[Row]) -> tuple[Point, ...]:
    points: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        for point in row["curve"]:
            points.setdefault(point["step"], []).append(point)

    def average(step: int, name: str) -> float | None:
        return mean(_spread(point[name] for point in points[step]))

    names = ("train_loss", "valid_loss", "valid_score")
    return tuple(Point(step, *(average(step, name) for name in names)) for step in sorted(points))


def _with_labels(every: Sequence[Summary]) -> list[Summary]:
    """Each with a label of its own: variants of a method are named by what they have in other ways than most."""
    fused = {_variant(own) for own in every if own.engine != PLAIN}
    variants: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = {}
    for own in every:
        choices = variants.setdefault((own.comparison, own.method, own.engine == PLAIN), [])
        choices.append({**own.training, **own.settings})

    def label(own: Summary) -> str:
        alike = variants[own.comparison, own.method, own.engine == PLAIN]
        differing = {name: value for name in dict.fromkeys(chain(*alike)) if (value := _unusual(name, own, alike))}
        title = own.label
        if differing:
            title = f"{own.method}: {', '.join(f'{name} = {value}' for name, value in differing.items())}"
        return f"{title} {IN_PLAIN}" if own.engine == PLAIN and _variant(own) in fused else title

    return [replace(own, label=label(own)) for own in every]


def _unusual(name: str, own: Summary, alike: Sequence[Mapping[str, Any]]) -> str | None:
    """The value of a setting in words, where most of ``alike`` (the first, in a tie) have another."""
    values = [words_of(one.get(name)) for one in alike]
    value = words_of({**own.training, **own.settings}.get(name))
    return value if value != Counter(values).most_common(1)[0][0] else None


def words_of(value: Any) -> str:
    """The value of a setting."""
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "default" if value is None else str(value)


def _beside_full(group: Sequence[Summary]) -> list[Summary]:
    every = [own for own in group if own.method == FULL and own.score is not None]
    return [_beside(own, [full for full in every if _budget(full) == _budget(own)] or every) for own in group]


def _budget(own: Summary) -> str:
    return _key({name: value for name, value in own.training.items() if name != "learning_rate"})


def _beside(own: Summary, candidates: Sequence[Summary]) -> Summary:
    full = max(candidates, key=lambda one: len(one.by_seed), default=None)
    if own.score is None or full is None or full.score is None:
        return own
    interval = None if own is full else difference_interval(own.by_seed, full.by_seed)
    value, base = (own.score.mean, full.score.mean) if own.higher_is_better else (full.score.mean, own.score.mean)
    return replace(
        own,
        gap=(own.score.mean - full.score.mean) / own.unit,
        gap_interval=interval and (interval[0] / own.unit, interval[1] / own.unit),
        retention=value / base if base > 0 else None,
        reduction=full.trainable / own.trainable if full.trainable and own.trainable else None,
        against_full=Ratio(1.0, 1.0, 1.0) if own is full else own.against_full,
    )

"""What the rows of a comparison are summed up to, against plain formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compare_rows import FUSED, LANGUAGE, METHODS, MODEL, ODD, TRAINING, comparison, failed, row

from fastpeft.experiments.compare import words
from fastpeft.experiments.compare.summary import Summary, behind_untrained, difference_interval, summaries

SEEDS = 3


def by_label(every: list[Summary]) -> dict[str, Summary]:
    return {own.label: own for own in every}


def scores(rows: list[dict[str, Any]], method: str, engine: str) -> np.ndarray:
    return np.array([r["score"] for r in rows if (r["method"], r["engine"]) == (method, engine)])


def test_mean_and_deviation_are_those_of_the_seeds() -> None:
    rows = comparison(SEEDS)
    found = by_label(summaries(rows))
    assert len(found) == len(METHODS) + len(FUSED)
    for method, engine, label in (("lora", "fastpeft", "LoRA, r = 16"), ("lora", "peft", "LoRA, r = 16 in plain PEFT")):
        values = scores(rows, method, engine)
        spread = found[label].score
        assert spread is not None
        assert spread.count == SEEDS
        assert spread.mean == pytest.approx(values.mean(), rel=1e-15)
        assert spread.deviation == pytest.approx(values.std(ddof=1), rel=1e-12)


def test_what_is_set_against_full_fine_tuning() -> None:
    rows = comparison(SEEDS)
    own, full = by_label(summaries(rows))["DoRA, r = 16"], scores(rows, "full", "torch")
    values = scores(rows, "dora", "fastpeft")
    assert own.gap == pytest.approx(100 * (values.mean() - full.mean()), rel=1e-12)
    assert own.retention == pytest.approx(values.mean() / full.mean(), rel=1e-12)
    assert own.share == METHODS["dora"][2] / own.total
    assert own.reduction == METHODS["full"][2] / METHODS["dora"][2]
    assert own.against_full is not None
    assert own.against_full.median == pytest.approx(METHODS["dora"][4], rel=1e-12)
    assert own.speed_up is not None
    assert own.speed_up.median == pytest.approx(1.6, rel=1e-12)
    assert own.speed_up.q1 == pytest.approx(1.6 / 1.06, rel=1e-12)  # the slow quarter of PEFT's ratio is the fast one
    # Of three paired differences 1 in 27 resamples is all of the least: the 2.5 % quantile is the least itself.
    differences = values - full
    assert own.gap_interval == pytest.approx((100 * differences.min(), 100 * differences.max()), rel=1e-12)


def test_the_interval_is_paired_by_seed_where_seeds_are_shared() -> None:
    base = {seed: float(seed) for seed in range(6)}
    assert difference_interval({seed: value + 0.5 for seed, value in base.items()}, base) == (0.5, 0.5)
    unpaired = difference_interval({seed + 10: value + 0.5 for seed, value in base.items()}, base)
    assert unpaired is not None
    assert unpaired[0] < 0 < 0.5 < unpaired[1]
    assert unpaired == difference_interval({seed + 10: value + 0.5 for seed, value in base.items()}, base)
    assert difference_interval({0: 1.0}, base) is None


def test_the_interval_is_the_bootstrap_s() -> None:
    """Percentiles of means of resamples, drawn here by other random numbers: apart by the noise of 2000 resamples."""
    draw = np.random.default_rng(5)
    differences = draw.normal(size=8)
    found = difference_interval(dict(enumerate(differences)), dict.fromkeys(range(8), 0.0))
    assert found is not None
    many = [np.percentile(draw.choice(differences, (2000, 8)).mean(axis=1), (2.5, 97.5)) for _ in range(50)]
    for value, own in zip(found, np.transpose(many), strict=True):
        assert own.min() <= value <= own.max()


def test_retention_where_lower_is_better() -> None:
    rows = [row(method, seed, task=LANGUAGE) for method in ("full", "bitfit") for seed in range(2)]
    full, own = summaries(rows)
    means = [np.mean([r["score"] for r in rows if r["method"] == method]) for method in ("full", "bitfit")]
    assert own.retention == pytest.approx(means[0] / means[1], rel=1e-12)
    assert own.gap == pytest.approx(means[1] - means[0], rel=1e-12)
    assert own.forgetting == pytest.approx((20 + METHODS["bitfit"][4]) / 20, rel=1e-12)
    assert full.retention == 1.0


def test_without_full_fine_tuning_nothing_is_set_against_it() -> None:
    (own,) = summaries([row("ia3")])
    assert (own.gap, own.gap_interval, own.retention, own.reduction) == (None, None, None, None)
    assert own.score is not None


def test_runs_that_were_not_measured_count_on_every_machine_that_measured() -> None:
    other = {**row("full")["machine"], "name": "another-machine"}
    costs = ("seconds", "samples_per_second", "latency", "memory")
    free = {name: dict.fromkeys(row("ia3")[name]) if name != "samples_per_second" else None for name in costs}
    later = [row(method, seed, measured=False, **free) for method in ("full", "ia3") for seed in (1, 2)]
    first = [row(method, 0) for method in ("full", "ia3")] + [row("full", 0, machine=other)]
    found = summaries(first + later)
    assert [(own.machine, own.method, sorted(own.by_seed)) for own in found] == [
        ("a-machine", "full", [0, 1, 2]),
        ("a-machine", "ia3", [0, 1, 2]),
        ("another-machine", "full", [0, 1, 2]),
        ("another-machine", "ia3", [1, 2]),
    ]
    assert found[1].step_seconds == row("ia3")["seconds"]["step"]["median"]
    assert found[3].step_seconds is None
    assert len(summaries(later)) == 2  # where nothing was measured, on their own machine


def test_who_is_not_above_the_untrained_model_by_a_margin() -> None:
    rows = [row(method) for method in ("none", "full", "prompt", "ia3")]
    for each, score in zip(rows, (0.5, 0.9, 0.59, 0.61), strict=True):
        each["score"] = score
    assert [own.method for own in behind_untrained(summaries(rows), 0.1)] == ["prompt"]
    assert behind_untrained(summaries(rows[1:]), 0.1) == []
    assert behind_untrained(summaries([row(method, task=LANGUAGE) for method in ("none", "prompt")]), 0.1) == []


def test_one_seed_has_no_spread() -> None:
    _, own = summaries([row("full"), row("ia3")])
    assert own.score is not None
    assert own.score.deviation is None
    assert own.gap_interval is None
    assert own.gap is not None


def test_only_failed_runs() -> None:
    (own,) = summaries([failed("lora", seed, ODD) for seed in range(2)])
    assert own.score is None
    assert (own.trainable, own.peak, own.retention, own.curve) == (None, None, None, ())
    assert words.failures(own) == f"{ODD} (seeds 0, 1)"
    diverged = {**row("lora"), "score": None}
    assert "no finite number" in words.failures(*summaries([diverged]))


def test_a_seed_that_ran_again_counts_once() -> None:
    (own,) = summaries([failed("lora", 0, ODD), row("lora", 0), {**row("lora", 1), "score": 0.1}, row("lora", 1)])
    assert own.failures == ()
    assert own.by_seed == {0: row("lora", 0)["score"], 1: row("lora", 1)["score"]}


def test_curves_are_means_over_the_seeds() -> None:
    rows = [row("lora", seed) for seed in range(SEEDS)]
    (own,) = summaries(rows)
    assert [point.step for point in own.curve] == [point["step"] for point in rows[0]["curve"]]
    for i, point in enumerate(own.curve):
        assert point.valid_loss == pytest.approx(np.mean([r["curve"][i]["valid_loss"] for r in rows]), rel=1e-12)


def test_groups_are_told_apart() -> None:
    other_machine = {**row("lora")["machine"], "name": "another"}
    rows = [
        row("lora"), row("lora", task=LANGUAGE), row("lora", model={**MODEL, "name": "other"}),
        row("lora", settings={"rank": 4}), row("lora", training={**TRAINING, "learning_rate": 3e-3}),
        row("lora", engine="peft"), row("lora", threads=4), row("lora", machine=other_machine),
    ]  # fmt: skip
    assert [len(own.by_seed) for own in summaries(rows)] == [1] * len(rows)


def test_full_fine_tuning_of_the_same_length_is_the_measure() -> None:
    long = {**TRAINING, "steps": 1200}
    rows = [row("full"), row("full", training=long, score=0.95), row("lora"), row("lora", training=long)]
    short, longer = (own for own in summaries([*rows, row("none")]) if own.method == "lora")
    assert short.retention == pytest.approx(row("lora")["score"] / row("full")["score"], rel=1e-12)
    assert longer.retention == pytest.approx(row("lora")["score"] / 0.95, rel=1e-12)
    *_, untrained = summaries([*rows, row("none")])
    assert untrained.retention == pytest.approx(row("none")["score"] / row("full")["score"], rel=1e-12)

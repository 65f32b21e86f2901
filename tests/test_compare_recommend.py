"""Which method is recommended under limits: rows made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from compare_rows import LANGUAGE, METHODS, ODD, failed, quartiles, row

from fastpeft.experiments.compare.recommend import Budget, recommend


def one(method: str, score: float, peak: float = 100.0, step: float = 1.0, **changed: Any) -> dict[str, Any]:
    """A row that a recommendation is made of: what it weighs, by hand."""
    base = row(method, **changed)
    seconds = {**base["seconds"], "step": quartiles(step), "training": 100 * step}
    return {**base, "score": score, "memory": {**base["memory"], "peak": peak}, "seconds": seconds}


def test_the_best_score_is_taken_where_it_is_clear() -> None:
    found = recommend([one("full", 0.95), one("lora", 0.90, step=0.1), one("none", 0.99)], Budget())
    assert found.choice.method == "full"
    assert found.runner_up is not None
    assert found.runner_up.method == "lora"
    assert found.too_large == {}
    assert str(found).startswith("full fine-tuning: the best of all that fits")


def test_of_those_within_noise_the_cheapest_is_taken() -> None:
    rows = [one("full", score, peak=400, seed=seed) for seed, score in enumerate((0.90, 0.92))]
    rows += [one("lora", score, seed=seed) for seed, score in enumerate((0.905, 0.909))]
    rows += [one("ia3", score, peak=50, seed=seed) for seed, score in enumerate((0.80, 0.81))]
    found = recommend(rows, Budget())
    assert found.choice.method == "lora"
    assert found.runner_up is not None
    assert found.runner_up.method == "full"
    assert "full fine-tuning is ahead by no more than noise" in found.why
    # Once the best is ahead with every seed, that is no noise.
    rows[:2] = [one("full", 0.91, peak=400, seed=seed) for seed in range(2)]
    assert recommend(rows, Budget()).choice.method == "full"


def test_one_seed_is_as_sure_as_its_test_examples_are_many() -> None:
    rows = [one("full", 0.910, peak=400), one("lora", 0.905)]
    few, many = ([{**each, "task": {**each["task"], "test": count}} for each in rows] for count in (1_000, 100_000))
    assert recommend(few, Budget()).choice.method == "lora"
    assert recommend(many, Budget()).choice.method == "full"


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(), "full"),
        (Budget(peak=400), "full"),
        (Budget(peak=399), "lora"),
        (Budget(peak=100), "ia3"),
        (Budget(step_seconds=1.5), "lora"),
        (Budget(training_seconds=60), "ia3"),
        (Budget(trainable=20_000), "ia3"),
        (Budget(adapter_file=4 * 590_594 + 2000), "lora"),
        (Budget(peak=399, trainable=20_000), "ia3"),
    ],
)
def test_limits(budget: Budget, expected: str) -> None:
    rows = [one("full", 0.95, 400, 2.0), one("lora", 0.93, 200, 1.0), one("ia3", 0.90, 100, 0.5)]
    found = recommend(rows, budget)
    assert found.choice.method == expected
    assert set(found.too_large) == {
        METHODS[r["method"]][0] for r in rows[: [r["method"] for r in rows].index(expected)]
    }
    assert all(label in found.why for label in found.too_large)


def test_limits_that_nothing_keeps() -> None:
    with pytest.raises(ValueError, match=r"budget: nothing fits, LoRA, r = 16: peak memory 100 B, limit 50 B"):
        recommend([one("lora", 0.9)], Budget(peak=50))
    unknown = one("lora", 0.9)
    unknown["memory"] = {**unknown["memory"], "peak": None}
    with pytest.raises(ValueError, match="peak memory was not measured"):
        recommend([unknown], Budget(peak=50))


@pytest.mark.parametrize("rows", [[], [row("none")], [failed("lora", 0, ODD)]])
def test_no_rows_to_recommend_from(rows: list[Mapping[str, Any]]) -> None:
    with pytest.raises(ValueError, match="rows: there is none of a trained method"):
        recommend(rows, Budget())


def test_one_recommendation_for_one_comparison() -> None:
    with pytest.raises(ValueError, match="rows: they are of 2 comparisons"):
        recommend([row("lora"), row("lora", task=LANGUAGE)], Budget())


def test_plain_peft_is_recommended_only_where_fastpeft_failed() -> None:
    found = recommend([one("lora", 0.90), one("lora", 0.99, engine="peft")], Budget())
    assert (found.choice.engine, found.runner_up) == ("fastpeft", None)
    found = recommend([failed("lora", 0, ODD), one("lora", 0.99, engine="peft")], Budget())
    assert found.choice.engine == "peft"

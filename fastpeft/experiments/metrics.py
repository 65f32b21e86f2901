"""What a model's answers are judged by; scikit-learn and SciPy compute it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .packages import require_package


@dataclass(frozen=True)
class Metric:
    """``of``: what is judged, "classes", "numbers" or "tokens"."""

    title: str
    of: str
    higher_is_better: bool = True


METRICS = {
    "accuracy": Metric("accuracy", "classes"),
    "f1": Metric("F1 of the class 1", "classes"),
    "macro_f1": Metric("mean of the classes' F1", "classes"),
    "matthews": Metric("Matthews' correlation", "classes"),
    "pearson": Metric("Pearson's correlation", "numbers"),
    "spearman": Metric("Spearman's correlation", "numbers"),
    "perplexity": Metric("perplexity", "tokens", higher_is_better=False),
}


def scores(names: Sequence[str], predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Each metric of ``names``, keys of :data:`METRICS`, over ``n`` examples.

    Args:
        predictions: logits ``[n, classes]``, or numbers ``[n]`` or ``[n, 1]``.
        labels: classes, int64 ``[n]``, or numbers, float32 ``[n]``.

    Returns:
        NaN where a metric is not defined: a prediction is not finite, or all numbers are equal.

    Raises:
        MissingPackage: scikit-learn or SciPy is not installed.
        ValueError: a metric of tokens; :func:`fastpeft.experiments.forgetting.perplexity` computes it.
    """
    for module, package in (("sklearn", "scikit-learn"), ("scipy", "scipy")):
        require_package(module, f"pip install {package}")
    if any(METRICS[name].of == "tokens" for name in names):
        raise ValueError(f"{', '.join(names)}: a metric of tokens does not follow from one prediction a text")
    if not predictions.isfinite().all():
        return dict.fromkeys(names, math.nan)
    true = labels.cpu().numpy()
    numbers = predictions.detach().cpu().double()
    classes = numbers.argmax(1).numpy() if numbers.dim() == 2 else None
    return {
        name: float(_score(name, true, numbers.flatten().numpy() if METRICS[name].of == "numbers" else classes))
        for name in names
    }


def _score(name: str, true: Any, predicted: Any) -> float:
    from scipy import stats
    from sklearn import metrics

    if name == "accuracy":
        return metrics.accuracy_score(true, predicted)
    if name == "f1":
        return metrics.f1_score(true, predicted, zero_division=0.0)
    if name == "macro_f1":
        return metrics.f1_score(true, predicted, average="macro", zero_division=0.0)
    if name == "matthews":
        return metrics.matthews_corrcoef(true, predicted)
    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)  # the NaN says it
        return correlation(true, predicted).statistic

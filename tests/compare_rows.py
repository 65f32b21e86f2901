"""Rows of runs that never were: numbers from a seeded generator, in the form that ``fastpeft compare`` writes."""

from __future__ import annotations

from typing import Any

import numpy as np

TASK = {
    "name": "reviews",
    "kind": "classification",
    "metric": "accuracy",
    "higher_is_better": True,
    "train": 8000,
    "valid": 1000,
    "test": 2000,
    "title": "movie reviews",
}
LANGUAGE = {
    **TASK,
    "name": "prose",
    "kind": "language",
    "metric": "perplexity",
    "higher_is_better": False,
    "title": "prose",
}
MODEL = {"name": "minilm", "title": "MiniLM-L6, a BERT encoder", "parameters": 22_700_000, "bytes": 90_800_000}
TRAINING = {
    "steps": 600,
    "batch_size": 32,
    "length": 48,
    "learning_rate": 1e-3,
    "warmup": 0.06,
    "dtype": "float32",
}
ODD = "out of memory: 50% of a_b & {c} #1 $2 ~ ^ \\ <d> | 12 GiB"  # what tables have to escape
# Method: title, settings, trainable parameters, about the accuracy, about the step over full fine-tuning's.
METHODS: dict[str, tuple[str, dict[str, Any], int, float, float]] = {
    "none": ("untrained", {}, 0, 0.50, 1.0),
    "full": ("full fine-tuning", {}, 22_713_602, 0.911, 1.0),
    "top": ("top layer", {"layers": 1}, 1_775_618, 0.874, 0.45),
    "lora-r8": ("LoRA, r = 8", {"rank": 8, "targets": "all-linear"}, 295_682, 0.899, 0.71),
    "lora": ("LoRA, r = 16", {"rank": 16, "targets": "all-linear"}, 590_594, 0.902, 0.72),
    "lora-r32": ("LoRA, r = 32", {"rank": 32, "targets": "all-linear"}, 1_180_418, 0.904, 0.75),
    "lora-qv": ("LoRA, q and v", {"rank": 16, "targets": "default"}, 147_458, 0.893, 0.66),
    "rslora": ("rsLoRA, r = 16", {"rank": 16, "targets": "all-linear", "use_rslora": True}, 590_594, 0.901, 0.72),
    "dora": ("DoRA, r = 16", {"rank": 16, "targets": "all-linear", "use_dora": True}, 606_722, 0.903, 0.80),
    "dora-half": ("DoRA, r = 8", {"rank": 8, "targets": "all-linear", "use_dora": True}, 311_810, 0.900, 0.79),
    "qlora": ("QLoRA, r = 16", {"rank": 16, "targets": "all-linear"}, 590_594, 0.897, 0.95),
    "qdora": ("QDoRA, r = 16", {"rank": 16, "targets": "all-linear", "use_dora": True}, 606_722, 0.898, 1.05),
    "adalora": ("AdaLoRA, r = 16", {"rank": 16}, 886_322, 0.896, 0.9),
    "vera": ("VeRA, r = 256", {"rank": 256}, 26_114, 0.879, 0.77),
    "ia3": ("(IA)³", {}, 12_290, 0.870, 0.60),
    "prefix": ("prefix tuning", {"tokens": 20}, 92_930, 0.861, 0.7),
    "prompt": ("prompt tuning", {"tokens": 20}, 8_450, 0.802, 0.75),
    "p-tuning": ("P-tuning", {"tokens": 20}, 140_546, 0.83, 0.76),
    "houlsby": ("Houlsby adapters", {"bottleneck": 32}, 300_290, 0.9, 0.69),
    "pfeiffer": ("Pfeiffer adapters", {"bottleneck": 64}, 299_138, 0.897, 0.62),
    "bitfit": ("BitFit", {}, 31_490, 0.888, 0.58),
    "loreft": ("LoReFT, r = 4", {"rank": 4}, 19_226, 0.881, 0.6),
    "lora-bitfit": ("LoRA + BitFit", {"rank": 16, "targets": "all-linear", "bias": "all"}, 620_000, 0.9, 0.74),
}
FUSED = ("lora-r8", "lora", "lora-r32", "lora-qv", "rslora", "dora", "dora-half", "qlora", "qdora", "adalora", "vera")


def quartiles(median: float) -> dict[str, float]:
    return {"min": 0.9 * median, "q1": 0.95 * median, "median": median, "q3": 1.06 * median}


def row(method: str, seed: int = 0, engine: str | None = None, **changed: Any) -> dict[str, Any]:
    """One run's row; ``changed`` replaces what it has."""
    title, settings, trainable, accuracy, pace = METHODS[method]
    engine = engine or ("fastpeft" if method in FUSED else "torch")
    draw = np.random.default_rng([seed, list(METHODS).index(method), len(engine)])
    task = changed.get("task", TASK)
    good = accuracy + 0.004 * draw.standard_normal()
    score = float(good if task["higher_is_better"] else 40 * (1 - good) + 10)
    slow = 1.6 if engine == "peft" and method in FUSED else 1.0
    step = 0.21 * pace * slow
    against = {} if method == "none" else {"full": quartiles(pace * slow)}
    if engine == "fastpeft":
        against["peft"] = quartiles(1 / 1.6)
    curve = [
        {
            "step": at,
            "train_loss": float(0.2 + 0.5 * np.exp(-at / 150) + 0.01 * draw.random()),
            "valid_loss": float(0.25 + 0.45 * np.exp(-at / 150) + 0.02 * draw.random()),
            "valid_score": float(score * (0.8 + 0.2 * at / 600)),
        }
        for at in ((0,) if method == "none" else range(0, 601, 100))
    ]
    peak = int(90e6 + 16 * trainable + 60e6 * pace)
    return {
        "key": f"{method}-{seed}-{engine}",
        "date": f"2026-11-0{1 + seed % 9}T12:00:00+00:00",
        "machine": {
            "name": "a-machine", "cpu": "a processor", "cores": 2, "memory_gib": 23.0, "features": ["avx512"],
            "system": "Linux x86_64",
        },
        "versions": {"python": "3.11", "fastpeft": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
        "commit": "0123abc",
        "dirty": False,
        "threads": 2,
        "preset": "full",
        "task": task,
        "texts": "0123456789abcdef",
        "model": MODEL,
        "method": method,
        "title": title,
        "settings": settings,
        "training": {**TRAINING, "steps": 0 if method == "none" else 600},
        "seed": seed,
        "measured": True,
        "engine": engine,
        "failed": None,
        "trainable": trainable,
        "total": 22_713_602 + (0 if method in ("none", "full", "top") else trainable),
        "score": score,
        "scores": {"accuracy": score, "f1": score - 0.01},
        "valid_score": score + 0.002 if task["higher_is_better"] else score - 0.2,
        "loss": float(1.2 - good),
        "best_step": 500,
        "curve": curve,
        "seconds": {"step": quartiles(step), "epoch": step * 250, "training": step * 600},
        "samples_per_second": 32 / step,
        "against": against,
        "memory": {
            "peak": peak, "kept": int(60e6 * pace), "model": 45_400_000, "model_4bit": 17_000_000,
            "adapter_file": 4 * trainable + 2000,
        },
        "latency": {"before": 0.05 * pace, "merged": 0.04 if method in FUSED else None},
        "forgetting": {"before": 20.0, "after": 20.0 + pace} if task["kind"] == "language" else None,
        **changed,
    }  # fmt: skip


def failed(method: str, seed: int, reason: str, **changed: Any) -> dict[str, Any]:
    """A run's row that has no result."""
    whole = row(method, seed, **changed)
    results = list(whole)[list(whole).index("failed") + 1 :]
    return {**whole, **dict.fromkeys(results), "failed": reason}


def comparison(seeds: int = 3, **changed: Any) -> list[dict[str, Any]]:
    """Every method with every seed, the fused ones in plain PEFT as well."""
    return [
        row(method, seed, engine, **changed)
        for seed in range(seeds)
        for method in METHODS
        for engine in ((None, "peft") if method in FUSED else (None,))
    ]

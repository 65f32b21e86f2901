"""The plan of a product on a GPU: the nearest entry of what was measured, or the equations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter
from torch import nn

import fastpeft
from fastpeft.backends.gpu import plans as gpu_plans
from fastpeft.backends.gpu.plans import ENDINGS, SHARED, MeasuredGpu, Plan, Product

HERE = torch.device("cuda", 0)


def entry(M: int, plan: str, ending: str = "plain", dtype: str = "bfloat16", K: int = 4096) -> list[object]:
    return [M, K, 4096, dtype, ending, plan]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two GPUs were measured, and this machine has the second."""
    plans = [
        entry(512, "one_accumulator"),
        entry(4096, "low_rank_first"),
        entry(512, "one_accumulator", "masked"),
        entry(64, "base_first"),
    ]
    plans += [entry(8192, "one_accumulator_persistent")]
    gpus = [
        {"name": "Small", "capability": [8, 6], "multiprocessors": 20, "plans": [entry(1, "base_first")]},
        {"name": "Large", "capability": [9, 0], "multiprocessors": 132, "plans": plans},
    ]
    (tmp_path / "plans.json").write_text(json.dumps(gpus))
    facts = SimpleNamespace(name="Large", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(gpu_plans, "TABLE", tmp_path / "plans.json")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    forget()
    yield
    forget()


def forget() -> None:
    for cached in (gpu_plans.measured_gpus, gpu_plans._nearest_gpu, gpu_plans._choose):
        cached.cache_clear()


def chosen(
    M: int, ending: str = "plain", dtype: str = "bfloat16", shared: tuple[Plan, ...] = SHARED, K: int = 4096
) -> Plan:
    return gpu_plans.choose(Product(M, K, 4096, dtype, ending), HERE, shared)


@pytest.mark.usefixtures("table")
def test_the_nearest_entry_that_can_run_counts() -> None:
    assert chosen(512) is Plan.one_accumulator
    assert chosen(1000, K=5000) is Plan.one_accumulator
    assert chosen(3000) is Plan.low_rank_first
    assert chosen(80) is Plan.base_first
    assert chosen(512, "masked") is Plan.one_accumulator
    assert chosen(512, shared=()) is Plan.low_rank_first  # the nearest without the shared sums
    assert chosen(7000) is Plan.one_accumulator_persistent
    assert chosen(7000, shared=(Plan.one_accumulator,)) is Plan.low_rank_first  # operands that have no descriptors


@pytest.mark.usefixtures("table")
def test_what_was_not_measured_goes_by_the_equations() -> None:
    assert chosen(512, "scaled") is Plan.base_first
    assert chosen(512, dtype="float32") is Plan.low_rank_first
    assert chosen(1, dtype="float32") is Plan.base_first
    assert chosen(512, "masked", shared=()) is Plan.base_first


def test_an_unknown_gpu_takes_the_one_most_like_it() -> None:
    gpus = [
        MeasuredGpu("a", (8, 0), 108, ()),
        MeasuredGpu("b", (9, 0), 132, ()),
        MeasuredGpu("c", (9, 0), 78, ()),
        MeasuredGpu("d", (8, 6), 84, ()),
    ]
    found = {
        "b": ("H200", (9, 0), 132),
        "c": ("half of one", (9, 0), 66),
        "d": ("another", (8, 9), 142),
        "a": ("a", (8, 0), 108),
    }
    for name, facts in found.items():
        nearest = gpu_plans.nearest_gpu(gpus, *facts)
        assert nearest is not None and nearest.name == name
    assert gpu_plans.nearest_gpu([], "b", (9, 0), 132) is None


def test_the_shipped_table_can_be_read() -> None:
    forget()
    for gpu in gpu_plans.measured_gpus():
        assert gpu.multiprocessors > 0
        for product, plan in gpu.plans:
            assert product.ending in ENDINGS and plan in gpu_plans.plans_for(product.ending, SHARED)


def test_explain_names_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fastpeft.nn.LoRALinear.from_linear(nn.Linear(64, 48), r=8, alpha=16, backend="triton")
    triton_interpreter.use(monkeypatch)
    assert str(fastpeft.explain(layer)).startswith(
        "1 × triton: asked for by name; plans by the equations, no GPU was measured: "
        "1 token: base_first (plain), base_first (masked), base_first (scaled), base_first (scaled, masked); "
        "512 tokens: low_rank_first (plain), base_first (masked)"
    )
    monkeypatch.undo()
    layer.backend = None
    assert "no GPU was measured" not in str(fastpeft.explain(layer))  # the CPU's backend takes it

"""The GPU's measurements as far as they go without one: small operands, kernels emulated, calls in the place of graphs.
What a table says of rows is right; no speed is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
import triton_interpreter
from click.testing import CliRunner
from fastpeft.bench import gpu_kernels, gpu_plans, gpu_timing, host_time
from fastpeft.bench.measure import Run, record_kernels

from fastpeft import extension
from fastpeft.backends.gpu import triton
from fastpeft.backends.gpu.cuda import CudaBackend
from fastpeft.backends.gpu.kernel_set import Kernels
from fastpeft.backends.gpu.plans import SHARED, Plan, plans_for
from fastpeft.backends.gpu.triton import TritonBackend
from fastpeft.experiments import timing

MACHINE = {"name": "some-gpu", "gpu": "Some GPU", "capability": [9, 0], "multiprocessors": 132}
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
pytestmark = WITHOUT_GPU


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def replay_of(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
        for call in calls:
            call()
        return lambda: None

    monkeypatch.setattr(gpu_timing, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_timing, "copies_of", lambda size: 2)
    monkeypatch.setattr(gpu_timing, "replay_of", replay_of)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for module, name, value in (
        (timing, "SHORTEST_SAMPLE", 0.0),
        (gpu_kernels, "K", 128),
        (gpu_kernels, "N", 64),
        (gpu_kernels, "EXPERTS", 3),
        (gpu_kernels, "FEW", (1, 2)),
        (gpu_kernels, "MANY", (17,)),
        (gpu_plans, "TOKENS", (1, 17)),
        (gpu_plans, "LAYERS", ((64, 48),)),
    ):
        monkeypatch.setattr(module, name, value)


def run() -> Run:
    return Run("2026-01-01T00:00:00", MACHINE, {}, "c0ffee", False)


def by_emulation(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return cuda_emulation.use(monkeypatch)


def by_interpreter(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    triton_interpreter.use(monkeypatch)
    return triton.kernels()


@pytest.mark.parametrize("of", [by_emulation, by_interpreter])
def test_every_kernel_has_a_row(of: Callable[[pytest.MonkeyPatch], Kernels], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = of(monkeypatch)
    monkeypatch.setattr(gpu_kernels, "kernel_sets", lambda: {"ours": kernels})
    found = list(gpu_kernels.measure(2, run()))
    assert len({row["kernel"] for row in found}) == len(found) == 25
    assert {r["kernel"]: r["seconds"] for r in found if not isinstance(r["seconds"].get("ours", {}), dict)} == {}
    copied = 2 * 2 * 128 * 64
    assert found[0]["kernel"] == "copy" and found[0]["bytes"] == copied
    for row in found:
        row["seconds"] = {"torch": {"median": 1e-6}} if row["kernel"] == "copy" else {"ours": {"median": 4e-6}}
    found[1]["seconds"] = {"ours": {"median": 2e-6}, "bitsandbytes": "RuntimeError: it waits"}
    text = gpu_kernels.markdown(found)
    share = found[1]["bytes"] / 2e-6 / (copied / 1e-6)
    assert f"| four_bit_decode | 0.0 |  | 2.0 ({share:.0%}) | RuntimeError: it waits | 90% |" in text


def test_the_sets_are_those_of_the_backends_that_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_kernels.kernel_sets() == {}
    monkeypatch.setattr(CudaBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(extension, "cuda", cuda_emulation.library)
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: None)
    assert list(gpu_kernels.kernel_sets()) == ["cuda", "triton"]


def test_plans_are_measured_shown_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    by_interpreter(monkeypatch)
    found = list(gpu_plans.measure("bf16", 2, run()))
    assert len(found) == 2 * 4
    for row in found:
        possible = plans_for(row["product"]["ending"], SHARED if row["product"]["M"] > 16 else (Plan.one_accumulator,))
        assert row["seconds"].keys() == {plan.value for plan in possible}
        assert {plan: seconds for plan, seconds in row["seconds"].items() if not isinstance(seconds, dict)} == {}
        row["base_seconds"] = {"median": 1e-6}
        row["seconds"] = {plan.value: {"median": (1 + i) * 1e-6} for i, plan in enumerate(possible)}
    found[0]["seconds"]["low_rank_first"]["median"] = 0.5e-6
    assert gpu_plans.fastest(found[0]) == "low_rank_first"
    assert "| 1 x 64 x 48 | bfloat16 | plain | 1.0 | 1.00 | **0.50** | 3.00 |  |" in gpu_plans.markdown(found)
    older = [{"name": "Some GPU", "plans": []}, {"name": "Another", "plans": []}]
    other, mine = gpu_plans.recorded(found, older)
    assert other["name"] == "Another"
    assert (mine["name"], mine["capability"], mine["multiprocessors"]) == ("Some GPU", [9, 0], 132)
    assert mine["plans"][:2] == [
        [1, 64, 48, "bfloat16", "plain", Plan.low_rank_first.value],
        [1, 64, 48, "bfloat16", "masked", Plan.base_first.value],
    ]
    table = tmp_path / "plans.json"
    table.write_text(json.dumps(older))
    recorded = gpu_plans.recording(found, table)
    for count in (1, 2):
        assert next(recorded) is found[count - 1]
        other, mine = json.loads(table.read_text())
        assert (other["name"], mine["name"], len(mine["plans"])) == ("Another", "Some GPU", count)


def test_what_is_ended_early_leaves_its_rows_and_their_table(tmp_path: Path) -> None:
    def measure(run: Run) -> Iterator[dict[str, Any]]:
        yield {"row": 1}
        yield {"row": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_kernels("some", measure, lambda found: f"{len(found)} rows", tmp_path)
    (rows,) = tmp_path.glob("*-some.jsonl")
    assert [json.loads(line) for line in rows.read_text().splitlines()] == [{"row": 1}, {"row": 2}]
    assert rows.with_suffix(".md").read_text() == "2 rows"


def test_without_a_gpu_the_commands_say_so() -> None:
    for command in (gpu_kernels.command, gpu_plans.command):
        result = CliRunner().invoke(command, [])
        assert result.exit_code == 1 and "torch finds no NVIDIA GPU" in result.output


def test_who_cannot_be_captured_is_refused_with_the_reason() -> None:
    def waits() -> None:
        raise RuntimeError("it waits\nfor the GPU")

    found = gpu_timing.seconds_per_call({"good": [lambda: None], "bad": [waits]}, 2)
    assert isinstance(found["good"], dict)
    assert found["bad"] == "RuntimeError: it waits"


def test_the_hosts_time_of_a_step_is_measured_by_launchers_that_launch_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(host_time.command, ["--rounds", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*-host-time.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    launches = {(row["method"], row["dropout"], row["phase"]): row["launches"] for row in found}
    assert launches == {
        ("lora", 0.0, "forward"): 2,
        ("lora", 0.0, "step"): 6,
        ("lora", 0.05, "forward"): 2,
        ("lora", 0.05, "step"): 6,
        ("dora", 0.0, "forward"): 3,
        ("dora", 0.0, "step"): 7,
    }
    assert all(row["seconds"].keys() == {who.name for who in host_time.CONTESTANTS} for row in found)
    assert path.with_suffix(".md").read_text() in result.output

"""``make gpu-check`` rehearsed without a GPU: steps that run out of time, what is left behind, a missing package,
workers whose CUDA context breaks. The commands of its steps are ones that the programs take."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import click
import gpu_check
import gpu_window
import pytest
import torch
from click.testing import CliRunner
from fastpeft.bench import cli, experts, gpu_kernels, gpu_plans
from fastpeft.bench.cases import LayerCase
from fastpeft.bench.rows import append
from gpu_steps import ARCHIVE, Step, Steps, exit_code
from test_bench import row

import fastpeft.cli

COMMANDS: dict[str, click.Command] = {
    "fastpeft": fastpeft.cli.main,
    "fastpeft.bench.experts": experts.command,
    "fastpeft.bench.gpu_kernels": gpu_kernels.command,
    "fastpeft.bench.gpu_plans": gpu_plans.command,
}
FLAT = ("min", "q1", "median", "q3")
HERE = Path(__file__).resolve().parent


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: torch says that there is one, and what it is."""
    facts = SimpleNamespace(name="Some GPU", total_memory=2**36, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def has_ended(pid: int) -> bool:
    """Within a few seconds; nobody may be there to ask for its exit code."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def run(step: Step, out: Path, seconds: float = 3600.0) -> Steps:
    steps = Steps(HERE.parent, out, gpu_check.environment(HERE, None), time.monotonic() + seconds)
    steps.run(step)
    return steps


def test_a_step_out_of_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    stubborn = "trap '' INT; echo a row; sleep 1000 & echo $!; wait"
    steps = run(Step("stubborn", ["sh", "-c", stubborn], 0.5), tmp_path, seconds=4)
    first, child = (tmp_path / "stubborn.log").read_text().split("\n")[:2]
    assert steps.failed and first == "a row"
    assert has_ended(int(child))


SLEEPS = """
import os, pathlib, time

def test_passes():
    pass

def test_sleeps():
    pathlib.Path(__file__).with_name("sleeper").write_text(str(os.getpid()))
    time.sleep(1000)
"""


def test_pytest_out_of_time_writes_its_report_and_its_workers_end(tmp_path: Path) -> None:
    (tmp_path / "test_sleep.py").write_text(SLEEPS)
    report = tmp_path / "tests.xml"
    pytest_run = [sys.executable, "-m", "pytest", "-n", "1", f"--junitxml={report}", str(tmp_path / "test_sleep.py")]
    process = subprocess.Popen(pytest_run, start_new_session=True)
    while not (tmp_path / "sleeper").exists():  # its time is out when a worker sleeps, however long that takes to come
        assert process.poll() is None
        time.sleep(0.05)
    assert exit_code(process, 0.0) is None
    assert [case.get("name") for case in ElementTree.parse(report).iter("testcase")][:1] == ["test_passes"]
    assert has_ended(int((tmp_path / "sleeper").read_text()))


BREAKS = """
broken = []

def test_0():
    pass

def test_1():
    broken.append(True)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_2():
    assert not broken

def test_3():
    assert not broken
"""


def test_a_worker_ends_with_the_test_that_broke_its_context(tmp_path: Path) -> None:
    """And one started in its place runs the tests after it."""
    (tmp_path / "test_break.py").write_text(BREAKS)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "broken_context", str(tmp_path / "test_break.py")]
    ran = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True, check=False
    )
    assert "3 passed" in ran.stdout, ran.stdout
    failed = {line.split()[1] for line in ran.stdout.splitlines() if line.startswith("FAILED")}
    assert {name.rpartition("::")[2] for name in failed} == {"test_1"}
    assert "CUDA error: an illegal memory access" in ran.stdout


@pytest.mark.usefixtures("device", "without_bitsandbytes")
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps after one that ran out of time are taken; all that was found is in the archive."""
    out = tmp_path / "out"
    append(tmp_path / "some-gpu.jsonl", [row(against=None)])

    def steps_of(python: str, folder: Path, methods: Sequence[str]) -> list[Step]:
        assert (folder, list(methods)) == (out, ["lora", "dora", "adalora"])
        return [
            Step("slow", ["sh", "-c", "echo begun; sleep 1000"], 0.001),
            Step("rows", ["cp", str(tmp_path / "some-gpu.jsonl"), str(out)], 0.5),
            Step("package", [python, "-c", "import fastpeft.bench, fastpeft.kernels; print(fastpeft.__file__)"], 1.0),
        ]

    monkeypatch.setattr(gpu_check, "steps_of", steps_of)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out), "--minutes", "60"])
    assert gpu_check.main() == 1
    printed = capsys.readouterr().out
    assert "bitsandbytes is missing" in printed and "slow ran out of time" in printed
    assert "rows failed" not in printed and "package failed" not in printed
    assert not (out / "package.log").read_text().startswith(str(HERE.parent))  # put together elsewhere
    with tarfile.open(out / ARCHIVE) as archive:
        names = {"slow.log", "rows.log", "package.log", "some-gpu.jsonl", "plans.json", "summary.txt"}
        assert set(archive.getnames()) == names
        summary = archive.extractfile("summary.txt")
        assert summary is not None and "parity fails" in summary.read().decode()


@pytest.mark.parametrize("sanitizers", [[], ["memcheck", "racecheck"]], ids=["", "sanitizers"])
def test_the_programs_take_the_steps_commands(
    sanitizers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: sanitizers and f"/usr/bin/{name}")
    steps = gpu_check.steps_of("python", tmp_path, gpu_check.METHODS)
    assert [step.name for step in steps if "pytest" in step.command] == ["tests", *sanitizers]
    assert all((HERE.parent / name).exists() for step in steps for name in step.command if name.startswith("tests/"))
    for step in steps:
        if "pytest" not in step.command:
            module, *options = step.command[2:]
            parse(COMMANDS[module], options)


def parse(command: click.Command, options: Sequence[str]) -> None:
    """Raises click's error where there is no such option."""
    context = command.make_context("program", list(options), resilient_parsing=False)
    if isinstance(command, click.Group):
        name, chosen, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None and chosen is not None
        parse(chosen, rest)


@pytest.mark.usefixtures("device", "without_bitsandbytes")
def test_bounds_need_no_bitsandbytes(tmp_path: Path) -> None:
    case = LayerCase(4096, 4096, 4096, "bf16", device="cuda")
    lora = row(case={"kind": "layer", "shape": case.shape, **vars(case)})
    for base, code in ((1.05, 0), (1.5, 1)):
        ours, theirs = ({name: dict.fromkeys(FLAT, x) for name, x in (("base", x), ("peft", 0.5))} for x in (base, 2.0))
        found = [replace(lora, against=ours), replace(lora, contestant="peft-autocast", against=theirs)]
        append(tmp_path / "some-gpu.jsonl", found)
        (bounds,) = (step for step in gpu_check.steps_of("python", tmp_path, ["lora"]) if step.name == "bounds")
        done = CliRunner().invoke(cli.command, bounds.command[4:], catch_exceptions=False)
        assert done.exit_code == code, done.output


def test_the_window_holds_one_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_window.py", "--out", str(tmp_path)])
    assert gpu_window.main() == 0
    assert [path.name for path in tmp_path.rglob("*.so")] == ["libbitsandbytes_cuda130.so"]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 45 * 2**20
    ask = "import bitsandbytes, importlib.metadata as m; print(bitsandbytes.__file__, m.version('bitsandbytes'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "BNB_CUDA_VERSION": ""}
    said = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith(str(tmp_path / "bitsandbytes"))
    with pytest.raises(FileNotFoundError, match="--cuda"):
        gpu_window.fill(tmp_path, "1")

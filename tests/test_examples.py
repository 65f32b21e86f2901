"""Each script of examples/ on a tiny BERT: it ends well, and what it prints is what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_demo import tiny_bert
from transformers import BertModel

EXAMPLES = Path(__file__).parents[1] / "examples"
ROUNDING = 2**7 * torch.finfo(torch.float32).eps  # of a few layers' outputs, which are about 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    BertModel(tiny_bert()).save_pretrained(folder)
    return folder


def output(script: str, *arguments: Path | str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e[+-]?\d+)?", text)]


def test_every_example_is_tested_and_listed() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    source, page = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert all(f'output("{name}"' in source and f"examples/{name}" in page for name in scripts)


def test_tasks_are_switched(model: Path) -> None:
    said = output("switch_tasks.py", model)
    base, adapter = numbers(said)[:2]
    assert 0 < adapter < base
    assert said.count("switched in") == 3


def test_a_batch_mixes_tasks(model: Path) -> None:
    assert numbers(output("mixed_batch.py", model))[0] <= ROUNDING


def test_merged_is_what_was_adapted(model: Path, tmp_path: Path) -> None:
    said = output("merge_for_deployment.py", model, "--out", tmp_path / "merged")
    assert numbers(said)[0] <= ROUNDING
    assert BertModel.from_pretrained(tmp_path / "merged").num_parameters() == BertModel(tiny_bert()).num_parameters()


def test_training_goes_on_from_a_checkpoint(model: Path) -> None:
    first, last, again, end = numbers(output("continue_training.py", model))[1:]
    assert first > last > again > end

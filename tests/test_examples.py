"""Each script of examples/ on a tiny model: it ends well, and what it prints is what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft_experts import moe_base
from peft_layers import tiny_llama_base
from test_demo import tiny_bert
from test_tasks import word_tokenizer
from transformers import AutoModelForCausalLM, BertModel

EXAMPLES = Path(__file__).parents[1] / "examples"
ROUNDING = 2**7 * torch.finfo(torch.float32).eps  # of a few layers' outputs, which are about 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    BertModel(tiny_bert()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer. 64 and 128 wide: of other widths bitsandbytes decodes wrongly on some processors."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama_base(64, 128).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixture")
    moe_base().save_pretrained(folder)
    return folder


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--multi_gpu")  # or CPUs
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no")  # whatever is configured on this machine


def output(script: str, *arguments: Path | str, launcher: tuple[str, ...] = ()) -> str:
    start = ["-m", *launcher] if launcher else []
    command = [sys.executable, *start, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e[+-]?\d+)?", text)]


def test_every_example_is_tested_and_listed() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    source, page = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert all(f'output("{name}"' in source and f"examples/{name}" in page for name in scripts)


def test_trainers_of_trl(llama: Path) -> None:
    for said in (output("sft.py", llama, "--steps", "2"), output("dpo.py", llama, "--steps", "2")):
        assert "the loss after 2 steps: " in said and "fused: 14, left to PEFT: 0" in said


def test_accelerate_launches_a_trainer_of_two_processes(llama: Path) -> None:
    said = output("sft.py", llama, "--steps", "2", launcher=ACCELERATE)
    assert said.count("the loss after 2 steps: ") == said.count("fused: 14, left to PEFT: 0") == 2


def test_qlora(llama: Path) -> None:
    said = output("qlora.py", llama)
    first, last = numbers(said.partition("step 1:")[2])
    assert "fused: 14, left to PEFT: 0" in said and first > last


def test_experts(mixture: Path, tmp_path: Path) -> None:
    said = output("experts.py", mixture, "--out", tmp_path / "adapter")
    first, last = numbers(said.partition("step 1:")[2])[:2]
    assert "fused: 10, left to PEFT: 0" in said and first > last
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mixture), tmp_path / "adapter")
    assert all(B.any() for name, B in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes(engine: str, llama: Path) -> None:
    said = output("distributed.py", llama, "--engine", engine, launcher=TORCHRUN)
    first, last = numbers(said)[:2]
    assert said.count("of 2 processes") == 2 and "fused: 14, left to PEFT: 0" in said and first > last


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

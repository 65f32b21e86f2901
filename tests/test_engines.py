"""What people train with around a PEFT model: every call of its layers stays fused, and the losses are PEFT's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_program import STEPS
from oracle import assert_close_as_eager

HERE = Path(__file__).parent
LAYERS = 6  # of the tiny Llama


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("ddp", "lora"),
        ("ddp", "qdora"),
        ("ddp-static", "dora"),
        ("ddp-unused", "lora"),
        ("ddp-views", "dora"),
        ("fsdp2", "lora"),
        ("fsdp2", "dora"),
        ("fsdp2", "qlora"),
        ("fsdp2-mixed", "lora"),
    ],
)
def test_two_processes(engine: str, method: str) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "engine_program.py"]
    done = subprocess.run([sys.executable, *command, engine, method], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["calls"], found["left"]) == (LAYERS * STEPS, 0)
    fused, exact, stock = (torch.tensor(found[who], dtype=torch.float64) for who in ("fused", "exact", "stock"))
    assert_close_as_eager(fused.float(), exact, stock, "loss curve")
    assert fused[-4:].mean() < fused[:4].mean()

"""Every Triton kernel compiled for three architectures, with no GPU: nothing spills, and the table of what each takes
stands beside this file, so that a change of it shows. ``python tests/triton_aot.py > tests/triton_resources.json``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

HERE = Path(__file__).resolve().parent
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
}  # bytes a block, CUDA's programming guide
WITHOUT_PRODUCT = ("dropout", "four_bit_decode")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """In a process of its own, where the kernels are not made for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, HERE / "triton_aot.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    found: dict[str, dict[str, Any]] = json.loads(made.stdout)["kernels"]
    return found


def test_nothing_spills_and_shared_memory_suffices(compiled: dict[str, dict[str, Any]]) -> None:
    assert {name: found["spilled"] for name, found in compiled.items() if found["spilled"]} == {}
    for name, found in compiled.items():
        assert found["shared"] <= SHARED_LIMIT[name.rpartition(", ")[2]], name


def test_products_use_the_matrix_units(compiled: dict[str, dict[str, Any]]) -> None:
    """In a low precision; float32 is multiplied exactly unless torch allows tf32."""
    halves = {name: found["matrix"] for name, found in compiled.items() if ", bf16, " in name}
    without = {name.partition(",")[0] for name, matrix in halves.items() if matrix is None}
    assert without == set(WITHOUT_PRODUCT)
    large = {name: matrix for name, matrix in halves.items() if name.startswith("lora_linear")}
    meant = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}
    assert large == {name: meant[name.rpartition(", ")[2]] for name in large}


def test_the_table_is_the_one_on_record(compiled: dict[str, dict[str, Any]]) -> None:
    recorded = json.loads((HERE / "triton_resources.json").read_text())
    assert recorded["triton"] == triton.__version__
    assert compiled == recorded["kernels"]

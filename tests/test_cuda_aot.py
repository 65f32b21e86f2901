"""Every CUDA kernel compiled for three architectures: nothing spills, and a block's shared memory is within what needs
no opting in."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fastpeft import build

SOURCES = sorted((Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "kernels").glob("*.cu"))
SHARED_LIMIT = 48 * 1024
ON_MATRIX_UNITS = {"dora_norm", "four_bit_linear", "lora_down_many", "lora_gradient", "lora_up"}
SERIALISED = ("C7510", "C7514", "C7515")  # what ptxas says of products of a warpgroup that wait for each other


@pytest.mark.skipif(build.find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nothing_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    target = f"-gencode=arch=compute_{architecture},code=[compute_{architecture},sm_{architecture}]"
    command = [build.find_nvcc(), *build.CUDA_FLAGS, target, "-Xptxas", "-v", "--keep", "--keep-dir", str(tmp_path)]
    ran = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", ran.stderr)]
    assert spills and not any(spills), ran.stderr
    stacks = [int(count) for count in re.findall(r"(\d+) bytes stack frame", ran.stderr)]
    assert stacks and not any(stacks), ran.stderr
    assert all(int(count) <= SHARED_LIMIT for count in re.findall(r"(\d+) bytes smem", ran.stderr))
    ptx = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    assert ("mma.sync" in ptx) == (source.stem in ON_MATRIX_UNITS)
    assert ("wgmma.mma_async" in ptx) == (source.stem == "lora_linear" and architecture == "90a")
    assert [code for code in SERIALISED if code in ran.stderr] == []

"""Each CPU kernel against what ``kernels.h`` says of it, on raw pointers: here, and Arm's under emulation."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import kernel_program
import pytest

from fastpeft import build
from fastpeft import extension as loader


@pytest.fixture(scope="module")
def arm_program() -> Path:
    kernel_program.find_arm_tools()
    return kernel_program.program("kernel-check-arm", "aarch64", [f"{kernel_program.CROSS}g++"], ["-O2", "-static"])


def names(printed: str) -> list[str]:
    return [line.partition(":")[0] for line in printed.splitlines()]


def test_this_processors_kernels_do_what_they_promise() -> None:
    native = kernel_program.program("kernel-check", platform.machine(), build.find_compiler(), ["-O2"])
    assert loader.C is not None, loader.missing()
    assert set(names(kernel_program.run([native]))) >= set(loader.C.isas())


@pytest.mark.xdist_group("arm")
@pytest.mark.parametrize(("isa", "processor"), [("neon", "cortex-a53"), ("neon_bf16", "max")])
def test_arms_kernels_do_what_they_promise(arm_program: Path, isa: str, processor: str) -> None:
    """With NEON alone on the oldest 64-bit processor, where an instruction that is younger stops the program."""
    assert names(kernel_program.run([kernel_program.EMULATOR, "-cpu", processor, arm_program, isa])) == [isa]


@pytest.mark.xdist_group("arm")
def test_a_processor_is_not_offered_what_it_lacks(arm_program: Path) -> None:
    command = [kernel_program.EMULATOR, "-cpu", "cortex-a53", arm_program, "neon_bf16"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "neon_bf16: this processor lacks it\n")


@pytest.mark.xdist_group("arm")
def test_arms_instruction_sets_share_no_function(arm_program: Path) -> None:
    """As ``test_build.py`` asserts it of this processor's."""
    targets = sorted(arm_program.parent.glob("csrc_cpu_kernels_kernels_neon*.o"))
    assert len(targets) == 2
    for target in targets:
        assert kernel_program.weak_symbols(target, f"{kernel_program.CROSS}nm") == []

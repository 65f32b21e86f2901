"""The CUDA backend's tests over emulated kernels that the address and undefined-behaviour sanitizers watch.
``python tests/cuda_sanitized.py`` is a part of ``make sanitize``; arguments are pytest's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest

from fastpeft import build

TESTS = ("test_cuda.py", "test_cuda_steps.py")
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")  # have to be there before Python is
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0"  # Python leaks, and fibers have stacks of their own


def environment() -> dict[str, str]:
    """That of a process into which sanitized code may be loaded."""
    compiler = build.find_compiler()
    found = [
        subprocess.run([*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in RUNTIMES
    ]
    return os.environ | {"LD_PRELOAD": ":".join(path.strip() for path in found), "ASAN_OPTIONS": OPTIONS}


if __name__ == "__main__":
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())
    cuda_emulation.use_flags("cuda-emulation-sanitized", SANITIZE)
    here = Path(__file__).parent
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *(str(here / name) for name in TESTS), *sys.argv[1:]]))

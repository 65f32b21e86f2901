"""The program of tests/kernel_check, which holds each CPU kernel to what ``kernels.h`` says of it: for this processor,
with sanitizers (of memory, of undefined behaviour, of two threads), or for Arm and run by an emulator. ``python
tests/kernel_program.py`` is ``make sanitize``."""

from __future__ import annotations

import fcntl
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastpeft import build

ROOT = Path(__file__).resolve().parent.parent
THREADS = ("-O1", "-g", "-fsanitize=thread", "-pthread", "-Wno-error=tsan")
SANITIZE = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover")
CROSS = "aarch64-linux-gnu-"
EMULATOR = "qemu-aarch64"


def find_arm_tools() -> None:
    """What compiles and runs Arm's kernels on another processor has to be there.

    Raises:
        FileNotFoundError: it is not; the message says how to add it.
    """
    missing = [tool for tool in (f"{CROSS}g++", EMULATOR) if shutil.which(tool) is None]
    if missing:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)}: install them (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)"
        )


def program(name: str, machine: str, compiler: Sequence[str], flags: Sequence[str]) -> Path:
    """Compiles the kernels, as the extension is compiled, and the checks, and links them.

    Args:
        name: of the folder below build/, in which what does not change is kept.
        machine: the architecture that it is for.
        compiler: the command of a C++ compiler for it.
        flags: what is added.
    """
    folder = ROOT / "build" / name
    sources = [*sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp")), *sorted((ROOT / "tests/kernel_check").glob("*.cpp"))]

    def command(source: Path) -> list[str]:
        return [*compiler, *build.COMPILE_FLAGS, *build.machine_flags(source, machine), "-Werror", *flags]

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one of several test processes compiles it
        fcntl.flock(lock, fcntl.LOCK_EX)
        build.compile_and_link(ROOT, sources, command, compiler, flags, folder / "check", folder)
    return folder / "check"


def weak_symbols(target: Path, nm: str = "nm") -> list[str]:
    """What an object file has of inline functions and templates that other files may have, too."""
    symbols = subprocess.run([nm, "--defined-only", target], check=True, capture_output=True, text=True).stdout
    return [line for line in symbols.splitlines() if line.split()[-2] == "W"]


def run(command: Sequence[str | Path]) -> str:
    """What the program prints.

    Raises:
        AssertionError: a kernel is wrong; the message is what it printed.
    """
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0, f"{command[0]} ended with {ran.returncode}:\n{ran.stdout}"
    return ran.stdout


if __name__ == "__main__":
    check = program("kernel-check-sanitized", platform.machine(), build.find_compiler(), SANITIZE)
    print(run([check, *sys.argv[1:]]), end="")
    shared = program("kernel-check-threads", platform.machine(), build.find_compiler(), THREADS)
    print("two threads at once:", run([shared, "--threads", *sys.argv[1:]]), sep="\n", end="")

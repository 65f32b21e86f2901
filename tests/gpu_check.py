"""``make gpu-check``: what can only be known on a GPU, in a few minutes and without a network.

    python3 tests/gpu_check.py [--out FOLDER] [--packages FOLDER] [--minutes 8]

Uses the python it is started with, which needs torch with CUDA, Triton, transformers, peft and pytest; what it lacks
of the bench's other packages may lie in a folder made by ``pip install --target FOLDER``. Puts fastpeft together in a
folder of its own (nothing is installed), runs the Triton backend's tests on the GPU, then ``fastpeft bench``, and
leaves behind the tests' report, the rows by device name with their table, and a summary, which is printed last. The
exit code is 1 when a test or a measurement failed, or the time was too short for all of them. Without bitsandbytes the
4-bit methods are left out of the bench, and it says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"bench": "bench", "kernels/triton": "kernels", "csrc": "csrc"}  # pyproject.toml's package-dir
METHODS = ("lora", "dora", "qlora", "qdora", "adalora")
FOUR_BIT = ("qlora", "qdora")


def assemble(folder: Path) -> Path:
    """A folder to import ``fastpeft`` from."""
    package = folder / "fastpeft"
    package.mkdir(parents=True)
    for source in (ROOT / "fastpeft").iterdir():
        (package / source.name).symlink_to(source)
    for folder_of_sources, name in FOLDERS.items():
        (package / name).symlink_to(ROOT / folder_of_sources)
    return folder


def run(name: str, command: list[str], environment: dict[str, str], out: Path, seconds: float) -> int:
    """The exit code, 124 where the time ran out; what it prints goes to ``out/name.log``, and its end to the screen."""
    log = out / f"{name}.log"
    print(f"== {name}, at most {seconds:.0f} s: {' '.join(command)}", flush=True)
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    print("\n".join(log.read_text().splitlines()[-12:]), flush=True)
    return code


def summary(rows: Path) -> str:
    """fastpeft's rows in short: times over the frozen base and over PEFT."""
    lines = [f"{'method':<8} {'shape':<28} {'dropout':>7} {'phase':<9} {'/ base':>7} {'/ PEFT':>7}"]
    for path in sorted(rows.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["contestant"] != "fastpeft":
                continue
            case, against = row["case"], row["against"]
            ratios = [f"{against[rival]['median']:7.2f}" for rival in ("base", "peft")] if against else ["parity fails"]
            named = f"{case['method']:<8} {case['shape']:<28} {case['dropout']:>7g} {row['phase']:<9}"
            lines.append(" ".join([named, *ratios]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch finds no NVIDIA GPU")
    deadline = time.monotonic() + 60 * arguments.minutes
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.packages is not None:
        sys.path.append(str(arguments.packages))
    methods = [m for m in METHODS if m not in FOUR_BIT or importlib.util.find_spec("bitsandbytes") is not None]
    print(f"Methods: {', '.join(methods)}" + ("" if len(methods) == len(METHODS) else "; bitsandbytes is missing"))
    with tempfile.TemporaryDirectory() as folder:
        paths = [assemble(Path(folder)), ROOT / "tests", *filter(None, [arguments.packages])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
        report = f"--junitxml={out / 'tests.xml'}"
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", report, "tests/test_triton.py"]
        codes = [run("tests", tests, environment, out, 0.5 * (deadline - time.monotonic()))]
        for method in methods:
            left = deadline - time.monotonic()
            if left < 10:
                print(f"== no time is left for {method}")
                codes.append(1)
                continue
            bench = [sys.executable, "-m", "fastpeft", "bench", "--device", "cuda", "--method", method, "--layer"]
            bench += ["--no-compile", "--rounds", "15", "--out", str(out)]
            codes.append(run(f"bench-{method}", bench, environment, out, left / (len(methods) - methods.index(method))))
    text = summary(out)
    (out / "summary.txt").write_text(text + "\n")
    print(text)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())

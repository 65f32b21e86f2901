"""``make gpu-check``: what can only be known on a GPU, in a few minutes and without a network.

    python3 tests/gpu_check.py [--out FOLDER] [--packages FOLDER] [--minutes 8]

Uses the python it is started with, which needs torch with CUDA, Triton, transformers, peft and pytest; what it lacks
of the bench's other packages may lie in a folder made by ``pip install --target FOLDER``. Builds the extensions in
this checkout, puts fastpeft together in a folder of its own (nothing is installed), runs the GPU backends' tests,
times kernels, plans and experts, then runs ``fastpeft bench`` with the plans that were found fastest, then some steps
again under compute-sanitizer, where there is one, and leaves behind the tests' report, the rows by device name with
their tables, the plans (which it puts into fastpeft/backends/gpu) and a summary, which is printed last; all of it also
as one archive, complete after each step. The exit code is 1 when a step failed, a bound was missed, or the time was too
short. Without nvcc the CUDA backend is left out, without bitsandbytes the 4-bit methods of the bench, and it says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_steps import Step, Steps, pack

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "fastpeft" / "backends" / "gpu" / "plans.json"
FOLDERS = {"bench": "bench", "kernels/triton": "kernels", "csrc": "csrc"}  # pyproject.toml's package-dir
METHODS = ("lora", "dora", "qlora", "qdora", "adalora")
FOUR_BIT = ("qlora", "qdora")
TESTS = ("test_cuda.py", "test_cuda_steps.py", "test_triton.py", "test_grouped_triton.py", "test_gpu_sync.py")
EXPERTS = ("--shape", "qwen3-30b", "--dtype", "bf16", "--tokens", "64", "--tokens", "512", "--tokens", "4096")
SANITIZER = "compute-sanitizer"
WATCHED = ("tests/test_cuda.py", "-k", "short_way")  # whole steps of a few cases that end within tiles
MOST_WORKERS = 14


def assemble(folder: Path) -> None:
    """Makes ``folder`` one to import ``fastpeft`` from."""
    package = folder / "fastpeft"
    package.mkdir(parents=True, exist_ok=True)
    sources = {source.name: source for source in (ROOT / "fastpeft").iterdir()}
    sources |= {name: ROOT / folder_of_sources for folder_of_sources, name in FOLDERS.items()}
    for name, source in sources.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(source)


def measurable_methods() -> list[str]:
    """Those whose packages there are."""
    return [m for m in METHODS if m not in FOUR_BIT or importlib.util.find_spec("bitsandbytes") is not None]


def steps_of(python: str, out: Path, methods: Sequence[str]) -> list[Step]:
    """All that is to be run, in this order."""
    module = [python, "-m"]
    # A workspace of its own for each stream: what torch asks for where the same call is to give the same bits.
    tests = [
        "env",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8",
        *module,
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        f"--junitxml={out / 'tests.xml'}",
    ]
    if importlib.util.find_spec("xdist") is not None:
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        tests += ["-n", str(workers), "--dist", "loadgroup", "-p", "broken_context", "--max-worker-restart", "1000"]
    watched = ["--error-exitcode", "1", *module, "pytest", "-q", "-p", "no:cacheprovider", *WATCHED]
    tools = ("memcheck", "racecheck") if shutil.which(SANITIZER) else ()
    to_out = ["--out", str(out)]
    bench = [*module, "fastpeft", "bench", "--device", "cuda", "--layer", "--no-compile", *to_out]
    return [
        Step("build", [*module, "fastpeft", "build"], 0.25),
        Step("tests", [*tests, *(f"tests/{name}" for name in TESTS)], 0.45),
        Step("kernels", [*module, "fastpeft.bench.gpu_kernels", *to_out], 0.25),
        Step("plans", [*module, "fastpeft.bench.gpu_plans", *to_out, "--record", str(PLANS)], 0.4),
        Step(
            "experts", [*module, "fastpeft.bench.experts", "--device", "cuda", "--rounds", "9", *EXPERTS, *to_out], 0.2
        ),
        *(
            Step(f"bench-{method}", [*bench, "--method", method], 0.8 / (len(methods) - position))
            for position, method in enumerate(methods)
        ),
        *(Step(tool, [SANITIZER, "--tool", tool, *watched], 0.45) for tool in tools),
        Step("bounds", [*bench, "--plot-only", "--check"], 1.0),
    ]


def environment(package: Path, packages: Path | None) -> dict[str, str]:
    """Without a safe path the folder that a command runs in comes first, and the checkout is no whole package."""
    paths = [package, ROOT / "tests", packages, os.environ.get("PYTHONPATH")]
    settings = {
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | settings


def summary(rows: Path) -> str:
    """fastpeft's rows in short: times over the frozen base and over PEFT."""
    lines = [f"{'method':<8} {'shape':<28} {'dropout':>7} {'phase':<9} {'/ base':>7} {'/ PEFT':>7}"]
    for path in sorted(rows.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.get("contestant") != "fastpeft":
                continue
            case, against = row["case"], row["against"]
            ratios = [f"{against[rival]['median']:7.2f}" for rival in ("base", "peft")] if against else ["parity fails"]
            named = f"{case['method']:<8} {case['shape']:<28} {case['dropout']:>7g} {row['phase']:<9}"
            lines.append(" ".join([named, *ratios]))
    return "\n".join(lines)


def leave_behind(out: Path) -> None:
    """What was found so far, whatever becomes of the next step."""
    shutil.copy(PLANS, out)
    (out / "summary.txt").write_text(summary(out) + "\n")
    pack(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no NVIDIA GPU")
    deadline = time.monotonic() + 60 * arguments.minutes
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.packages is not None:
        sys.path.append(str(arguments.packages))
    methods = measurable_methods()
    print(f"Methods: {', '.join(methods)}" + ("" if len(methods) == len(METHODS) else "; bitsandbytes is missing"))
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(ROOT, out, environment(Path(folder), arguments.packages), deadline)
        for step in steps_of(sys.executable, out, methods):
            assemble(Path(folder))  # with what the steps before built
            steps.run(step)
            leave_behind(out)
    print((out / "summary.txt").read_text(), end="")
    return int(steps.failed)


if __name__ == "__main__":
    sys.exit(main())

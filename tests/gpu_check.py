"""``make gpu-check``: what can only be known on a GPU, in a few minutes and without a network.

    python3 tests/gpu_check.py [--out FOLDER] [--packages FOLDER] [--minutes 8]

Uses the python it is started with, which needs torch with CUDA, Triton, transformers, peft and pytest; what it lacks
of the bench's other packages may lie in a folder made by ``pip install --target FOLDER``. Builds the extensions in this
checkout, puts fastpeft together in a folder of its own (nothing is installed), runs the GPU backends' tests, times
kernels, plans and compositions, then runs ``fastpeft bench`` with the plans that were found fastest, and leaves behind
the tests' report, the rows by device name with their tables, the plans to be put into fastpeft/backends, and a summary,
which is printed last. The exit code is 1 when a step failed, a bound was missed, or the time was too short. Without
nvcc the CUDA backend is left out, without bitsandbytes the 4-bit methods of the bench, and it says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "fastpeft" / "backends" / "gpu_plans.json"
FOLDERS = {"bench": "bench", "kernels/triton": "kernels", "csrc": "csrc"}  # pyproject.toml's package-dir
METHODS = ("lora", "dora", "qlora", "qdora", "adalora")
FOUR_BIT = ("qlora", "qdora")
TESTS = ("test_cuda.py", "test_triton.py", "test_gpu_sync.py")
# Of the time that is left, at most.
SHARES = {"build": 0.2, "tests": 0.45, "kernels": 0.25, "plans": 0.4, "compositions": 0.15}


def assemble(folder: Path) -> None:
    """Makes ``folder`` one to import ``fastpeft`` from."""
    package = folder / "fastpeft"
    package.mkdir(parents=True, exist_ok=True)
    sources = {source.name: source for source in (ROOT / "fastpeft").iterdir()}
    sources |= {name: ROOT / folder_of_sources for folder_of_sources, name in FOLDERS.items()}
    for name, source in sources.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(source)


class Steps:
    """Commands that share the time up to a deadline. What each prints goes to ``out/name.log``, its end to the
    screen."""

    def __init__(self, out: Path, deadline: float) -> None:
        self._out, self._deadline, self.failed = out, deadline, False

    def run(self, name: str, command: list[str], environment: dict[str, str], share: float | None = None) -> None:
        """Runs ``command`` for ``share`` of the time that is left at most."""
        seconds = (share or SHARES[name]) * (self._deadline - time.monotonic())
        log = self._out / f"{name}.log"
        print(f"== {name}, at most {seconds:.0f} s: {' '.join(command)}", flush=True)
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        print("\n".join(log.read_text().splitlines()[-12:]), flush=True)
        if code != 0:
            print(f"== {name} {'ran out of time' if code == 124 else f'failed with exit code {code}'}", flush=True)
            self.failed = True


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
    steps = Steps(out, deadline)
    with tempfile.TemporaryDirectory() as folder:
        python = [sys.executable, "-m"]
        paths = [Path(folder), ROOT / "tests", *filter(None, [arguments.packages])]
        # Without a safe path the folder that a command runs in comes first, and the checkout is no whole package.
        settings = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        environment = os.environ | settings
        assemble(Path(folder))
        steps.run("build", [*python, "fastpeft", "build"], environment)
        assemble(Path(folder))  # with what was built
        pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
        pytest += ["-n", "8"] if importlib.util.find_spec("xdist") is not None else []
        # A workspace of its own for each stream: what torch asks for where the same call is to give the same bits.
        deterministic = environment | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        steps.run("tests", [*pytest, *(f"tests/{name}" for name in TESTS)], deterministic)
        steps.run("kernels", [*python, "fastpeft.bench.gpu_kernels", "--out", str(out)], environment)
        shutil.copy(PLANS, out)  # the other GPUs' entries stay
        plans = ["fastpeft.bench.gpu_plans", "--out", str(out), "--record", str(out / PLANS.name)]
        steps.run("plans", [*python, *plans], environment)
        shutil.copy(out / PLANS.name, PLANS)
        steps.run("compositions", [*python, "fastpeft.bench.gpu_compositions", "--out", str(out)], environment)
        bench = ["fastpeft", "bench", "--device", "cuda", "--layer", "--no-compile", "--out", str(out)]
        for position, method in enumerate(methods):
            share = 1 / (len(methods) - position)
            steps.run(f"bench-{method}", [*python, *bench, "--method", method], environment, 0.9 * share)
        steps.run("bounds", [*python, *bench, "--plot-only", "--check"], environment, 1.0)
    text = summary(out)
    (out / "summary.txt").write_text(text + "\n")
    print(text)
    return int(steps.failed)


if __name__ == "__main__":
    sys.exit(main())

"""What each Triton on record makes of the kernels: the installed one, and the oldest that fastpeft takes, which
``make setup`` puts into a folder of its own. ``python tests/triton_resources.py`` records it anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = HERE / "triton_resources.json"
FOLDERS: dict[str, Sequence[Path]] = {"3.6.0": [Path(sys.prefix) / "triton-3.6"], "3.9.0": []}
Kernels = dict[str, dict[str, Any]]


def compiled_by(version: str) -> Kernels:
    """In a process of its own, where that Triton comes first and kernels are not made for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [*map(str, FOLDERS[version]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    made = subprocess.run(
        [sys.executable, HERE / "triton_aot.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found["triton"] == version, f"Triton is {found['triton']}, not {version}; make setup installs it"
    kernels: Kernels = found["kernels"]
    return kernels


if __name__ == "__main__":
    RECORD.write_text(json.dumps({version: compiled_by(version) for version in FOLDERS}, indent=1) + "\n")

"""Environments of their own beside the one that runs, whose packages they see unless they have others."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path


def beside(folder: Path, *, with_pip: bool = False, with_checkout: bool = False) -> Path:
    """Makes an environment in ``folder``, which sees the fastpeft of this checkout or has none; returns its python."""
    venv.create(folder, clear=True, with_pip=with_pip)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    here, there = Path(sysconfig.get_path("purelib")), Path(own.stdout.strip())
    (there / "0.pth").write_text(f"{here}\n", encoding="utf-8")  # they are read in the order of their names
    for editable in here.glob("__editable__.fastpeft*.pth") if with_checkout else ():
        shutil.copy(editable, there)
    return python


def install(python: Path, packages: Sequence[str | Path], *options: str) -> None:
    """What pip of ``python``'s environment, or this one's, puts there."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *options, *packages]
    subprocess.run([str(part) for part in command], check=True)

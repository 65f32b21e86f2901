"""Commands that share the time up to a deadline, each with a limit of its own, and leave behind what they found."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GRACE = 30.0  # seconds to end in when asked to: pytest gives workers that hang 10, then writes its report
SHOWN = 12  # last lines of a log
ARCHIVE = "everything.tar.gz"


class Step(NamedTuple):
    """``command`` may take ``share`` of the time that is left when its turn comes."""

    name: str
    command: Sequence[str]
    share: float


class Steps:
    """Runs steps in ``cwd``. What each prints goes to ``out/name.log``, its end to the screen."""

    def __init__(self, cwd: Path, out: Path, environment: Mapping[str, str], deadline: float) -> None:
        self._cwd, self._out, self._environment, self._deadline = cwd, out, dict(environment), deadline
        self.failed = False

    def run(self, step: Step) -> None:
        seconds = step.share * (self._deadline - time.monotonic())
        print(f"== {step.name}, at most {seconds:.0f} s: {' '.join(step.command)}", flush=True)
        log = self._out / f"{step.name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                step.command,
                cwd=self._cwd,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = exit_code(process, seconds)
        print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]), flush=True)
        if code != 0:
            reason = "ran out of time" if code is None else f"failed with exit code {code}"
            print(f"== {step.name} {reason}", flush=True)
            self.failed = True


def exit_code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Waits for a process that leads a group of its own; None where it ran out of time. Nothing of the group is left
    behind."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def pack(folder: Path) -> None:
    """All files of a folder as one archive in it, complete at any moment."""
    archive = folder / ARCHIVE
    new = archive.with_suffix(".new")
    with tarfile.open(new, "w:gz") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path not in (archive, new):
                file.add(path, path.relative_to(folder))
    new.replace(archive)

"""Runs PEFT's own LoRA tests with stock PEFT and under ``fastpeft.enable()``, and prints the failures that differ.

    python tests/peft_suite.py PEFT_CHECKOUT [PYTEST_ARGUMENT ...]

By default the LoRA, DoRA and AdaLoRA parts of ``tests/test_custom_models.py``; name other files or ``-k`` expressions
to run those. The exit code is 1 when fastpeft has a failure that stock PEFT has not. The module is also the plugin of
the second run.
PEFT's tests need diffusers, datasets, parameterized and scipy besides fastpeft's own test requirements.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

DEFAULT_ARGUMENTS = ("tests/test_custom_models.py", "-k", "lora and not xlora and not randlora")
COMMON_ARGUMENTS = ("-o", "addopts=", "-p", "no:cacheprovider", "-q", "--no-header", "--tb=no", "-rN")


def pytest_configure() -> None:
    """As a plugin: every layer made in this run is fused."""
    import fastpeft

    fastpeft.enable()


def outcomes(checkout: Path, arguments: list[str], plugin: tuple[str, ...]) -> dict[str, str]:
    """Each test's outcome: passed, skipped, failure or error."""
    here = Path(__file__).resolve().parent
    paths = [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *COMMON_ARGUMENTS, *plugin, f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=checkout, env=environment, check=False).returncode
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(f"pytest could not run the tests (exit code {status})")
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


def main(checkout: str, *arguments: str) -> int:
    """Prints both counts and the differences; 1 when there is a new failure."""
    selected = list(arguments or DEFAULT_ARGUMENTS)
    stock = outcomes(Path(checkout), selected, ())
    fused = outcomes(Path(checkout), selected, ("-p", "peft_suite"))
    for title, results in (("stock PEFT", stock), ("fastpeft", fused)):
        counts = {outcome: list(results.values()).count(outcome) for outcome in sorted(set(results.values()))}
        print(f"{title}: {counts}")
    changed = {name: (stock.get(name, "absent"), after) for name, after in fused.items() if stock.get(name) != after}
    for name, (before, after) in changed.items():
        print(f"{before} -> {after}: {name}")
    return int(any(after in ("failure", "error") for _, after in changed.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

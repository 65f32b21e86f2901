"""``make test-peft``: PEFT's own tests with stock PEFT and under ``fastpeft.enable()``; the failures that differ.

    python tests/peft_suite.py [PYTEST_ARGUMENT ...]

By default the LoRA, DoRA and AdaLoRA parts of ``tests/test_custom_models.py``, and all tests of mixed adapters,
initialisation (hot-swapping among them), variants of LoRA and the low-level API; name files or ``-k`` expressions to
run others. The tests are those of the source archive of the PEFT that is installed, in an environment of their own
under ``build/peft``. In both runs a test that asks the network for something, as for a model of the hub, is skipped.

The exit code is 1 when fastpeft has a failure that stock PEFT has not and docs/peft.md does not explain, or when no
call was fused. The module is also the plugin of both runs.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import environments
import pytest

BUILD = Path(__file__).resolve().parent.parent / "build" / "peft"
PACKAGES = ("diffusers", "parameterized", "importlib_metadata", "zipp")  # that PEFT's tests import
SUITES = (
    ("tests/test_custom_models.py", "-k", "lora and not xlora and not randlora"),
    *((f"tests/test_{name}.py",) for name in ("mixed", "initialization", "lora_variants", "low_level_api")),
)
COMMON_ARGUMENTS = (
    "-o",
    "addopts=",
    "-p",
    "no:cacheprovider",
    "-p",
    "peft_suite",
    "-q",
    "--no-header",
    "--tb=no",
    "-rN",
)
FUSED = "fused calls"  # a property of the report
EXPLAINED = (  # in docs/peft.md
    "test_adalora_default_init_identity",
    "test_lora_use_dora_linear",
    "test_modules_to_save_targets_lora_layer_raises",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fused", action="store_true", help="every layer made in this run is fused")


def pytest_configure(config: pytest.Config) -> None:
    socket.getaddrinfo = _without_network(socket.getaddrinfo)
    if config.getoption("--fused"):
        import fastpeft

        fastpeft.enable()


def _without_network(look_up: Callable[..., Any]) -> Callable[..., Any]:
    def getaddrinfo(host: str | None, *args: Any, **kwargs: Any) -> Any:
        if host in (None, "localhost", "127.0.0.1", "::1", socket.gethostname()):
            return look_up(host, *args, **kwargs)
        pytest.skip(f"asks {host}")

    return getaddrinfo


@pytest.fixture(autouse=True, scope="session")
def _fused_calls(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    from fastpeft.peft.layers import FusedForward

    run, calls = FusedForward._run, 0

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(*args)

    FusedForward._run = counting
    yield
    record_testsuite_property(FUSED, calls)


@pytest.fixture(autouse=True)
def _each_test_asks_the_hub() -> None:
    """Else PEFT's tests take a model for loaded once a test was skipped that asked for it, and fail."""
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES.clear()


class Outcomes(NamedTuple):
    """Of each test: passed, skipped, failure or error."""

    tests: dict[str, str]
    fused_calls: int


def prepared() -> tuple[Path, Path]:
    """The python of an environment with all that PEFT's tests need, and the folder with these tests."""
    archive, version = BUILD / "archive", importlib.metadata.version("peft")
    download = (*("download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"), "-d", str(archive))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, *download, f"peft=={version}"], check=True)
    with tarfile.open(archive / f"peft-{version}.tar.gz") as packed:
        packed.extractall(BUILD, filter="data")
    folder = BUILD / f"peft-{version}"
    (folder / "tests" / "__init__.py").touch()  # the archive lacks it, and the tests import one another
    python = environments.beside(BUILD / "environment", with_pip=True)
    environments.install(python, PACKAGES, "--no-deps")
    return python, folder


def outcomes(python: Path, folder: Path, arguments: tuple[str, ...]) -> Outcomes:
    here = Path(__file__).resolve().parent
    paths = [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}  # it is an error there
    environment |= {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [str(python), "-m", "pytest", *COMMON_ARGUMENTS, f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(f"pytest could not run the tests (exit code {status})")
        root = ElementTree.parse(report).getroot()
    calls = (p.get("value", "") for p in root.iter("property") if p.get("name") == FUSED)
    return Outcomes(
        {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in root.iter("testcase")},
        sum(map(int, calls)),
    )


def _outcome(case: ElementTree.Element) -> str:
    return next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")


def new_failures(stock: Outcomes, fused: Outcomes) -> int:
    """Prints both counts and the differences; how many of these are failures that nothing explains."""
    for title, results in (("stock PEFT", stock.tests), ("fastpeft", fused.tests)):
        counts = {outcome: list(results.values()).count(outcome) for outcome in sorted(set(results.values()))}
        print(f"{title}: {counts}")
    print(f"{FUSED}: {fused.fused_calls}", flush=True)
    unexplained = 0
    for name, after in fused.tests.items():
        before = stock.tests.get(name, "absent")
        if before != after:
            explained = name.endswith(EXPLAINED)
            unexplained += after in ("failure", "error") and not explained
            print(f"{before} -> {after}: {name}" + ", explained in docs/peft.md" * explained, flush=True)
    return unexplained


def main(*arguments: str) -> int:
    python, folder = prepared()
    failures = calls = 0
    for suite in (arguments,) if arguments else SUITES:
        print(*suite, flush=True)
        stock, fused = outcomes(python, folder, suite), outcomes(python, folder, ("--fused", *suite))
        failures += new_failures(stock, fused)
        calls += fused.fused_calls
    return int(failures > 0 or not calls)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

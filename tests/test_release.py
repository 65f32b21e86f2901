"""What is released: archives that install without a network, pages without a warning, the shell's completion."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import environments
import pytest

import fastpeft
from fastpeft import build as building
from fastpeft import extension

ROOT = Path(__file__).resolve().parent.parent
built_alone = pytest.mark.xdist_group("release")  # both archives are made in the checkout


def made(kind: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (archive,) = folder.iterdir()
    return archive


def said(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """What a command prints that is run in ``folder``, away from the checkout."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@built_alone
def test_a_wheel_holds_every_instruction_set_and_checks_itself_where_it_is_installed(tmp_path: Path) -> None:
    wheel = made("wheel", tmp_path / "wheel")
    python = environments.beside(tmp_path / "environment")
    environments.install(python, [wheel], "--no-index", "--no-deps")
    code = "import fastpeft, fastpeft._C; print(fastpeft.__file__); print(*fastpeft._C.isas())"
    where, isas = said([python, "-c", code], tmp_path).splitlines()
    assert Path(where).is_relative_to(tmp_path / "environment")
    assert isas.split() == extension.built().isas()
    command = python.with_name("fastpeft")
    assert said([command, "--version"], tmp_path) == f"fastpeft, version {fastpeft.__version__}\n"
    info = said([command, "info"], tmp_path)
    assert "cpu, float32" in info and "passed" in info and "not available: the C++ extension" not in info
    library = next((tmp_path / "environment").rglob(building.LIBRARY)).read_bytes()
    named = [name.strip("*_.cp").encode() for name in building.MACHINE_FLAGS[os.uname().machine]]
    assert all(name in library for name in named)


@built_alone
def test_nothing_is_compiled_for_the_processor_at_hand_alone() -> None:
    commands = [path.read_text() for path in (ROOT / "build").rglob("*.cmd")]
    assert commands and not any("native" in command.replace(str(ROOT), "") for command in commands)


@built_alone
def test_a_source_archive_holds_all_sources_and_installs_where_there_is_no_compiler(tmp_path: Path) -> None:
    archive = made("sdist", tmp_path / "sdist")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    listing = ["git", "ls-files", "csrc", "fastpeft", "kernels"]
    sources = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert sources and set(sources) <= names
    python = environments.beside(tmp_path / "environment")
    os.environ["CXX"] = "/nonexistent"
    try:
        environments.install(python, [archive], "--no-index", "--no-deps", "--no-build-isolation")
    finally:
        del os.environ["CXX"]
    info = said([python.with_name("fastpeft"), "info"], tmp_path)
    assert "reference, float32" in info and "passed" in info


def test_the_pages_are_made_without_a_warning(tmp_path: Path) -> None:
    options = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html" / "api" / "fastpeft.html").read_text(encoding="utf-8")
    assert all(f'id="fastpeft.{name}"' in page for name in ("patch", "unpatch", "enable", "get_peft_model", "Report"))
    functions = (tmp_path / "html" / "api" / "functional.html").read_text(encoding="utf-8")
    assert "dropout_p" in functions and 'id="fastpeft.functional.lora_update"' in functions


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_ask_for_its_completion(shell: str, tmp_path: Path) -> None:
    module = [sys.executable, "-c", "from fastpeft.cli import main; main(prog_name='fastpeft')"]
    assert "_FASTPEFT_COMPLETE" in said(module, tmp_path, _FASTPEFT_COMPLETE=f"{shell}_source")


def test_completion_knows_commands_and_their_options(tmp_path: Path) -> None:
    module = [sys.executable, "-c", "from fastpeft.cli import main; main(prog_name='fastpeft')"]

    def offered(words: str, last: int) -> set[str]:
        asked = {"_FASTPEFT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(last)}
        return {line.partition(",")[2] for line in said(module, tmp_path, **asked).splitlines()}

    assert offered("fastpeft ", 1) >= {"bench", "build", "compare", "demo", "info"}
    assert "--device" in offered("fastpeft bench --", 2)

"""The rules of the house, read off the sources: what may import what, and where machine knowledge may stand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastpeft"
SOURCE_FOLDERS = ("fastpeft", "csrc", "kernels", "bench", "tests", "examples")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}
MAX_LINES = 500

# From the specification up to what users call: each may import those before it.
LAYERS = ("reference", "judge", "dropout", "four_bit", "call", "extension", "backends", "dispatch", "ops", "norm_cache")
LAYERS += ("usual", "checks", "functional", "nn", "verdicts", "peft", "explain")
# Who may name an instruction set: the backends, the compiler flags of each kernel file, and what `info` shows.
MACHINE_MODULES = {
    PACKAGE / "build.py",
    PACKAGE / "info.py",
    PACKAGE / "experiments/provenance.py",
    *(PACKAGE / "backends").rglob("*.py"),
}
MACHINE_NAMES = re.compile(
    r"avx|amx|\bsse\d|\bneon\b|\bsve\d?\b|vnni|\bsm_?\d\d|\b[abh]\d00\b|cpu_supports|capabilit(y|ies)\b", re.IGNORECASE
)
# Code that a call passes through and that must not choose by size; a comparison with 0, 1 or 2 is about structure.
SIZE_BLIND = ("reference", "call", "dispatch", "ops", "checks", "functional", "nn", "verdicts", "explain", "peft")
LARGEST_STRUCTURAL_NUMBER = 2


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import in a file, with level 0 for absolute ones."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)


def code_words(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every name, attribute and string in a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_the_reference_imports_torch_alone() -> None:
    found = set(imports(PACKAGE / "reference.py"))
    assert (0, "torch") in found
    assert {level for level, _ in found} == {0}
    assert {name.partition(".")[0] for _, name in found} <= {"__future__", "collections", "typing", "torch"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / "triton").glob("*.py")), ids=lambda p: p.stem)
def test_triton_kernels_import_torch_and_triton_alone(path: Path) -> None:
    outside = {name.partition(".")[0] for level, name in imports(path) if level == 0}
    assert outside <= {"__future__", "collections", "dataclasses", "torch", "triton", "typing"}
    assert {level for level, _ in imports(path)} <= {0, 1}
    assert {word for _, word in code_words(path)}.isdisjoint({"autograd", "environ", "getenv"})


def test_the_folder_of_kernels_is_no_package() -> None:
    """A package of this name would hide Hugging Face's, which bitsandbytes and transformers import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("layer", LAYERS)
def test_data_flows_one_way(layer: str) -> None:
    path = PACKAGE / layer
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    allowed = {*LAYERS[: LAYERS.index(layer)], layer}
    for file in files:
        depth = len(file.relative_to(PACKAGE).parts)
        own = {name.partition(".")[0] for level, name in imports(file) if level == depth}
        assert own <= allowed, f"{file.name} imports {own - allowed}"


def inner_imports(path: Path) -> set[Path]:
    """The files of the package that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
            for name in [*names, *([node.module] if node.module else [])]:
                file = folder.joinpath(*name.split(".")).with_suffix(".py")
                found |= {file} if file.is_file() else set()
    return found


def test_no_file_imports_itself_by_way_of_others() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    ahead = {path: inner_imports(path) for path in files}
    while ahead:
        free = [path for path, needed in ahead.items() if not needed & ahead.keys()]
        assert free, f"in circles: {sorted(path.name for path in ahead)}"
        for path in free:
            del ahead[path]


def headers(path: Path) -> set[Path]:
    """The files of csrc/ that one includes."""
    return {(path.parent / name).resolve() for name in re.findall(r'#include "(.+?)"', path.read_text())}


def test_no_header_includes_itself_by_way_of_others() -> None:
    ahead = {path.resolve(): headers(path) for path in (ROOT / "csrc").rglob("*.*")}
    while ahead:
        free = [path for path, needed in ahead.items() if not needed & ahead.keys()]
        assert free, f"in circles: {sorted(path.name for path in ahead)}"
        for path in free:
            del ahead[path]


MOST_PARAMETERS = 8


@pytest.mark.parametrize(
    "path", sorted({*PACKAGE.rglob("*.py"), *(ROOT / "bench").rglob("*.py")}), ids=lambda p: p.stem
)
def test_no_function_takes_more_arguments_by_place_than_a_reader_can_hold(path: Path) -> None:
    """Without ``self`` and ``cls``; what is given by name alone may be more. Calls have nouns, see call.py."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    for function in functions:
        names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        assert len(names) <= MOST_PARAMETERS, f"{path.name}:{function.lineno} takes {', '.join(names)}"


def test_backends_say_what_they_take() -> None:
    """Their arguments have types that mypy can check."""
    for path in (PACKAGE / "backends").rglob("*.py"):
        if path.name == "cuda_kernels.py":  # what the binding of the launchers takes has no types in Python
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Backend"):
                signatures = [part for f in node.body if isinstance(f, ast.FunctionDef) for part in (f.args, f.returns)]
                named = {n.id for part in signatures if part for n in ast.walk(part) if isinstance(n, ast.Name)}
                assert "Any" not in named, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", sorted(set(PACKAGE.rglob("*.py")) - MACHINE_MODULES), ids=lambda p: p.stem)
def test_only_backends_name_instruction_sets_and_gpus(path: Path) -> None:
    assert [word for word in code_words(path) if MACHINE_NAMES.search(word[1])] == []


def test_only_the_kernels_name_instruction_sets_in_cpp() -> None:
    bindings = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.h")]
    assert bindings
    for path in bindings:
        assert MACHINE_NAMES.findall(path.read_text()) == [], path.name


@pytest.mark.parametrize("module", SIZE_BLIND)
def test_only_backends_hold_thresholds(module: str) -> None:
    path = PACKAGE / module
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    numbers = [
        (file.name, node.lineno, side.value)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Constant) and isinstance(side.value, (int, float))
    ]
    assert [number for number in numbers if number[2] > LARGEST_STRUCTURAL_NUMBER] == []


@pytest.mark.parametrize("room", ["cpu", "cuda"])
def test_kernels_in_cpp_know_no_torch(room: str) -> None:
    """The linker may keep the copy of an inline function that was compiled for a newer processor, for every caller; and
    the kernels for GPUs serve any torch. What they include of the rooms above is as ignorant."""
    folder = (ROOT / "csrc" / room / "kernels").resolve()
    ahead, known = list(folder.iterdir()), set[Path]()
    assert len(ahead) > 1
    while ahead:
        path = ahead.pop()
        known.add(path)
        torch_headers = r"#include\s*[<\"](?:torch|ATen|c10%s)\b" % (
            "" if path.name == "binding.cpp" else "|pybind11|Python"
        )
        assert re.findall(torch_headers, path.read_text()) == [], path.name
        ahead += headers(path) - known


def test_cpp_reads_no_environment_variable() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        assert path.is_dir() or "getenv" not in path.read_text(), path.name


def test_files_hold_one_idea() -> None:
    files = [
        path
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCE_SUFFIXES and path.is_file()
    ]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert lines
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


LEAN_IMPORT = """
import sys, torch
before = set(sys.modules)

def refuse(event, args):
    if event.startswith(("subprocess.", "socket.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "urllib.")):
        raise AssertionError(f"import fastpeft does {event} {args}")

def no_cuda(*args, **kwargs):
    raise AssertionError("import fastpeft touches CUDA")

sys.addaudithook(refuse)
for name in ("_lazy_init", "is_available", "device_count", "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, no_cuda)

import fastpeft
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_fastpeft_is_lean() -> None:
    """It starts no process, opens no connection, leaves CUDA alone, and loads nothing but itself and torch."""
    result = subprocess.run([sys.executable, "-c", LEAN_IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split()) - set(sys.stdlib_module_names)
    assert "fastpeft" in loaded
    assert loaded <= {"fastpeft", "torch"}


def test_tests_run_on_poisoned_memory() -> None:
    """An output that a kernel forgets to write is NaN in every test."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(100, dtype=dtype).isnan().all()
        assert torch.ones(3, dtype=dtype).new_empty(100).isnan().all()

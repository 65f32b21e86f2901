"""The build routine on small extensions, and what setup.py makes with and without a compiler."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import kernel_program
import pytest

from fastpeft import build

ROOT = Path(__file__).resolve().parent.parent
MODULE = """
#include <Python.h>
#include "cpu/kernels/answer.h"
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(answer_plain() + answer_avx2()); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
PLAIN = """
#include "answer.h"
#ifdef __AVX__
#error "a file without an instruction set in its name must run on the oldest processor"
#endif
int answer_plain() { return 40; }
"""
AVX2 = """
#include "answer.h"
#if defined(__x86_64__) && !(defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#error "the flags of this instruction set are missing"
#endif
int answer_avx2() { return 2; }
"""

CUDA = """
__global__ void answer_kernel(int* out) { *out = 42; }
int launch_answer(int* out) { answer_kernel<<<1, 1>>>(out); return cudaGetLastError(); }
"""
BINDING = """
#include <pybind11/pybind11.h>
int launch_answer(int*);
PYBIND11_MODULE(FASTPEFT_CUDA_MODULE, m) { m.def("answer", [] { return launch_answer(nullptr); }); }
"""
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="there is no nvcc")

KERNELS = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("kernels_*.cpp"))


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """Sources of extensions that compile in seconds: the layout of csrc/, no header of torch."""
    folder = tmp_path / "csrc"
    (folder / "cpu" / "kernels").mkdir(parents=True)
    (folder / "module.cpp").write_text(MODULE)
    (folder / "cpu" / "kernels" / "answer.h").write_text("int answer_plain();\nint answer_avx2();\n")
    (folder / "cpu" / "kernels" / "answer_plain.cpp").write_text(PLAIN)
    (folder / "cpu" / "kernels" / "answer_avx2.cpp").write_text(AVX2)
    (folder / "cuda" / "kernels").mkdir(parents=True)
    (folder / "cuda" / "kernels" / "answer.cu").write_text(CUDA)
    (folder / "cuda" / "kernels" / "binding.cpp").write_text(BINDING)
    return folder


def build_and_load(csrc: Path) -> int:
    library = csrc.parent / "out" / build.LIBRARY
    build.build(csrc, library, csrc.parent / "objects")
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.answer()


def test_each_file_gets_the_flags_of_its_instruction_set(csrc: Path) -> None:
    assert build_and_load(csrc) == 42


def test_only_what_changed_is_compiled_again(csrc: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_and_load(csrc)
    assert capfd.readouterr().out.count("compiling") == 3
    build_and_load(csrc)
    assert capfd.readouterr().out == ""
    (csrc / "cpu" / "kernels" / "answer_plain.cpp").write_text(PLAIN.replace("40", "50"))
    assert build_and_load(csrc) in (42, 52)  # a process that has loaded the library may keep the old one
    assert capfd.readouterr().out == "compiling csrc/cpu/kernels/answer_plain.cpp\n"
    (csrc / "cpu" / "kernels" / "answer.h").touch()
    build_and_load(csrc)
    assert capfd.readouterr().out.count("compiling") == 3


def test_a_file_that_does_not_compile_is_named_and_the_library_kept(csrc: Path) -> None:
    build_and_load(csrc)
    library = csrc.parent / "out" / build.LIBRARY
    before = library.read_bytes()
    broken = csrc / "cpu" / "kernels" / "answer_plain.cpp"
    broken.write_text("int answer_plain() { return nothing; }\n")
    with pytest.raises(build.BuildError, match=f"{broken} does not compile"):
        build.build(csrc, library, csrc.parent / "objects")
    assert library.read_bytes() == before


def test_missing_sources_and_compilers_are_named(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, objects = csrc.parent / build.LIBRARY, csrc.parent / "objects"
    with pytest.raises(build.BuildError, match=r"no C\+\+ sources in .*nowhere"):
        build.build(csrc.parent / "nowhere", library, objects)
    monkeypatch.setenv("CXX", "/nonexistent/g++ -m64")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: CXX=/nonexistent/g\+\+ -m64 is not there"):
        build.build(csrc, library, objects)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(csrc))
    with pytest.raises(build.BuildError, match=r"none of g\+\+, c\+\+, clang\+\+ is there; install one"):
        build.build(csrc, library, objects)
    assert not library.exists()


def test_the_variable_cxx_chooses_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} --flag")
    assert build.find_compiler() == [sys.executable, "--flag"]


def test_machine_flags_stay_on_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for arm in ("aarch64", "arm64"):
        monkeypatch.setattr(platform, "machine", lambda arm=arm: arm)
        assert build.machine_flags(Path("kernels_avx512.cpp")) == []
        assert build.machine_flags(Path("kernels_neon.cpp")) == []
        assert build.machine_flags(Path("kernels_neon_bf16.cpp")) == ["-march=armv8.2-a+bf16"]
    assert "-mavx2" in build.machine_flags(Path("kernels_avx2.cpp"), "x86_64")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert build.machine_flags(Path("kernels_avx2.cpp")) == build.machine_flags(Path("kernels_neon_bf16.cpp")) == []
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert build.machine_flags(Path("kernels_plain.cpp")) == build.machine_flags(Path("kernels_neon_bf16.cpp")) == []
    assert "-mavx512bf16" in build.machine_flags(Path("kernels_avx512_bf16.cpp"))
    assert "-mavx512bf16" not in build.machine_flags(Path("kernels_avx512.cpp"))
    assert "-mamx-bf16" not in build.machine_flags(Path("kernels_avx512_bf16.cpp"))
    assert {"-mavx512bf16", "-mamx-bf16"} <= set(build.machine_flags(Path("kernels_amx.cpp")))


def test_on_a_mac_clang_is_told_nothing_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    compile_flags, link_flags = build._torch_flags()
    assert "-fopenmp" not in compile_flags
    assert link_flags[-2:] == ["-undefined", "dynamic_lookup"]


@needs_nvcc
def test_the_cuda_part_is_built_where_nvcc_is(csrc: Path) -> None:
    library = csrc.parent / "out" / build.CUDA_LIBRARY
    build.build_cuda(csrc, library, csrc.parent / "objects")
    command = "import _cuda, torch; print(_cuda.answer() == 0, torch.cuda.is_available())"
    ran = subprocess.run([sys.executable, "-c", command], cwd=library.parent, capture_output=True, text=True)
    launched, has_gpu = ran.stdout.split()
    assert launched == has_gpu, ran.stderr  # without a GPU it loads, and the launch has its error


def test_without_nvcc_the_cuda_part_says_what_is_missing(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(csrc))
    assert build.find_nvcc() is None
    with pytest.raises(build.BuildError, match="no nvcc: install CUDA's toolkit or set CUDA_HOME"):
        build.build_cuda(csrc, csrc.parent / build.CUDA_LIBRARY, csrc.parent / "objects")
    too_old = csrc / "bin" / "nvcc"
    too_old.parent.mkdir()
    too_old.write_text("#!/bin/sh\necho sm_52 sm_70\n")
    too_old.chmod(0o755)
    with pytest.raises(build.BuildError, match="nvcc compiles for none of sm_80, sm_90, sm_100: install a newer one"):
        build.build_cuda(csrc, csrc.parent / build.CUDA_LIBRARY, csrc.parent / "objects")


def make_wheel(csrc: Path, **environment: str) -> tuple[set[str], str]:
    """The names in the wheel that setup.py makes of this package over ``csrc``, and what was printed."""
    project = csrc.parent / "project"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for folder in ("fastpeft", "bench", "kernels"):
        shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
    shutil.copytree(csrc, project / "csrc")
    for file in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, project)
    (project / "README.md").write_text("")
    wheels = csrc.parent / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", wheels, project]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = wheels.glob("fastpeft-*.whl")
    return set(zipfile.ZipFile(wheel).namelist()), result.stdout + result.stderr


def test_an_installed_copy_has_the_extension_and_can_build_itself(csrc: Path) -> None:
    names, _ = make_wheel(csrc)
    assert f"fastpeft/{build.LIBRARY}" in names
    assert (f"fastpeft/{build.CUDA_LIBRARY}" in names) == (build.find_nvcc() is not None)
    assert {
        "fastpeft/csrc/module.cpp",
        "fastpeft/csrc/cuda/kernels/answer.cu",
        "fastpeft/csrc/cpu/kernels/answer.h",
        "fastpeft/bench/__init__.py",
    } <= names
    package = ROOT / "fastpeft"
    files = [path.relative_to(ROOT) for suffix in ("py", "json", "typed") for path in package.rglob(f"*.{suffix}")]
    assert {file.as_posix() for file in files} <= names


def test_without_a_compiler_the_install_succeeds_and_says_what_is_missing(csrc: Path) -> None:
    names, output = make_wheel(csrc, CXX="/nonexistent")
    assert f"fastpeft/{build.LIBRARY}" not in names
    assert "fastpeft/ops.py" in names
    assert "installed without fastpeft._C and runs slower: no C++ compiler" in output
    assert "`python -m fastpeft build`" in output


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_instruction_sets_share_no_function(source: Path, tmp_path: Path) -> None:
    """Inline functions and templates become weak symbols, of which the linker keeps one copy for all files: one that
    was compiled for a newer processor would crash an older one."""
    target = tmp_path / "kernels.o"
    command = [*build.find_compiler(), *build.COMPILE_FLAGS, *build.machine_flags(source), "-c", source, "-o", target]
    subprocess.run(command, check=True)
    assert kernel_program.weak_symbols(target) == []

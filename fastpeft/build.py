"""Builds the C++ extension ``fastpeft._C`` from csrc/, and where nvcc is, ``fastpeft._cuda`` from its cuda/kernels.

setup.py loads this file by its path, before fastpeft or torch are there; ``python -m fastpeft build`` builds in place,
from csrc/ of a checkout or from the copy inside an installed package. Nothing but a compiler, Python's headers and
torch is needed. Every file is compiled for the oldest processor of its architecture, save those named after an
instruction set, which run only where the processor has it. The CUDA part knows nothing of torch: it is built beside a
torch without CUDA, too, and needs no GPU.
"""

from __future__ import annotations

import fnmatch
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mbmi2", "-mf16c", "-mfma"]
# GCC 12 warns of its own intrinsics; Clang knows one of the two warnings.
_AVX512 += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
X86_FLAGS = {
    "*_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "*_avx512.cpp": _AVX512,
    "*_avx512_bf16.cpp": [*_AVX512, "-mavx512bf16"],
    "*_amx.cpp": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
ARM_FLAGS = {"*_neon_bf16.cpp": ["-march=armv8.2-a+bf16"]}
MACHINE_FLAGS = {"x86_64": X86_FLAGS, "AMD64": X86_FLAGS, "aarch64": ARM_FLAGS, "arm64": ARM_FLAGS}
# No contraction: a product and a sum that are written as two roundings stay two, as in bitsandbytes' statistics.
COMPILE_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-ffp-contract=off"]
COMPILERS = ("g++", "c++", "clang++")
LIBRARY = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
CUDA_LIBRARY = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
CUDA_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Each serves the later minor versions of its major one; newer GPUs compile the last one's PTX when they load it.
CUDA_ARCHITECTURES = ("80", "90", "100")
HARMLESS = "(C7519)"  # ptxas puts a fence of its own before a product of the matrix units


class BuildError(RuntimeError):
    """The extension cannot be built; the message says what is missing and how to add it."""


def build_in_place() -> None:
    """Builds the extensions beside this file, where ``import fastpeft`` finds them, and prints their paths.

    Raises:
        BuildError: sources, compiler, Python's headers or torch are missing, or a file does not compile.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent / "csrc"
    with tempfile.TemporaryDirectory() as folder:
        csrc, objects = (checkout, package.parent / "build") if checkout.is_dir() else (package / "csrc", Path(folder))
        wanted = [(build, LIBRARY, "C"), *([(build_cuda, CUDA_LIBRARY, "cuda")] if find_nvcc() else [])]
        failures = []
        for builder, library, name in wanted:
            try:
                builder(csrc, package / library, objects / name)
                print(f"built {package / library}", flush=True)
            except BuildError as failure:  # one serves without the other
                failures.append(str(failure))
        if failures:
            raise BuildError("\n".join(dict.fromkeys(failures)))


def build(csrc: Path, library: Path, objects: Path) -> None:
    """Compiles all of csrc but ``csrc/cuda/kernels`` and links it.

    Args:
        csrc: the folder with the sources.
        library: the file to write; replaced only when all went well.
        objects: folder for object files; those that are newer than their sources and headers are used again.

    Raises:
        BuildError: as for :func:`build_in_place`.
    """
    sources = [path for folder in ("", "cpu", "cpu/kernels", "cuda") for path in sorted((csrc / folder).glob("*.cpp"))]
    compiler = find_compiler()
    compile_flags, link_flags = _torch_flags()

    def command(source: Path) -> list[str]:
        return [*compiler, *COMPILE_FLAGS, *machine_flags(source), *compile_flags]

    compile_and_link(csrc, sources, command, [*compiler, "-shared"], link_flags, library, objects)


def build_cuda(csrc: Path, library: Path, objects: Path) -> None:
    """Compiles ``csrc/cuda/kernels`` and links it with CUDA's runtime; arguments and errors are :func:`build`'s."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc: install CUDA's toolkit or set CUDA_HOME to it, then run `python -m fastpeft build`")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    architectures = [name for name in CUDA_ARCHITECTURES if f"sm_{name}" in known]
    if not architectures:
        raise BuildError(f"{nvcc} compiles for none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}: install a newer one")
    # Hopper's own instructions are those of sm_90a alone, which only Hopper has.
    exact = [name + "a" * (name == "90") for name in architectures]
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in exact]
    targets.append("-gencode=arch=compute_{0},code=compute_{0}".format(architectures[-1]))
    compiler = [nvcc, "-ccbin", find_compiler()[0], *CUDA_FLAGS]
    binding = [*compiler, "-DFASTPEFT_CUDA_MODULE=_cuda", *pybind_flags()]

    def command(source: Path) -> list[str]:
        return [*compiler, *targets] if source.suffix == ".cu" else binding

    compile_and_link(csrc, cuda_sources(csrc), command, [*compiler, "-shared"], [], library, objects)


def cuda_sources(csrc: Path) -> list[Path]:
    """The files of the CUDA part: kernels with their launchers, and the binding."""
    return [*sorted(csrc.glob("cuda/kernels/*.cu")), *sorted(csrc.glob("cuda/kernels/*.cpp"))]


def compile_and_link(
    csrc: Path,
    sources: Sequence[Path],
    command: Callable[[Path], list[str]],
    linker: Sequence[str],
    link_flags: Sequence[str],
    library: Path,
    objects: Path,
) -> None:
    """Compiles the sources in parallel, each by its ``command``, and links them; see :func:`build`."""
    if not sources:
        raise BuildError(f"no C++ sources in {csrc}: install fastpeft from a checkout or a source archive")
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = objects / "_".join(source.relative_to(csrc).with_suffix(".o").parts)
        full = [*command(source), "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
        if not _is_fresh(target, full):
            print(f"compiling {source.relative_to(csrc.parent)}", flush=True)
            _run(full, f"{source} does not compile")
            target.with_suffix(".cmd").write_text(shlex.join(full))
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        compiled = [str(path) for path in pool.map(compile_one, sources)]
    linked = library.with_name(library.name + ".new")
    _run([*linker, *compiled, *link_flags, "-o", str(linked)], f"{library.name} does not link")
    linked.replace(library)


def machine_flags(source: Path, machine: str | None = None) -> list[str]:
    """The flags of a source file named after an instruction set of ``machine``, by default the one this runs on."""
    patterns = MACHINE_FLAGS.get(machine or platform.machine(), {})
    return [flag for pattern, flags in patterns.items() if fnmatch.fnmatch(source.name, pattern) for flag in flags]


def find_compiler() -> list[str]:
    """The command of the C++ compiler: the variable ``CXX``, or the first of ``COMPILERS`` that is there."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if shutil.which(command[0]) is not None:
            return command
    missing = f"CXX={shlex.join(wanted)} is not there" if wanted else f"none of {', '.join(COMPILERS)} is there"
    raise BuildError(
        f"no C++ compiler: {missing}; install one (Debian, Ubuntu: apt install g++), "
        "then run `python -m fastpeft build`"
    )


def find_nvcc() -> str | None:
    """CUDA's compiler: under the variable ``CUDA_HOME``, or on the path; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def pybind_flags() -> list[str]:
    """Flags to compile against Python and the pybind11 that torch brings."""
    compile_flags, _ = _torch_flags()
    return [flag for flag in compile_flags if not flag.startswith("-D") and flag != "-fopenmp"]


def _torch_flags() -> tuple[list[str], list[str]]:
    """Flags to compile against Python and torch, and to link against torch."""
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        raise BuildError(
            f"no Python.h in {headers}: install Python's headers (Debian, Ubuntu: apt install python3-dev), "
            "then run `python -m fastpeft build`"
        )
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise BuildError(f"torch does not import ({error}): install it, then run `python -m fastpeft build`") from error
    compile_flags = [flag for path in (*cpp_extension.include_paths(), headers) for flag in ("-isystem", path)]
    compile_flags += [
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    link_flags = [f"-L{path}" for path in cpp_extension.library_paths()]
    link_flags += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    if sys.platform == "darwin":
        link_flags += ["-undefined", "dynamic_lookup"]
    else:
        # Not for the link: one thread pool, so the OpenMP runtime has to be the one that torch brings.
        compile_flags.append("-fopenmp")
    return compile_flags, link_flags


def _is_fresh(target: Path, command: list[str]) -> bool:
    """Whether ``target`` was made by this very command and after the last change of its source and headers."""
    made_by, dependencies = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not target.exists() or not made_by.exists() or made_by.read_text() != shlex.join(command):
        return False
    made_at = target.stat().st_mtime
    files = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split()
    return all(os.path.exists(file) and os.path.getmtime(file) < made_at for file in files)


def _run(command: list[str], failure: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{failure}:\n{shlex.join(command)}\n{result.stderr}")
    said = [line for line in result.stderr.splitlines() if line and HARMLESS not in line]
    if said:
        print("\n".join(said), file=sys.stderr)

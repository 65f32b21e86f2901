"""The CUDA kernels without a GPU: built by the C++ compiler with csrc/cuda/kernels/emulation.h, threads as fibers."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastpeft import build, extension
from fastpeft.backends.gpu import compose, cuda
from fastpeft.backends.gpu.cuda_kernels import CudaKernels

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-x", "c++", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-DFASTPEFT_EMULATE"]
build_name = "cuda-emulation"


def load(name: str, library: Path) -> ModuleType:
    """The extension module ``name`` that ``library`` holds."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(csrc: Path, sources: list[Path], name: str, folder: Path) -> ModuleType:
    """An extension of kernels and a binding, emulated."""
    compiler, headers = build.find_compiler(), ["-I", str(ROOT / "csrc" / "cuda" / "kernels"), *build.pybind_flags()]
    command = [*compiler, *FLAGS, f"-DFASTPEFT_CUDA_MODULE={name}", *headers]
    library = folder / f"{name}.so"
    build.compile_and_link(csrc, sources, lambda _: command, [*compiler, "-shared"], [], library, folder)
    return load(name, library)


def use_flags(name: str, flags: Sequence[str]) -> None:
    """From now on the kernels are compiled with these flags, too, in a folder of this name below build/."""
    global build_name
    build_name = name
    FLAGS.extend(flags)


@functools.cache
def library() -> ModuleType:
    """``fastpeft._cuda``, emulated."""
    csrc, folder = ROOT / "csrc", ROOT / "build" / build_name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one of several test processes compiles it
        fcntl.flock(lock, fcntl.LOCK_EX)
        return compiled(csrc, build.cuda_sources(csrc), "_cuda_emulated", folder)


def use(monkeypatch: pytest.MonkeyPatch) -> CudaKernels:
    """The CUDA backend takes calls on CPU tensors; gives its kernels one by one."""
    monkeypatch.setattr(extension, "cuda", library)
    monkeypatch.setattr(cuda, "launchers", library().launchers)
    monkeypatch.setattr(cuda, "place_of", lambda tensor: (0, 0))
    monkeypatch.setattr(cuda.CudaBackend, "refuses", lambda self, *operands: compose.refusal(*operands))
    return CudaKernels(library())


@contextlib.contextmanager
def fences() -> Iterator[Callable[[Tensor], Tensor]]:
    """Copies of tensors, each ending (up to 16 bytes of alignment) before a page that must not be touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    kept: list[mmap.mmap] = []

    def fenced(tensor: Tensor) -> Tensor:
        size = -(-tensor.numel() * tensor.element_size() // 16) * 16
        pages = -(-size // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        kept.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
        if not tensor.numel():
            return tensor
        at = pages * mmap.PAGESIZE - size
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at).view(tensor.shape)
        return copy.copy_(tensor)

    yield fenced

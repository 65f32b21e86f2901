"""The compiled extensions, loaded here and nowhere else: ``fastpeft._C`` with the ops in C++, and at the first look
``fastpeft._cuda`` with the kernels for NVIDIA GPUs. See build.py."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

C: ModuleType | None = None
_load_error = ""
try:
    C = import_module("fastpeft._C")
except ImportError as error:
    _load_error = str(error)


def missing() -> str | None:
    """Why there is no ``fastpeft._C``; None where there is."""
    if C is None:
        return f"the C++ extension is not built ({_load_error}); `python -m fastpeft build` builds it"
    return None


def built() -> ModuleType:
    """``fastpeft._C``, where :func:`missing` gives None."""
    assert C is not None
    return C


@lru_cache
def cuda() -> ModuleType:
    """``fastpeft._cuda``, loaded at the first look: importing fastpeft leaves CUDA alone."""
    return import_module("fastpeft._cuda")


@lru_cache
def cuda_missing() -> str | None:
    """Why there is no ``fastpeft._cuda``; looked for once, as every call asks."""
    try:
        cuda()
    except ImportError as error:
        return f"the CUDA extension is not built ({error}); `python -m fastpeft build` builds it where nvcc is found"
    return None

"""Which backend takes a call, and why the others refused.

The order of preference is cpu (on CPUs), cuda, triton (on NVIDIA GPUs), reference. An explicit request that cannot be
met raises with the reason; an automatic choice falls through, and :func:`refusals` is what ``explain``, the report and
``fastpeft info`` show.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from .backends.base import Backend
from .backends.cpu import CpuBackend
from .backends.gpu.cuda import CudaBackend
from .backends.gpu.triton import TritonBackend
from .backends.reference import ReferenceBackend

BACKENDS: tuple[Backend, ...] = (CpuBackend(), CudaBackend(), TritonBackend(), ReferenceBackend())
_BY_NAME = {backend.name: backend for backend in BACKENDS}
OLDER_NAMES = {"native": "cpu"}  # what a backend was called before
_warned: set[str] = set()


class BackendRefusal(RuntimeError):
    """The backend that was asked for by name cannot take this call; the message says why."""


def check_backend_name(backend: object) -> None:
    """Raises TypeError or ValueError when ``backend`` is neither None nor a known backend's name."""
    if backend is None:
        return
    if not isinstance(backend, str):
        raise TypeError(f"backend must be None or a backend's name, got {type(backend).__name__}")
    if backend not in _BY_NAME and backend not in OLDER_NAMES:
        raise ValueError(f"backend must be None or one of {sorted(_BY_NAME)}, got {backend!r}")


def named(backend: str) -> Backend:
    """The backend of this name, or of one that it had before."""
    return _BY_NAME[OLDER_NAMES.get(backend, backend)]


def refusals(x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> dict[str, str | None]:
    """Every backend in order of preference with the reason why it refuses this call, None when it takes it."""
    return {backend.name: backend.refuses(x, weight, factors) for backend in BACKENDS}


def choose(op: str, x: Tensor, weight: Tensor, factors: Sequence[Tensor], requested: str | None) -> Backend:
    """The backend that runs ``op``: the one requested, or else the first that does not refuse.

    Args:
        x, weight, factors: see :meth:`fastpeft.backends.base.Backend.refuses`.

    Raises:
        BackendRefusal: the requested backend cannot take the call.
    """
    if requested is not None:
        backend = named(requested)
        reason = backend.refuses(x, weight, factors)
        if reason is not None:
            raise BackendRefusal(f"backend={requested!r} cannot run {op}: {reason}")
        return backend
    for backend in BACKENDS:
        reason = backend.refuses(x, weight, factors)
        if reason is None:
            return backend
        if backend.name not in _warned and backend.worth_a_warning(x):
            _warned.add(backend.name)
            warnings.warn(f"fastpeft runs without its {backend.name} kernels: {reason}", stacklevel=2)
    raise AssertionError("the reference backend takes every call")


def watcher(tensor: Tensor) -> Backend | None:
    """The backend that takes fingerprints of tensors like this one; None where there is none."""
    return next((backend for backend in BACKENDS if backend.watches(tensor)), None)

"""Which backend takes a call, and why the others refused.

The order of preference is native (on CPUs), cuda, triton (on NVIDIA GPUs), reference. An explicit request that cannot
be met raises with the reason; an automatic choice falls through, and :func:`refusals` is what ``explain``, the report
and ``fastpeft info`` show.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from .backends import cuda, native, reference, triton

BACKENDS: tuple[ModuleType, ...] = (native, cuda, triton, reference)
_BY_NAME = {backend.NAME: backend for backend in BACKENDS}
_warned: set[str] = set()


class BackendRefusal(RuntimeError):
    """The backend that was asked for by name cannot take this call; the message says why."""


def check_backend_name(backend: str | None) -> None:
    """Raises ValueError when ``backend`` is neither None nor a known backend's name."""
    if backend is not None and backend not in _BY_NAME:
        raise ValueError(f"backend must be None or one of {sorted(_BY_NAME)}, got {backend!r}")


def named(backend: str) -> ModuleType:
    """The backend of this name."""
    return _BY_NAME[backend]


def refusals(op: str, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> dict[str, str | None]:
    """Every backend in order of preference with the reason why it refuses this call, None when it takes it."""
    return {backend.NAME: _refusal(backend, op, x, weight, A, B) for backend in BACKENDS}


def choose(
    op: str, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], requested: str | None
) -> ModuleType:
    """The backend that runs ``op``: the one requested, or else the first that does not refuse.

    Raises:
        BackendRefusal: the requested backend cannot take the call.
    """
    if requested is not None:
        backend = _BY_NAME[requested]
        reason = _refusal(backend, op, x, weight, A, B)
        if reason is not None:
            raise BackendRefusal(f"backend={requested!r} cannot run {op}: {reason}")
        return backend
    for backend in BACKENDS:
        reason = _refusal(backend, op, x, weight, A, B)
        if reason is None:
            return backend
        if backend.NAME not in _warned and backend.worth_a_warning(x):
            _warned.add(backend.NAME)
            warnings.warn(f"fastpeft runs without its {backend.NAME} kernels: {reason}", stacklevel=2)
    raise AssertionError("the reference backend takes every call")


def _refusal(
    backend: ModuleType, op: str, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]
) -> str | None:
    reason = backend.refuses(op, x, weight, A, B)
    return f"it has no {op}" if reason is None and not hasattr(backend, op) else reason

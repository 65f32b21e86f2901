"""A better matrix product and a better bfloat16 for Triton's interpreter, for tests alone.

Its own product adds up in the order of numpy's, which is no GPU's, and takes bfloat16, which it holds as uint16, for
integers; its own conversion to bfloat16 cuts bits off. Here a tile's product is exact and rounded once to float32, and
conversions round to nearest even. All other arithmetic in bfloat16 stays wrong: kernels do none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from fastpeft.backends.gpu import triton


def exact(handle: Any) -> np.ndarray[Any, Any]:
    """The values of an interpreted tensor in float64."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return handle.data.astype(np.float64)


def dot(builder: object, a: Any, b: Any, sums: Any, *settings: object) -> TensorHandle:
    """``a · b + sums``."""
    product = np.matmul(exact(a), exact(b)).astype(sums.data.dtype)
    return TensorHandle(product + sums.data, sums.dtype.scalar)


_cast = InterpreterBuilder.cast_impl


def cast(builder: Any, handle: Any, dtype: Any) -> TensorHandle:
    """The values in another dtype; bfloat16 by torch."""
    kinds = handle.dtype.scalar, dtype.scalar
    if kinds != (tl.float32, tl.bfloat16):
        return _cast(builder, handle, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(handle.data)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


_set_program = InterpreterBuilder.set_grid_idx


def set_program_backwards(builder: Any, x: int, y: int, z: int) -> None:
    """The last program comes first."""
    _set_program(builder, *(size - 1 - at for size, at in zip(builder.grid_dim, (x, y, z), strict=True)))


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts them in the place of the interpreter's, and lets the backend take calls on CPU tensors, bfloat16 too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    # It would copy each tensor's whole memory onto itself after a launch.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    monkeypatch.setattr("fastpeft.backends.gpu.triton.INTERPRETED_DTYPES", triton.DTYPES)

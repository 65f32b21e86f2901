"""Times ``fastpeft::lora_linear`` and its backward alone, by backend: what two commits are compared with.

``make microbench ARGS=--benchmark-autosave`` on each commit, then ``.venv/bin/pytest-benchmark compare``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft import ops
from fastpeft.dispatch import BACKENDS

RANK = 16
SHAPES = ((1, 2048, 2048), (512, 1024, 1024), (512, 2048, 2048))
AVAILABLE = [backend.name for backend in BACKENDS if backend.unavailable() is None]

pytestmark = [
    pytest.mark.parametrize("backend", AVAILABLE),
    pytest.mark.parametrize("dropout", [0.0, 0.05], ids=["p0", "p0.05"]),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"]),
    pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape))),
]


def operands(shape: tuple[int, int, int], dtype: torch.dtype, dropout: float) -> dict[str, Any]:
    """What forward and backward share; float32 adapters, as PEFT has them."""
    M, K, N = shape
    torch.manual_seed(0)
    return {
        "x": torch.randn(M, K).to(dtype),
        "weight": (torch.randn(N, K) / K**0.5).to(dtype),
        "quant": [],
        "blocksize": 0,
        "A": [torch.randn(RANK, K) / K**0.5],
        "B": [torch.randn(N, RANK) / RANK**0.5],
        "c": [],
        "scaling": [2.0],
        "dropout_p": [dropout],
        "seed": torch.zeros(1, dtype=torch.int64) if dropout else None,
        "adapter_index": None,
    }


@torch.no_grad()
def test_lora_linear(
    benchmark: Any, shape: tuple[int, int, int], dtype: torch.dtype, dropout: float, backend: str
) -> None:
    inputs = operands(shape, dtype, dropout)
    benchmark.group = f"forward {'x'.join(map(str, shape))} {dtype} dropout {dropout:g}"
    y, _, _ = benchmark(ops.lora_linear, bias=None, keep_z=False, backend=backend, **inputs)
    assert y.isfinite().all()


@torch.no_grad()
def test_lora_linear_backward(
    benchmark: Any, shape: tuple[int, int, int], dtype: torch.dtype, dropout: float, backend: str
) -> None:
    """``dx``, ``dA`` and ``dB``: the weight and the bias are frozen."""
    inputs = operands(shape, dtype, dropout)
    benchmark.group = f"backward {'x'.join(map(str, shape))} {dtype} dropout {dropout:g}"
    _, u, _ = ops.lora_linear(bias=None, keep_z=False, backend=backend, **inputs)
    dy = torch.randn(shape[0], shape[2]).to(dtype)
    needs = [True, False, False, True, True]
    grads: list[Tensor] = benchmark(ops.lora_linear_backward, dy=dy, u=u, z=[], needs=needs, backend=backend, **inputs)
    assert all(grad.isfinite().all() for grad in grads)

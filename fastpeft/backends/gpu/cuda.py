"""The CUDA backend: NVIDIA GPUs, with the kernels of csrc/cuda/kernels and the vendor's products, put together in C++
(csrc/cuda/lora_linear.cpp): Python would take longer with its launches than the GPU does with most layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ... import extension
from ...call import Adapters, Weight
from ..compiled import STACKED, CompiledBackend
from . import compose, grouped
from .grouped import GroupedProducts

HOPPER = (9, 0)


class CudaBackend(GroupedProducts, CompiledBackend):
    """The seed, the masks and DoRA's factors stay on the GPU: nothing waits for it."""

    name = "cuda"
    device = "cuda"

    def unavailable(self) -> str | None:
        return _missing() or (None if torch.cuda.is_available() else "torch finds no NVIDIA GPU")

    def detail(self) -> str:
        return ", ".join(_products(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count()))

    def refuses(self, x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
        if x.device.type != "cuda":
            return f"it runs on NVIDIA GPUs, and x is on {x.device}"
        if weight.dim() == STACKED:
            return _missing() or compose.untried() or grouped.refusal(x, weight)
        return _missing() or compose.refusal(x, weight, factors)

    def describe(self, weight: Weight, adapters: Adapters, dtype: torch.dtype) -> str:
        device = weight.data.device
        hopper = dtype != torch.float32 and device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
        return _products(HOPPER if hopper else (0, 0))

    def where(self, x: Tensor) -> tuple[int, int, int]:
        return launchers(), *place_of(x)


def place_of(tensor: Tensor) -> tuple[int, int]:
    """The index of its GPU, and torch's current stream there."""
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


@lru_cache
def launchers() -> int:
    """The address of their table, for C++."""
    return extension.cuda().launchers()


def _missing() -> str | None:
    return extension.missing() or extension.cuda_missing()


def _products(capability: tuple[int, int]) -> str:
    if capability == HOPPER:
        return "x Wᵀ with the low-rank part in the same sums, from 129 tokens on"
    return "the vendor's x Wᵀ, the low-rank part added in one pass"

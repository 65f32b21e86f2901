"""Where the GPU backends' tests run: on a GPU where there is one, else on CPU tensors, interpreted or emulated."""

from __future__ import annotations

from typing import Any

import torch
from oracle import LoraInputs, Results, fused

from fastpeft import nf4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(inputs: LoraInputs, backend: str) -> Results:
    """``y`` and every gradient by the backend, on the CPU again."""
    return {name: result.cpu() for name, result in fused(on_device(inputs), backend).items()}


def on_device(inputs: LoraInputs) -> LoraInputs:
    """The same numbers where the backend runs."""
    return LoraInputs(**{name: moved_to(DEVICE, value) for name, value in vars(inputs).items()})


def moved_to(device: str, value: Any) -> Any:
    """A tensor, a list of them or a 4-bit weight on ``device``, strides kept; anything else as it is."""
    if device == "cpu":
        return value
    if isinstance(value, torch.Tensor):
        span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        if value.numel() == 0:
            return value.to(device)
        return value.as_strided((span,), (1,)).to(device).as_strided(value.shape, value.stride())
    if isinstance(value, (list, tuple)):
        return type(value)(moved_to(device, each) for each in value)
    if isinstance(value, nf4.FourBit):
        return nf4.FourBit(**{name: moved_to(device, each) for name, each in vars(value).items()})
    return value

"""Where the GPU backends' tests run: on a GPU where there is one, else on CPU tensors, interpreted or emulated."""

from __future__ import annotations

import torch
from oracle import DEVICE, LoraInputs, Results, fused, moved_to

__all__ = ["DEVICE", "DTYPES", "moved_to", "on_device", "run"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(inputs: LoraInputs, backend: str) -> Results:
    """``y`` and every gradient by the backend, on the CPU again."""
    return {name: result.cpu() for name, result in fused(on_device(inputs), backend).items()}


def on_device(inputs: LoraInputs) -> LoraInputs:
    """The same numbers where the backend runs."""
    return inputs.to(DEVICE)

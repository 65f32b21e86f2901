"""What the backends ``cpu`` and ``cuda`` share: both call the ops in C++ (csrc/ops.h), and say where a call runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extension
from ..call import Adapters, Kept, Needs, Weight
from .base import Backend, Forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_THE_CPU = (0, 0, 0)
STACKED = 3  # dimensions of the factors of experts that are stacked


def operand_refusal(x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
    """Why no backend but the reference can take a call with such operands, on whatever device; None when they can."""
    if x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 or float16, and x is {x.dtype}"
    if weight.numel() == 0:
        return f"weight is empty, {list(weight.shape)}"
    if weight.dtype not in DTYPES and weight.dtype != torch.uint8:  # the bytes of a 4-bit weight
        return f"it takes a weight in float32, bfloat16, float16 or 4 bits, and it is {weight.dtype}"
    for tensor in factors:
        if tensor.dtype not in DTYPES:
            return f"it takes adapters in float32, bfloat16 or float16, and one is {tensor.dtype}"
    return None


class CompiledBackend(Backend):
    """The ops of ``fastpeft._C``."""

    def where(self, x: Tensor) -> tuple[int, int, int]:
        """What C++ runs a call by: the table of the GPU's launchers, the GPU and its current stream; zeros on a CPU."""
        return ON_THE_CPU

    def lora_linear(self, x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool) -> Forward:
        return extension.built().lora_linear(self.where(x), x, weight, bias, adapters, keep_z)

    def with_gradient(
        self, x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool
    ) -> Tensor | None:
        return extension.built().lora_linear_with_gradient(self.where(x), x, weight, bias, adapters, keep_z)

    def lora_linear_backward(
        self, dy: Tensor, x: Tensor | None, weight: Weight, adapters: Adapters, kept: Kept, needs: Needs
    ) -> list[Tensor]:
        return extension.built().lora_linear_backward(self.where(dy), dy, x, weight, adapters, kept, needs)

    def dora_norm(self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        return extension.built().dora_norm(self.where(A), weight, A, B, scaling, dtype)

"""The backend for CPUs: the kernels of csrc/cpu, one set for each instruction set, and the vendor's products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import extension
from ..call import Adapters, Kept, Needs, NormCall, Weight
from .base import PARTS, Forward
from .compiled import DTYPES, STACKED, CompiledBackend, operand_refusal

SHOWN_TOKENS = (1, 512)
# Reading a part of W for its fingerprint is little beside the product with W of so many tokens, or beside any call.
TOKENS_A_PART = 256
READ_AT_ONCE_BYTES = 1 << 15


class CpuBackend(CompiledBackend):
    """Which plan computes a product with W is chosen in csrc/cpu/plan.cpp."""

    name = "cpu"
    device = "cpu"

    def unavailable(self) -> str | None:
        return extension.missing()

    def detail(self) -> str:
        C = extension.built()
        return f"{C.isa()} kernels (this machine runs: {', '.join(C.isas())})"

    def refuses(self, x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
        if extension.C is None:
            return extension.missing()
        if x.device.type != "cpu":
            return f"it runs on CPU, and x is on {x.device}"
        if weight.dim() == STACKED and 1 not in weight.stride()[1:]:
            return f"it takes experts with contiguous rows or columns, and the weight's strides are {weight.stride()}"
        return operand_refusal(x, weight, factors)

    def worth_a_warning(self, x: Tensor) -> bool:
        return extension.C is None and x.device.type == "cpu" and x.dtype in DTYPES

    def describe(self, weight: Weight, adapters: Adapters, dtype: torch.dtype) -> str:
        C, (N, K), plans = extension.built(), adapters.shape, []
        for tokens in SHOWN_TOKENS:
            forward, backward = (
                C.plan(torch.empty((tokens, columns), dtype=dtype), weight, adapters, back).name
                for columns, back in ((K, False), (N, True))
            )
            plans.append(f"{tokens} token{'s' * (tokens > 1)}: {forward} forward, {backward} backward")
        return f"{C.isa()} kernels, plans {'; '.join(plans)}"

    def lora_grouped_linear(
        self, x: Tensor, offsets: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool
    ) -> Forward:
        return extension.built().lora_grouped_linear(x, offsets, weight, bias, adapters, keep_z)

    def lora_grouped_linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        offsets: Tensor,
        weight: Weight,
        adapters: Adapters,
        kept: Kept,
        needs: Needs,
    ) -> list[Tensor]:
        return extension.built().lora_grouped_linear_backward(dy, x, offsets, weight, adapters, kept, needs)

    def dora_grouped_norm(self, call: NormCall) -> Tensor:
        return extension.built().dora_grouped_norm(*call)

    def watches(self, tensor: Tensor) -> bool:
        return extension.C is not None and tensor.device.type == "cpu"

    def fingerprint(self, small: list[Tensor], large: list[Tensor], first: int = 0, count: int = PARTS) -> bytes:
        return extension.built().fingerprint(small, large, first, count)

    def parts_watched(self, weight: Tensor, tokens: int) -> int:
        if weight.nbytes <= READ_AT_ONCE_BYTES:
            return PARTS
        return min(PARTS, 1 << max(1, tokens // TOKENS_A_PART).bit_length() - 1)

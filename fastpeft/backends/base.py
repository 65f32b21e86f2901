"""The class that every backend inherits: what it says of a call (can it take it, why not) and the ops it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..call import Adapters, Kept, Needs, NormCall, Weight

Forward = tuple[Tensor, Tensor, list[Tensor]]
PARTS = 32  # that a fingerprint divides a large tensor into; kFingerprintParts of the extension


class Backend(Protocol):
    """One way to compute the ops; those that inherit say only what is not so by default.

    Attributes:
        name: what users ask for it by.
        device: the type of the device that the self-check runs it on.
    """

    name: str
    device: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all; None when it can."""
        return None

    def detail(self) -> str:
        """What ``fastpeft info`` says of it where it is available."""
        return ""

    def refuses(self, x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
        """Why this backend cannot take a call; None when it can.

        Args:
            x: the input; ``dy`` in a backward op.
            weight: ``W``, or the bytes of one in 4 bits.
            factors: every adapter's A and B.
        """
        return None

    def worth_a_warning(self, x: Tensor) -> bool:
        """Whether a user should hear once that calls like this one are refused."""
        return False

    def describe(self, weight: Weight, adapters: Adapters, dtype: torch.dtype) -> str:
        """How a layer would be computed, for ``explain``; empty where there is one way alone."""
        return ""

    def watches(self, tensor: Tensor) -> bool:
        """Whether :meth:`fingerprint` reads tensors like this one cheaply."""
        return False

    def fingerprint(self, small: list[Tensor], large: list[Tensor], first: int = 0, count: int = PARTS) -> bytes:
        """Numbers of eight bytes that depend on all bytes of contiguous tensors and on their places. Version counters
        do not see what is written through ``.data`` or through another view's storage.

        Args:
            large: their memory is divided into :data:`PARTS` parts, each from all over it.
            first, count: the parts that are read.

        Returns:
            One number of the ``small`` tensors together, then ``count`` of each of the ``large`` ones.
        """
        return b""

    def parts_watched(self, weight: Tensor, tokens: int) -> int:
        """How many parts of a weight, a power of two, a call with so many tokens can read without taking notably
        longer."""
        return PARTS

    def lora_linear(self, x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool) -> Forward:
        """``y``, ``u`` and each ``z``, see ops.py."""

    def with_gradient(
        self, x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool
    ) -> Tensor | None:
        """``y`` of :meth:`lora_linear` with an autograd node of the backend's own; None where it has none."""
        return None

    def lora_linear_backward(
        self, dy: Tensor, x: Tensor | None, weight: Weight, adapters: Adapters, kept: Kept, needs: Needs
    ) -> list[Tensor]:
        """The gradients that ``needs`` asks for, see ops.py."""

    def lora_grouped_linear(
        self, x: Tensor, offsets: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool
    ) -> Forward:
        """The same of stacked experts, see ops.py; who has no such kernels refuses three-dimensional factors."""
        raise AssertionError(f"{self.name} refuses stacked experts")

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
        """The gradients that ``needs`` asks for, see ops.py."""
        raise AssertionError(f"{self.name} refuses stacked experts")

    def dora_norm(self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        """``‖W + s B A‖`` of each row, see ops.py."""

    def dora_grouped_norm(self, call: NormCall) -> Tensor:
        """The same of stacked experts, one after the other: ``s B A`` of all would be as large as their stack."""
        return torch.stack([self.dora_norm(*each) for each in call.experts()])

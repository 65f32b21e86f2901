"""Which kernels a backend for GPUs has to bring, and their arguments; compose.py puts the ops together out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...call import Weight
from ...dropout import dropout_scale, dropout_threshold
from .plans import Plan


class Mask(NamedTuple):
    """One adapter's dropout; a threshold of 0 drops nothing. ``seed`` stays on the GPU."""

    threshold: int
    factor: float
    seed: Tensor | None

    @classmethod
    def of(cls, p: float, seed: Tensor | None, adapter: int) -> Mask:
        if seed is None:
            return NO_MASK
        threshold = dropout_threshold(p)
        return cls(threshold, dropout_scale(p) if threshold else 1.0, seed.select(0, adapter))


NO_MASK = Mask(0, 1.0, None)


class Tail(NamedTuple):
    """What follows a product: ``scale q [M, r] · right [N, r]ᵀ`` is added (``q`` float32), where dropout keeps it when
    ``threshold`` is not 0; then DoRA's ``c [N]`` and its ``z [M, N]``, and the bias ``[N]``."""

    q: Tensor
    right: Tensor
    scale: float
    threshold: int = 0
    seed: Tensor | None = None
    c: Tensor | None = None
    z: Tensor | None = None
    bias: Tensor | None = None


class GroupedTail(NamedTuple):
    """What follows each expert's product: of every adapter ``scale q [T, r] · right [E, N, r]ᵀ`` (``q`` float32) where
    its mask keeps it, then the bias ``[E, N]``, contiguous."""

    q: Sequence[Tensor]
    right: Sequence[Tensor]
    scales: Sequence[float]
    masks: Sequence[Mask]
    bias: Tensor | None = None


class GroupedSums(NamedTuple):
    """Sums over an expert's rows: ``scale qᵀ (keep ∘ wide)`` of ``q [T, r]``, whose rows are contiguous, and
    ``wide [T, K]``."""

    q: Tensor
    wide: Tensor
    scale: float
    mask: Mask = NO_MASK


class DyOperands(NamedTuple):
    """What ``dy [M, N]`` meets of one adapter; tokens whose ``adapter_index`` is not ``adapter`` do not count."""

    B: Tensor
    u: Tensor | None
    scale: float
    adapter_index: Tensor | None = None
    adapter: int = 0
    c: Tensor | None = None
    z: Tensor | None = None


class DyNeeds(NamedTuple):
    """Which gradients of ``dy`` are asked for."""

    dB: bool
    dc: bool
    dz: bool


class DyGradients(NamedTuple):
    """What flows from ``dy [M, N]`` into one adapter, None where it is not asked for: ``dB [N, r]`` and ``dc [N]`` in
    float32, ``dz = c ∘ dy`` in the dtype of ``dy``."""

    dB: Tensor | None
    dc: Tensor | None
    dz: Tensor | None


class Kernels(Protocol):
    """What a backend for GPUs brings. Matrices have any strides unless it is said; ``q``, ``u``, ``v`` are float32."""

    def lora_down(self, x: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask], index: Tensor | None) -> None:
        """Writes every adapter's ``keep ∘ x Aᵀ`` to its columns of ``u [M, Σ r]``, contiguous; 0 where ``index [M]``
        names another one."""

    def lora_dy(self, dy: Tensor, operands: DyOperands, v: Tensor | None, needs: DyNeeds) -> DyGradients:
        """``dB = (c ∘ dy)ᵀ scale u``, ``dc = Σ dy ∘ z``, ``dz``, as ``needs`` says; writes ``scale (c ∘ dy) B`` to
        ``v``, 0 where ``adapter_index`` names another adapter."""

    def lora_dA(self, x: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """``vᵀ (keep ∘ x) [r, K]`` in float32."""

    def lora_up(self, base: Tensor, second: Tensor | None, y: Tensor, tail: Tail) -> None:
        """Writes a product ``base [M, N]`` with its ``tail`` to ``y``, which may be ``base``; ``second``: ``D(x) Wᵀ``.
        Rows of ``base`` and ``second`` are equally far apart, and contiguous each."""

    def shared_plans(self, x: Tensor, weight: Tensor, rank: int) -> tuple[Plan, ...]:
        """Those of ``plans.SHARED`` that :meth:`lora_linear` has for these operands."""

    def lora_linear(
        self, plan: Plan, x: Tensor, weight: Tensor, y: Tensor, tail: Tail, input_factor: float = 0.0
    ) -> None:
        """Writes ``x Wᵀ`` with its ``tail`` to ``y [M, N]``. With an ``input_factor`` the mask is the input's: DoRA
        over ``D(x) = input_factor · keep ∘ x``. With 0 it is the low-rank part's, as in the gradient of x."""

    def dropout(self, x: Tensor, mask: Mask) -> Tensor:
        """``factor · keep ∘ x``, contiguous."""

    def dora_norm(self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        """See ops.py."""

    def four_bit_decode(self, weight: Weight, N: int, K: int, dtype: torch.dtype) -> Tensor:
        """W, dense."""


class GroupedKernels(Protocol):
    """What stacked experts take beside it. Expert ``e`` has the rows ``offsets[e]`` up to ``offsets[e + 1]``, which the
    GPU alone reads; stacks have any strides."""

    def lora_grouped_down(
        self, x: Tensor, offsets: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask]
    ) -> None:
        """Writes every adapter's ``keep ∘ x Aᵀ``, ``A [E, r, K]``, to its columns of ``u [T, Σ r]``, contiguous."""

    def lora_grouped_linear(self, x: Tensor, offsets: Tensor, weight: Tensor, y: Tensor, tail: GroupedTail) -> None:
        """Writes ``x Wᵀ``, ``W [E, N, K]``, with its ``tail`` to ``y [T, N]``."""

    def lora_grouped_gradient(self, sums: GroupedSums, offsets: Tensor, out: Tensor) -> None:
        """Writes ``sums`` to ``out [E, r, K]``, zeros for an expert without rows."""

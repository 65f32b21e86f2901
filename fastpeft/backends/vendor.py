"""The skinny products by torch, for a GPU without Triton: every one reads what it masks or scales from a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .gpu import DyGradients, Mask, parts_of


class Dropout(Protocol):
    """:meth:`fastpeft.backends.gpu.Kernels.dropout`."""

    def __call__(self, x: Tensor, mask: Mask) -> Tensor: ...


class SkinnyProducts:
    """``lora_down``, ``lora_dy`` and ``lora_dA`` of :class:`fastpeft.backends.gpu.Kernels`."""

    def __init__(self, dropout: Dropout) -> None:
        self._dropout = dropout

    def lora_down(self, x: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask], index: Tensor | None) -> None:
        for i, (a, out, mask) in enumerate(zip(A, parts_of(u, A), masks, strict=True)):
            product = wide_product(self._kept(x, mask), a.to(x.dtype).t())
            out.copy_(product if index is None else product * (index == i).unsqueeze(1))

    def lora_dy(
        self,
        dy: Tensor,
        B: Tensor,
        u: Tensor | None,
        scale: float,
        index: Tensor | None,
        adapter: int,
        c: Tensor | None,
        z: Tensor | None,
        v: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> DyGradients:
        need_B, need_c, need_z = needs
        dc = (dy.float() * z.float()).sum(0) if need_c and z is not None else None
        dz = dy if c is None else (dy * c).to(dy.dtype)
        if v is not None:
            product = wide_product(dz, B.to(dy.dtype)) * scale
            v.copy_(product if index is None else product * (index == adapter).unsqueeze(1))
        dB = wide_product(dz.t(), (u * scale).to(dy.dtype)) if need_B and u is not None else None
        return DyGradients(dB, dc, dz.contiguous() if need_z else None)

    def lora_dA(self, x: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return wide_product(v.t().to(x.dtype), self._kept(x, mask))

    def _kept(self, x: Tensor, mask: Mask) -> Tensor:
        return self._dropout(x, mask._replace(factor=1.0)) if mask.threshold else x


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` with its sums left in float32."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)

"""Methods of PEFT that learn other parameters than A and B, and multiply with an A and a B that they make of these in
each call: a low-rank product like LoRA's, once A and B are made. Each of PEFT's formulas, in float32 where it is
written out here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..reference import wide_dtype
from .base_layers import Base
from .readers import Adapter, dropout_p, dropout_reason, factors_reason

_SMALLEST_NORM = 1e-4  # what PEFT's DeLoRA divides by at least


def read_delora(layer: Any, name: str, base: Base, tokens: int) -> Adapter | str | None:
    """DeLoRA (Bini et al., 2025): ``A' = λ / (r ‖a_i‖ ‖b_i‖) A ∘ ‖w_j‖``, ``a_i`` the rows of A, ``b_i`` the columns of
    B, ``w_j`` those of W as it was."""
    modules = layer._modules
    holders = [modules[kind] for kind in ("delora_A", "delora_B", "delora_lambda")]
    if {nn.ParameterDict} != set(map(type, holders)):
        return "lies in containers that are wrapped"
    A, B, scale = (holder._parameters.get(name) for holder in holders)
    if A is None:
        return None
    dropout, norms = modules["delora_dropout"]._modules.get(name), layer.delora_w_norm[name]
    reason = dropout_reason(dropout) or factors_reason(layer, (A, B, scale), base.dtype)
    if reason is None and base.dtype is not None and torch.promote_types(base.dtype, norms.dtype) != A.dtype:
        reason = f"is {A.dtype} where the input times the base's norms is not"
    if reason is not None:
        return reason
    wide = wide_dtype(A.dtype)
    A, scale, norms = A.to(wide), scale.to(wide), norms.to(wide)
    size = A.norm(dim=1).clamp(min=_SMALLEST_NORM) * B.to(wide).norm(dim=0).clamp(min=_SMALLEST_NORM)
    return Adapter(A * norms * (scale / layer.r[name] / size).unsqueeze(1), B, 1.0, dropout_p(dropout))


def read_vblora(layer: Any, name: str, base: Base, tokens: int) -> Adapter | str | None:
    """VB-LoRA (Li et al., 2024): A and B of mixtures of shared vectors."""
    return _made_by_peft(layer, name, base, "vblora_logits_A", "vblora_dropout")


def read_unilora(layer: Any, name: str, base: Base, tokens: int) -> Adapter | str | None:
    """Uni-LoRA (Li et al., 2025): A and B gathered from one shared vector."""
    return _made_by_peft(layer, name, base, "unilora_indices_A", "unilora_dropout")


def _made_by_peft(layer: Any, name: str, base: Base, kept_in: str, dropouts: str) -> Adapter | str | None:
    if name not in getattr(layer, kept_in):
        return None
    dropout = layer._modules[dropouts]._modules.get(name)
    reason = dropout_reason(dropout)
    if reason is not None:
        return reason
    try:
        A, B = layer._get_lora_matrices(name)
    except RuntimeError as error:  # PEFT's forward raises it again
        return f"cannot be put together: {error}"
    reason = factors_reason(layer, (A, B), base.dtype)
    return Adapter(A, B, 1.0, dropout_p(dropout)) if reason is None else reason


def read_tinylora(layer: Any, name: str, base: Base, tokens: int) -> Adapter | str | None:
    """TinyLoRA (Morris et al., 2026): ``A' = R A`` of the base's own singular vectors, ``R = Σ v_i P_i`` with a few
    learned numbers ``v``."""
    if name not in layer.tinylora_A:
        return None
    A, B, R = layer.tinylora_A[name], layer.tinylora_B[name], layer._compute_R(name)
    dropout = layer._modules["tinylora_dropout"]._modules.get(name)
    reason = dropout_reason(dropout) or factors_reason(layer, (A, B, R), base.dtype)
    if reason is not None:
        return reason
    wide = wide_dtype(A.dtype)
    return Adapter(R.to(wide) @ A.to(wide), B, 1.0, dropout_p(dropout))

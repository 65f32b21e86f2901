"""The equations in plain PyTorch: the specification that every backend is tested against, and the last fallback.

Notation of docs/equations.md: tokens ``x [M, K]``, frozen weight ``W [N, K]``, adapters ``A [r, K]``, ``B [N, r]``,
scaling ``s``, bias ``b [N]``. Several adapters are lists; each may carry ``keep``, the boolean dropout mask
``[M, K]``, and ``select [M]``, true for the tokens it serves (mixed batches). Dropout's factor 1 / (1 - p) multiplies
``u`` and ``v`` alike, so the caller makes it part of ``s``.
Products run in the dtype of ``x``; ``u``, ``v`` and the adapters' gradients are kept in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``u``, ``v`` and sums over tokens are kept in."""
    return torch.promote_types(dtype, torch.float32)


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    keep: Sequence[Tensor | None],
    select: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """``u = D(x) Aᵀ`` and ``y = x Wᵀ + b + Σ s u Bᵀ``.

    Returns:
        ``y [M, N]`` in the dtype of ``x``, and ``u [M, Σ r]`` (the adapters' columns side by side).
    """
    y = torch.nn.functional.linear(x, weight, bias)
    us = []
    for A_i, B_i, s, keep_i, select_i in zip(A, B, scaling, keep, select, strict=True):
        u = (_dropped(x, keep_i) @ A_i.to(x.dtype).t()).to(wide_dtype(x.dtype))
        u = _selected(u, select_i)
        y = torch.addmm(y, u.to(x.dtype), B_i.to(x.dtype).t(), alpha=s)
        us.append(u)
    return y, torch.cat(us, dim=1)


def lora_linear_backward_reference(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    u: Tensor | None,
    scaling: Sequence[float],
    keep: Sequence[Tensor | None],
    select: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """``v = s dy B``, ``dA = vᵀ D(x)``, ``dB = s dyᵀ u``, ``dx = dy W + Σ D'(v A)``, ``dW = dyᵀ x``, ``db = Σ dy``.

    Args:
        needs: one flag for each of ``x, weight, bias, *A, *B``. ``x`` may be None when neither ``weight`` nor any
            ``A`` is needed, ``u`` when no ``B`` is.

    Returns:
        The gradients that ``needs`` asks for, in its order, each in the dtype of its parameter (``dx``: of ``dy``).
    """
    count = len(A)
    need_x, need_weight, need_bias = needs[:3]
    need_A, need_B = needs[3 : 3 + count], needs[3 + count :]
    dx = dy @ weight if need_x else None
    dA: list[Tensor] = []
    dB: list[Tensor] = []
    offset = 0
    for i, (A_i, B_i) in enumerate(zip(A, B, strict=True)):
        rank = A_i.shape[0]
        if need_x or need_A[i]:
            v = (dy @ B_i.to(dy.dtype)).to(wide_dtype(dy.dtype)) * scaling[i]  # [M, r]
            v = _selected(v, select[i]).to(dy.dtype)
            if need_A[i]:
                assert x is not None
                dA.append((v.t() @ _dropped(x, keep[i])).to(A_i.dtype))
            if dx is not None:
                dx = dx + _dropped(v @ A_i.to(dy.dtype), keep[i])
        if need_B[i]:
            assert u is not None
            u_i = u[:, offset : offset + rank].to(dy.dtype)
            dB.append(((dy.t() @ u_i).to(wide_dtype(dy.dtype)) * scaling[i]).to(B_i.dtype))
        offset += rank
    grads: list[Tensor] = []
    if dx is not None:
        grads.append(dx)
    if need_weight:
        assert x is not None
        grads.append((dy.t() @ x).to(weight.dtype))
    if need_bias:
        grads.append(dy.sum(0, dtype=wide_dtype(dy.dtype)).to(dy.dtype))
    return grads + dA + dB


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.masked_fill(~keep, 0)


def _selected(u: Tensor, select: Tensor | None) -> Tensor:
    return u if select is None else u.masked_fill(~select.unsqueeze(1), 0)

"""The equations in plain PyTorch: the specification that every backend is tested against, and the last fallback.

Notation of docs/equations.md: tokens ``x [M, K]``, frozen weight ``W [N, K]``, adapters ``A [r, K]``, ``B [N, r]``,
scaling ``s``, DoRA's factor ``c [N]``, bias ``b [N]``. Several adapters are lists; each may carry ``keep``, the
boolean dropout mask ``[M, K]``, with ``factor`` 1 / (1 - p) that kept elements are multiplied with, and ``select [M]``,
true for the tokens it serves (mixed batches). ``c`` has one entry an adapter, or none: plain LoRA.
Products run in the dtype of ``x``; ``u``, ``v``, ``c`` and the adapters' gradients are kept in float32 (float64 for
float64). ``u`` is kept without dropout's factor, which multiplies ``s`` in its place.
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
    c: Sequence[Tensor],
    scaling: Sequence[float],
    keep: Sequence[Tensor | None],
    factor: Sequence[float],
    select: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``u = D(x) Aᵀ``. LoRA: ``y = x Wᵀ + b + Σ s u Bᵀ``. DoRA, adapter by adapter from ``y = x Wᵀ``: without dropout
    ``z = y + s u Bᵀ`` and ``y = c z``; with it ``z = D(x) Wᵀ + s u Bᵀ`` and ``y = y - D(x) Wᵀ + c z``; then ``+ b``.

    Returns:
        ``y [M, N]`` in the dtype of ``x``, ``u [M, Σ r]`` (the adapters' columns side by side), and each ``z [M, N]``:
        in the dtype of ``x``, of one token in that of ``u``.
    """
    linear = torch.nn.functional.linear
    y = linear(x, weight, None if c else bias)
    us, zs = [], []
    for i, (A_i, B_i) in enumerate(zip(A, B, strict=True)):
        u = (_dropped(x, keep[i]) @ A_i.to(x.dtype).t()).to(wide_dtype(x.dtype))
        u = _selected(u, select[i])
        us.append(u)
        before = y if not c or keep[i] is None else linear(_dropped(x, keep[i]) * factor[i], weight)
        z = torch.addmm(before, u.to(x.dtype), B_i.to(x.dtype).t(), alpha=scaling[i] * factor[i])
        if not c:
            y = z
            continue
        zs.append(z if len(x) != 1 else z.to(u.dtype))
        scaled = (c[i] * z).to(x.dtype)
        y = scaled if keep[i] is None else y - before + scaled
    return y if not c or bias is None else y + bias, torch.cat(us, dim=1), zs


def lora_linear_backward_reference(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[Tensor],
    u: Tensor | None,
    z: Sequence[Tensor],
    scaling: Sequence[float],
    keep: Sequence[Tensor | None],
    factor: Sequence[float],
    select: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor]:
    """``v = s dy B``, ``dA = vᵀ D(x)``, ``dB = s dyᵀ u``, ``dx = dy W + Σ D'(v A)``, ``dW = dyᵀ x``, ``db = Σ dy``.

    DoRA, from the last adapter to the first: ``dc = Σ dy z``, then ``dz = c dy`` in the place of ``dy`` above. Without
    dropout ``dz`` is the ``dy`` of what comes before; with it ``dy`` stays, and ``D(x) Wᵀ`` has the gradient
    ``dz - dy``.

    Args:
        needs: one flag for each of ``x, weight, bias, *A, *B, *c``. ``x`` may be None when neither ``weight`` nor any
            ``A`` is needed, ``u`` when no ``B`` is; ``z`` is empty when no ``c`` is.

    Returns:
        The gradients that ``needs`` asks for, in its order, each in the dtype of its parameter (``dx``: of ``dy``).
    """
    count = len(A)
    need_x, need_weight, need_bias = needs[:3]
    need_A, need_B, need_c = needs[3 : 3 + count], needs[3 + count : 3 + 2 * count], needs[3 + 2 * count :]
    bias_grad = dy.sum(0, dtype=wide_dtype(dy.dtype)).to(dy.dtype)
    dx = dy.new_zeros(dy.shape[0], weight.shape[1])
    dW = weight.new_zeros(weight.shape)
    dA, dB, dc = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    offset = sum(a.shape[0] for a in A)
    for i in reversed(range(count)):
        A_i, B_i, s = A[i], B[i], scaling[i] * factor[i]
        offset -= A_i.shape[0]
        dz = (c[i] * dy).to(dy.dtype) if c else dy
        if c and need_c[i]:
            dc[i] = (dy.to(c[i].dtype) * z[i]).sum(0)
        if need_x or need_A[i]:
            v = (dz @ B_i.to(dy.dtype)).to(wide_dtype(dy.dtype)) * s  # [M, r]
            v = _selected(v, select[i]).to(dy.dtype)
            if need_A[i]:
                assert x is not None
                dA[i] = (v.t() @ _dropped(x, keep[i])).to(A_i.dtype)
            if need_x:
                dx = dx + _dropped(v @ A_i.to(dy.dtype), keep[i])
        if need_B[i]:
            assert u is not None
            u_i = u[:, offset : offset + A_i.shape[0]].to(dy.dtype)
            dB[i] = ((dz.t() @ u_i).to(wide_dtype(dy.dtype)) * s).to(B_i.dtype)
        if c and keep[i] is None:
            dy = dz
        elif c:
            if need_x:
                dx = dx + _dropped((dz - dy) @ weight, keep[i]) * factor[i]
            if need_weight:
                assert x is not None
                dW = dW + (dz - dy).t() @ (_dropped(x, keep[i]) * factor[i])
    grads: list[Tensor] = []
    if need_x:
        grads.append(dx + dy @ weight)
    if need_weight:
        assert x is not None
        grads.append((dW + dy.t() @ x).to(weight.dtype))
    if need_bias:
        grads.append(bias_grad)
    return grads + [grad for some in (dA, dB, dc) for _, grad in sorted(some.items())]


def dora_norm_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``‖W + s B A‖`` of each row (Liu et al., "DoRA", 2024): ``[N]`` in float32 (float64 for float64)."""
    wide = wide_dtype(weight.dtype)
    adapted = torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scaling)
    return torch.linalg.vector_norm(adapted, dim=1)


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.masked_fill(~keep, 0)


def _selected(u: Tensor, select: Tensor | None) -> Tensor:
    return u if select is None else u.masked_fill(~select.unsqueeze(1), 0)

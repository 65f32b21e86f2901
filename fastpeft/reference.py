"""The equations in plain PyTorch: the specification that every backend is tested against, and the last fallback.

Notation of docs/equations.md: tokens ``x [M, K]``, frozen weight ``W [N, K]``, adapters ``A [r, K]``, ``B [N, r]``,
scaling ``s``, DoRA's factor ``c [N]``, bias ``b [N]``.
Products run in the dtype of ``x``; ``u``, ``v``, ``c`` and the adapters' gradients are kept in float32 (float64 for
float64). ``u`` is kept without dropout's factor, which multiplies ``s`` in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """One adapter of a call.

    Attributes:
        c: DoRA's factor; None for plain LoRA. All adapters of a call have one, or none has.
        keep: boolean dropout mask ``[M, K]``, with ``factor`` 1 / (1 - p) that kept elements are multiplied with.
        select: ``[M]``, true for the tokens that it serves (mixed batches).
    """

    A: Tensor
    B: Tensor
    scaling: float
    c: Tensor | None = None
    keep: Tensor | None = None
    factor: float = 1.0
    select: Tensor | None = None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``u``, ``v`` and sums over tokens are kept in."""
    return torch.promote_types(dtype, torch.float32)


def z_dtype(tokens: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype that DoRA's ``z`` is kept in: of a single token no sum averages its rounding."""
    return wide_dtype(dtype) if tokens == 1 else dtype


def lora_linear_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, adapters: Sequence[Adapter]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``u = D(x) Aᵀ``. LoRA: ``y = x Wᵀ + b + Σ s u Bᵀ``. DoRA, adapter by adapter from ``y = x Wᵀ``: without dropout
    ``z = y + s u Bᵀ`` and ``y = c z``; with it ``z = D(x) Wᵀ + s u Bᵀ`` and ``y = y - D(x) Wᵀ + c z``; then ``+ b``.

    Without a ``weight``, LoRA's low-rank part and the bias alone.

    Returns:
        ``y [M, N]`` in the dtype of ``x``, ``u [M, Σ r]`` (the adapters' columns side by side), and each ``z [M, N]``
        in the dtype of :func:`z_dtype`.
    """
    linear = torch.nn.functional.linear
    dora = adapters[0].c is not None
    if weight is None:
        start = x.new_zeros(len(adapters[0].B)) if bias is None else bias
        y = start.expand(len(x), -1)
    else:
        y = linear(x, weight, None if dora else bias)
    us, zs = [], []
    for A, B, scaling, c, keep, factor, select in adapters:
        u = (_dropped(x, keep) @ A.to(x.dtype).t()).to(wide_dtype(x.dtype))
        u = _selected(u, select)
        us.append(u)
        before = y
        if c is not None and keep is not None:
            assert weight is not None
            before = linear(_dropped(x, keep) * factor, weight)
        z = torch.addmm(before, u.to(x.dtype), B.to(x.dtype).t(), alpha=scaling * factor)
        if c is None:
            y = z
            continue
        zs.append(z.to(z_dtype(len(x), x.dtype)))
        scaled = (c * z).to(x.dtype)
        y = scaled if keep is None else y - before + scaled
    return y if not dora or bias is None else y + bias, torch.cat(us, dim=1), zs


def lora_linear_backward_reference(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    u: Tensor | None,
    z: Sequence[Tensor],
    adapters: Sequence[Adapter],
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
    count = len(adapters)
    need_x, need_weight, need_bias = needs[:3]
    need_A, need_B, need_c = needs[3 : 3 + count], needs[3 + count : 3 + 2 * count], needs[3 + 2 * count :]
    bias_grad = dy.sum(0, dtype=wide_dtype(dy.dtype)).to(dy.dtype)
    dx = dy.new_zeros(dy.shape[0], adapters[0].A.shape[1])
    dW = dx.new_zeros(()) if weight is None else weight.new_zeros(weight.shape)
    dA, dB, dc = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    offset = sum(adapter.A.shape[0] for adapter in adapters)
    for i in reversed(range(count)):
        A, B, scaling, c, keep, factor, select = adapters[i]
        s = scaling * factor
        offset -= A.shape[0]
        dz = dy if c is None else (c * dy).to(dy.dtype)
        if c is not None and need_c[i]:
            dc[i] = (dy.to(c.dtype) * z[i]).sum(0)
        if need_x or need_A[i]:
            v = (dz @ B.to(dy.dtype)).to(wide_dtype(dy.dtype)) * s  # [M, r]
            v = _selected(v, select).to(dy.dtype)
            if need_A[i]:
                assert x is not None
                dA[i] = (v.t() @ _dropped(x, keep)).to(A.dtype)
            if need_x:
                dx = dx + _dropped(v @ A.to(dy.dtype), keep)
        if need_B[i]:
            assert u is not None
            u_i = u[:, offset : offset + A.shape[0]].to(dy.dtype)
            dB[i] = ((dz.t() @ u_i).to(wide_dtype(dy.dtype)) * s).to(B.dtype)
        if c is not None and keep is None:
            dy = dz
        elif c is not None:
            assert weight is not None
            if need_x:
                dx = dx + _dropped((dz - dy) @ weight, keep) * factor
            if need_weight:
                assert x is not None
                dW = dW + (dz - dy).t() @ (_dropped(x, keep) * factor)
    grads: list[Tensor] = []
    if need_x:
        grads.append(dx if weight is None else dx + dy @ weight)
    if need_weight:
        assert x is not None and weight is not None
        grads.append((dW + dy.t() @ x).to(weight.dtype))
    if need_bias:
        grads.append(bias_grad)
    return grads + [grad for some in (dA, dB, dc) for _, grad in sorted(some.items())]


def lora_grouped_linear_reference(
    x: Tensor, offsets: Tensor, weight: Tensor | Sequence[Tensor], bias: Tensor | None, adapters: Sequence[Adapter]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """:func:`lora_linear_reference` of each expert on its own rows of ``x [T, K]``: ``W [E, N, K]``, ``b [E, N]``,
    ``A [E, r, K]``, ``B [E, N, r]`` and ``c [E, N]`` are stacks, W one of tensors or a tensor; ``keep [T, K]`` is of
    all rows.

    Returns:
        ``y [T, N]`` in the dtype of ``x``, ``u [T, Σ r]``, and each ``z [T, N]``.
    """
    experts = [
        lora_linear_reference(
            x[rows], weight[e].to(x.dtype), None if bias is None else bias[e], _of_expert(adapters, e, rows)
        )
        for e, rows in enumerate(expert_rows(offsets, len(x)))
    ]
    ys, us, zs = zip(*experts, strict=True)
    dtype = z_dtype(len(x), x.dtype)
    return torch.cat(ys), torch.cat(us), [torch.cat([z.to(dtype) for z in some]) for some in zip(*zs, strict=True)]


def lora_grouped_linear_backward_reference(
    dy: Tensor,
    x: Tensor | None,
    offsets: Tensor,
    weight: Tensor | Sequence[Tensor],
    u: Tensor | None,
    z: Sequence[Tensor],
    adapters: Sequence[Adapter],
    needs: Sequence[bool],
) -> list[Tensor]:
    """:func:`lora_linear_backward_reference` of each expert; those without rows have gradients of zeros.

    Returns:
        The gradients that ``needs`` asks for, ``dx [T, K]``, the others stacked.
    """
    experts = [
        lora_linear_backward_reference(
            dy[rows],
            None if x is None else x[rows],
            weight[e].to(dy.dtype),
            None if u is None else u[rows],
            [each[rows] for each in z],
            _of_expert(adapters, e, rows),
            needs,
        )
        for e, rows in enumerate(expert_rows(offsets, len(dy)))
    ]
    grads = [list(some) for some in zip(*experts, strict=True)]
    dx = [torch.cat(grads.pop(0))] if needs[0] else []
    return dx + [torch.stack(some) for some in grads]


def expert_rows(offsets: Tensor, rows: int) -> list[slice]:
    """The rows of each expert; waits for the device that ``offsets [E + 1]`` is on.

    Raises:
        ValueError: they do not ascend from 0 to ``rows``.
    """
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"offsets must start at 0 and end at the {rows} rows of x, got {bounds[0]} and {bounds[-1]}")
    experts = [slice(bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1)]
    for e, own in enumerate(experts):
        if own.start > own.stop:
            raise ValueError(f"offsets must ascend, and those of expert {e} are {own.start} and {own.stop}")
    return experts


def dora_norm_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``‖W + s B A‖`` of each row (Liu et al., "DoRA", 2024): ``[N]`` in float32 (float64 for float64)."""
    wide = wide_dtype(weight.dtype)
    adapted = torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scaling)
    return torch.linalg.vector_norm(adapted, dim=1)


def _of_expert(adapters: Sequence[Adapter], e: int, rows: slice) -> list[Adapter]:
    return [
        a._replace(
            A=a.A[e],
            B=a.B[e],
            c=None if a.c is None else a.c[e],
            keep=None if a.keep is None else a.keep[rows],
        )
        for a in adapters
    ]


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.masked_fill(~keep, 0)


def _selected(u: Tensor, select: Tensor | None) -> Tensor:
    return u if select is None else u.masked_fill(~select.unsqueeze(1), 0)

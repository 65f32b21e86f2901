"""The Triton backend: NVIDIA GPUs. Kernels in kernels/triton; products without a mask in them may be the vendor's."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import dropout_scale, dropout_threshold
from ..nf4 import NESTED_BLOCKSIZE

NAME = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED_DTYPES = (torch.float32, torch.float16)  # Triton's interpreter computes nonsense in bfloat16
FEW_TOKENS = 16  # a tile's rows: more of them cost nothing, and two tiles would decode W twice
RANK_BLOCK = 64  # ranks that a program holds at most; the matrix instructions want 16 at least


class Plan(Enum):
    """How a product with W and the low-rank part are computed.

    ``fused``: one kernel, both in the same float32 sums. ``epilogue``: the vendor's product, then a kernel that adds
    the low-rank part, the scales and the bias. ``accumulate``: the vendor's product, added onto the low-rank part, the
    vendor's too: where nothing is masked or scaled.
    """

    fused = "fused"
    epilogue = "epilogue"
    accumulate = "accumulate"


def unavailable() -> str | None:
    """Why this backend cannot run on this machine at all; None when it can."""
    if not _is_installed():
        return "Triton is not installed"
    if not torch.cuda.is_available() and not _is_interpreted():
        return "torch finds no NVIDIA GPU"
    return None


def refuses(op: str, x: Tensor, weight: Tensor, A: Sequence[Tensor], B: Sequence[Tensor]) -> str | None:
    """Why this backend cannot take this call; None when it can. ``x`` stands for ``dy`` in a backward op."""
    if x.device.type != "cuda" and not _is_interpreted():
        return f"it runs on NVIDIA GPUs, and x is on {x.device}"
    if torch.version.hip is not None:
        return "it was never tried on AMD GPUs"
    if not _is_installed():
        return "Triton is not installed"
    if x.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 or float16, and x is {x.dtype}"
    if _is_interpreted() and x.dtype not in INTERPRETED_DTYPES:
        return f"Triton's interpreter computes nonsense in {x.dtype}"
    if weight.numel() == 0:
        return f"weight is empty, {list(weight.shape)}"
    if weight.dtype not in (*DTYPES, torch.uint8):
        return f"it takes a weight in float32, bfloat16, float16 or 4 bits, and it is {weight.dtype}"
    for tensor in (*A, *B):
        if tensor.dtype not in DTYPES:
            return f"it takes adapters in float32, bfloat16 or float16, and one is {tensor.dtype}"
    return None


def worth_a_warning(x: Tensor) -> bool:
    """Whether a user should hear once that calls like this one are refused."""
    return x.device.type == "cuda" and x.dtype in DTYPES and unavailable() is not None


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on torch's current device, which need not be the first argument's."""

    @wraps(op)
    def run(first: Tensor, *args: Any) -> Any:
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return op(first, *args)

    return run


@_on_its_device
def lora_linear(
    x: Tensor,
    weight: Tensor,
    quant: Sequence[Tensor],
    blocksize: int,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    keep_z: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See ops.py."""
    kernels = _kernels()
    x2, N = _matrix(x), B[0].shape[0]
    M, K = x2.shape
    bias = None if bias is None else bias.contiguous()
    masks = [_Mask(p, seed, i) for i, p in enumerate(dropout_p)]
    in_loop = bool(quant) and _decodes_in_loop(M, K, blocksize) and (not c or (len(c) == 1 and not masks[0].threshold))
    dense = weight if in_loop else _dense(weight, quant, blocksize, N, K, x.dtype)
    scales = [s * mask.factor for s, mask in zip(scaling, masks, strict=True)]
    index = None if adapter_index is None else adapter_index.reshape(-1)
    u = x.new_empty((M, sum(a.shape[0] for a in A)), dtype=torch.float32)
    z = [x.new_empty((M, N), dtype=torch.float32 if M == 1 else x.dtype) for _ in c] if keep_z else []
    if M == 0:
        return x.new_empty((*x.shape[:-1], N)), u, z
    settings = _settings(x, A)
    parts = u.split([a.shape[0] for a in A], dim=1)
    for i, (a, mask) in enumerate(zip(A, masks, strict=True)):
        kernels.lora_down(
            x2, a, parts[i], mask.threshold, mask.seed, index, i, config=kernels.LoraDownConfig(), **settings
        )
    if in_loop:
        tail = kernels.Tail(u, *_side_by_side(B, scales), c=c[0] if c else None, z=z[0] if z else None, bias=bias)
        y = x.new_empty((M, N))
        kernels.four_bit_linear(
            *(x2, weight, quant, _block_bits(blocksize), NESTED_BLOCKSIZE, y, tail),
            config=kernels.FourBitLinearConfig(),
            **settings,
        )
        return y.view(*x.shape[:-1], N), u, z
    if not c:
        y = _product(x2, dense, kernels.Tail(u, *_side_by_side(B, scales), bias=bias), settings)
        return y.view(*x.shape[:-1], N), u, []
    tails = [
        kernels.Tail(part, b, scale, c=factor, z=z[i] if z else None)
        for i, (part, b, scale, factor) in enumerate(zip(parts, B, scales, c, strict=True))
    ]
    tails[-1] = replace(tails[-1], bias=bias)
    y = _dora_product(x2, dense, tails, masks, settings)
    return y.view(*x.shape[:-1], N), u, z


@_on_its_device
def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant: Sequence[Tensor],
    blocksize: int,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    c: Sequence[Tensor],
    u: Tensor | None,
    z: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    adapter_index: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See ops.py."""
    kernels = _kernels()
    count, N, K = len(A), B[0].shape[0], A[0].shape[1]
    need_x, need_weight, need_bias = needs[:3]
    need_A, need_B, need_c = needs[3 : 3 + count], needs[3 + count : 3 + 2 * count], needs[3 + 2 * count :]
    dy2, x2 = _matrix(dy), None if x is None else _matrix(x)
    M, ranks = dy2.shape[0], [a.shape[0] for a in A]
    if M == 0:
        like = [dy.new_empty((*dy.shape[:-1], K)), weight, dy.new_empty(N), *A, *B, *c]
        return [torch.zeros_like(t) for t, need in zip(like, needs, strict=True) if need]
    if need_x or need_weight:
        weight = _dense(weight, quant, blocksize, N, K, dy.dtype)
    masks = [_Mask(p, seed, i) for i, p in enumerate(dropout_p)]
    index = None if adapter_index is None else adapter_index.reshape(-1)
    settings = _settings(dy, A)
    v = dy.new_empty((M, sum(ranks)), dtype=torch.float32)
    v_parts, u_parts = v.split(ranks, dim=1), None if u is None else u.split(ranks, dim=1)
    dA, dB, dc = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    flowing = dy2  # into what is below the adapters that were passed
    branches: list[tuple[_Mask, Tensor]] = []  # what flows into D(x) Wᵀ: DoRA with dropout
    for i in reversed(range(count)):
        config = kernels.LoraDyConfig()
        tiles = -(-M // config.BLOCK_M)
        out = kernels.DyOutputs(
            v=v_parts[i] if need_x or need_A[i] else None,
            dB=v.new_empty((tiles, N, ranks[i])) if need_B[i] else None,
            dc=v.new_empty((tiles, N)) if c and need_c[i] else None,
            dz=dy2.new_empty((M, N)) if c and (i > 0 or need_x or need_weight) else None,
        )
        if any(result is not None for result in vars(out).values()):
            kernels.lora_dy(
                *(flowing, B[i], u_parts[i] if u_parts and need_B[i] else None, scaling[i] * masks[i].factor, index, i),
                *(c[i] if c else None, z[i] if z else None, out),
                config=config,
                **settings,
            )
        if out.dB is not None:
            dB[i] = out.dB.sum(0).to(B[i].dtype)
        if out.dc is not None:
            dc[i] = out.dc.sum(0)
        if need_A[i]:
            assert x2 is not None
            dA[i] = _dA(x2, v_parts[i], masks[i], settings).to(A[i].dtype)
        if out.dz is not None and masks[i].threshold:
            branches.append((masks[i], out.dz - flowing))
        elif out.dz is not None:
            flowing = out.dz
    grads: list[Tensor] = []
    if need_x:
        dx = _dx(flowing, weight, A, v, masks, settings)
        for mask, branch in branches:
            dx = dx + mask.drop(branch @ weight)
        grads.append(dx.view(*dy.shape[:-1], K))
    if need_weight:
        assert x2 is not None
        dW = flowing.t() @ x2
        for mask, branch in branches:
            dW = dW + branch.t() @ mask.drop(x2)
        grads.append(dW.to(weight.dtype))
    if need_bias:
        grads.append(dy2.sum(0, dtype=torch.float32).to(dy.dtype))
    return grads + [grad for some in (dA, dB, dc) for _, grad in sorted(some.items())]


@_on_its_device
def dora_norm(
    weight: Tensor,
    quant: Sequence[Tensor],
    blocksize: int,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """See ops.py."""
    kernels = _kernels()
    weight = _dense(weight, quant, blocksize, B.shape[0], A.shape[1], dtype)
    norm = weight.new_empty(weight.shape[0], dtype=torch.float32)
    A, B = A.to(dtype), B.float().contiguous()
    kernels.dora_norm(weight, A, B, norm, scaling, config=kernels.DoraNormConfig(), **_settings(A, [A]))
    return norm


class _Mask:
    """One adapter's dropout; a threshold of 0 drops nothing."""

    def __init__(self, p: float, seed: Tensor | None, adapter: int) -> None:
        self.threshold = 0 if seed is None else dropout_threshold(p)
        self.factor = dropout_scale(p) if self.threshold else 1.0
        self.seed = None if seed is None else seed[adapter]

    def drop(self, x: Tensor) -> Tensor:
        """``factor · keep ∘ x``."""
        kernels = _kernels()
        out = x.new_empty(x.shape)
        assert self.seed is not None
        kernels.dropout(x, out, self.threshold, self.factor, self.seed, kernels.DropoutConfig())
        return out


def _plan(x: Tensor, tail: Any) -> Plan:
    """By the equations alone: nothing was measured yet."""
    return Plan.epilogue if tail.threshold or tail.c is not None else Plan.accumulate


def _product(x: Tensor, weight: Tensor, tail: Any, settings: dict[str, Any]) -> Tensor:
    """``x Wᵀ`` and its tail."""
    kernels, plan = _kernels(), _plan(x, tail)
    if plan is Plan.fused:
        y = x.new_empty((x.shape[0], weight.shape[0]))
        kernels.lora_linear(x, weight, y, tail, 0.0, config=kernels.LoraLinearConfig(), **settings)
        return y
    if plan is Plan.epilogue:
        y = F.linear(x, weight)
        kernels.lora_up(y, None, y, tail, config=kernels.LoraUpConfig(), **settings)
        return y
    q, right = (tail.q * tail.scale).to(x.dtype), tail.right.to(x.dtype)
    y = F.linear(q, right, tail.bias)
    return y.addmm_(x, weight.t())


def _dora_product(
    x: Tensor, weight: Tensor, tails: Sequence[Any], masks: Sequence[_Mask], settings: dict[str, Any]
) -> Tensor:
    """DoRA's adapters one after the other, each on the result of those before it."""
    kernels = _kernels()
    if len(tails) == 1 and _plan(x, tails[0]) is Plan.fused:
        y, mask = x.new_empty((x.shape[0], weight.shape[0])), masks[0]
        if mask.threshold:
            tail = replace(tails[0], threshold=mask.threshold, seed=mask.seed)
            kernels.lora_linear(x, weight, y, tail, mask.factor, config=kernels.MASKED_INPUT, **settings)
        else:
            kernels.lora_linear(x, weight, y, tails[0], 0.0, config=kernels.LoraLinearConfig(), **settings)
        return y
    y = F.linear(x, weight)
    for tail, mask in zip(tails, masks, strict=True):
        second = F.linear(mask.drop(x), weight) if mask.threshold else None
        kernels.lora_up(y, second, y, tail, config=kernels.LoraUpConfig(), **settings)
    return y


def _side_by_side(B: Sequence[Tensor], scales: Sequence[float]) -> tuple[Tensor, float]:
    """The adapters' right operands as one, and a common scale."""
    if len(B) == 1:
        return B[0], scales[0]
    return torch.cat([b.float() * s for b, s in zip(B, scales, strict=True)], dim=1), 1.0


def _dx(
    dy: Tensor, weight: Tensor, A: Sequence[Tensor], v: Tensor, masks: Sequence[_Mask], settings: dict[str, Any]
) -> Tensor:
    """``dy W + Σ keep ∘ (v A)``; each mask takes a sweep of its own over the result."""
    kernels = _kernels()
    if not any(mask.threshold for mask in masks):
        A_all = A[0] if len(A) == 1 else torch.cat([a.float() for a in A])
        return _product(dy, weight.t(), kernels.Tail(v, A_all.t(), 1.0), settings)
    parts = v.split([a.shape[0] for a in A], dim=1)
    tails = [
        kernels.Tail(part, a.t(), 1.0, mask.threshold, mask.seed) for part, a, mask in zip(parts, A, masks, strict=True)
    ]
    dx = _product(dy, weight.t(), tails[0], settings)
    for tail in tails[1:]:
        kernels.lora_up(dx, None, dx, tail, config=kernels.LoraUpConfig(), **settings)
    return dx


def _dA(x: Tensor, v: Tensor, mask: _Mask, settings: dict[str, Any]) -> Tensor:
    kernels = _kernels()
    config = kernels.LoraDaConfig()
    sums = v.new_empty((-(-x.shape[0] // (config.BLOCK_M * config.TILES)), v.shape[1], x.shape[1]))
    kernels.lora_dA(x, v, sums, mask.threshold, mask.seed, config=config, **settings)
    return sums.sum(0)


def _dense(weight: Tensor, quant: Sequence[Tensor], blocksize: int, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """A 4-bit weight decoded."""
    if not quant:
        return weight
    kernels = _kernels()
    out = weight.new_empty((N, K), dtype=dtype)
    bits = _block_bits(blocksize)
    kernels.four_bit_decode(weight, quant, bits, NESTED_BLOCKSIZE, out, kernels.FourBitDecodeConfig())
    return out


def _decodes_in_loop(M: int, K: int, blocksize: int) -> bool:
    """Whether the product decodes W itself: a few tokens, each read of W once, in whole groups."""
    group = _kernels().GROUP
    return M <= FEW_TOKENS and K % group == 0 and blocksize >= group


def _block_bits(blocksize: int) -> int:
    return blocksize.bit_length() - 1


def _settings(x: Tensor, A: Sequence[Tensor]) -> dict[str, Any]:
    """What all kernels of a call share: how many ranks a program holds, and how float32 is multiplied."""
    rank = max(a.shape[0] for a in A)
    block = next(size for size in (16, 32, RANK_BLOCK) if size >= min(rank, RANK_BLOCK))
    tf32 = x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return {"rank_block": block, "precision": "tf32" if tf32 else "ieee"}


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@lru_cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors, slowly: what the tests do where there is no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> Any:
    """The launchers and their configs; loaded at the first call, since importing Triton takes a while."""
    return importlib.import_module("fastpeft.kernels")

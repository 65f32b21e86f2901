"""A 4-bit weight decoded into a dense one in one launch, and its product with a few tokens, decoded in the loop."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .lora_linear import Tail
from .tiles import finish_tile, low_rank_tile, store_tile

GROUP = 64  # elements of a row that :func:`four_bit_linear` decodes at a time; a block holds whole groups


@dataclass(frozen=True)
class FourBitDecodeConfig:
    """Elements a program decodes, and its launch shape."""

    BLOCK: int = 4096
    num_warps: int = 4
    num_stages: int = 1
    enable_fp_fusion: bool = False  # the scale is rounded twice, as bitsandbytes rounds it


@dataclass(frozen=True)
class FourBitLinearConfig:
    """Rows of W a program decodes, and its launch shape; tokens are padded to ``BLOCK_M``."""

    BLOCK_M: int = 16
    BLOCK_N: int = 32
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = 128  # left alone or held to fewer, ptxas spills for some ranks
    enable_fp_fusion: bool = False


def four_bit_linear_config(rank_block: int, float32: bool) -> FourBitLinearConfig:
    """What fits the registers. Float32 is multiplied without the matrix units: each thread holds its operands."""
    return FourBitLinearConfig(BLOCK_N=16, maxnreg=None) if float32 else FourBitLinearConfig()


@triton.jit
def _block_scale(
    absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, inside, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr
):
    if NESTED:
        q = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        product = tl.load(code2_ptr + q) * tl.load(absmax2_ptr + block // NESTED_BLOCK, mask=inside, other=0.0)
        return product + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=inside, other=0.0)


@triton.jit
def _four_bit_decode_kernel(
    packed_ptr,
    code_ptr,
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    out_ptr,
    elements,
    block_bits,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    packed = tl.load(packed_ptr + at, mask=2 * at < elements, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(packed >> 4, packed & 15), (BLOCK,))
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    block = element >> block_bits
    scale = _block_scale(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, inside, NESTED, NESTED_BLOCK)
    tl.store(out_ptr + element, (tl.load(code_ptr + codes) * scale).to(out_ptr.dtype.element_ty), mask=inside)


def four_bit_decode(
    packed: Tensor, quant: list[Tensor], block_bits: int, nested_block: int, out: Tensor, config: FourBitDecodeConfig
) -> None:
    """Writes the elements, value times scale in float32 rounded once, to ``out [N, K]``."""
    code, absmax, *nested = quant
    code2, absmax2, offset = nested or (None, None, None)
    _four_bit_decode_kernel[(triton.cdiv(out.numel(), config.BLOCK),)](
        *(packed, code, absmax, code2, absmax2, offset, out, out.numel(), block_bits),
        NESTED=bool(nested),
        NESTED_BLOCK=nested_block,
        **vars(config),
    )


@triton.jit
def _four_bit_linear_kernel(
    x_ptr,
    packed_ptr,
    code_ptr,
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    y_ptr,
    q_ptr,
    right_ptr,
    c_ptr,
    z_ptr,
    bias_ptr,
    scale,
    block_bits,
    M,
    N,
    K,
    RANK,
    stride_xm,
    stride_xk,
    stride_ym,
    stride_qm,
    stride_rn,
    stride_rr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = x_ptr.dtype.element_ty
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, GROUP):
        first = n.to(tl.int64) * K + start
        at = first[:, None] // 2 + tl.arange(0, GROUP // 2)[None, :]
        packed = tl.load(packed_ptr + at, mask=n[:, None] < N, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(packed >> 4, packed & 15), (BLOCK_N, GROUP))
        absmax = _block_scale(
            absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, first >> block_bits, n < N, NESTED, NESTED_BLOCK
        )
        W = (tl.load(code_ptr + codes) * absmax[:, None]).to(dtype)
        k = start + tl.arange(0, GROUP)
        x_at = x_ptr + rows[:, None].to(tl.int64) * stride_xm + k[None, :].to(tl.int64) * stride_xk
        x = tl.load(x_at, mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0)
        sums = tl.dot(x, tl.trans(W), sums, input_precision=PRECISION)
    q_at = q_ptr + rows[:, None].to(tl.int64) * stride_qm
    right_at = right_ptr + n[None, :].to(tl.int64) * stride_rn
    delta = low_rank_tile(q_at, right_at, stride_rr, scale, rows, n, M, N, RANK, dtype, BLOCK_R, PRECISION)
    z = sums + delta
    if HAS_Z:
        store_tile(z_ptr, N, z, rows, n, M, N)
    y = finish_tile(z, sums, c_ptr, bias_ptr, n, N, False, HAS_C, HAS_BIAS)
    store_tile(y_ptr, stride_ym, y, rows, n, M, N)


def four_bit_linear(
    x: Tensor,
    packed: Tensor,
    quant: list[Tensor],
    block_bits: int,
    nested_block: int,
    y: Tensor,
    tail: Tail,
    rank_block: int,
    precision: str,
    config: FourBitLinearConfig,
) -> None:
    """Writes ``x Wᵀ`` with its ``tail`` (no mask) to ``y [M, N]``: at most ``BLOCK_M`` tokens, whole groups of K."""
    (M, K), N = x.shape, y.shape[1]
    code, absmax, *nested = quant
    code2, absmax2, offset = nested or (None, None, None)
    _four_bit_linear_kernel[(triton.cdiv(N, config.BLOCK_N),)](
        *(x, packed, code, absmax, code2, absmax2, offset, y, tail.q, tail.right, tail.c, tail.z, tail.bias),
        *(tail.scale, block_bits, M, N, K, tail.q.shape[1]),
        *(*x.stride(), y.stride(0), tail.q.stride(0), *tail.right.stride()),
        NESTED=bool(nested),
        NESTED_BLOCK=nested_block,
        HAS_C=tail.c is not None,
        HAS_Z=tail.z is not None,
        HAS_BIAS=tail.bias is not None,
        BLOCK_R=rank_block,
        GROUP=GROUP,
        PRECISION=precision,
        **vars(config),
    )

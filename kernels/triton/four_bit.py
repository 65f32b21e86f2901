"""A 4-bit weight decoded into a dense one in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class FourBitDecodeConfig:
    """Elements a program decodes, and its launch shape."""

    BLOCK: int = 4096
    num_warps: int = 4
    num_stages: int = 1
    enable_fp_fusion: bool = False  # the scale is rounded twice, as bitsandbytes rounds it


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

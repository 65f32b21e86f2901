"""4-bit weights as bitsandbytes stores them (Dettmers et al., "QLoRA", 2023): code tables, packing, statistics.

The weight ``[N, K]`` lies flat, row after row, a stack ``[E, N, K]`` expert after expert: two codes a byte, the even
element in the high nibble. Each block of ``blocksize`` elements (blocks go on across rows and experts) is its codes'
table values times its ``absmax``, the largest magnitude in it. With nested statistics ``absmax`` itself is 8 bits a
block: ``code2[q] * absmax2[block // 256] + offset``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256

# Positions in the table are the codes. NF4: quantiles of the normal distribution (QLoRA, appendix E). FP4: sign, two
# bits of exponent and one of mantissa, divided by the largest value, 12.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = tuple(sign * value for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
QUANT_TYPES = ("nf4", "fp4")
_SMALLEST_ABSMAX = 1e-38
_AT_ONCE = 2**24  # elements that are quantized together, whole blocks: several times their bytes are made of them
_STATISTICS_GRID = 2**16  # bitsandbytes looks the statistics' codes up in a table of so many ratios


def code_table(quant_type: str, device: torch.device | None = None) -> Tensor:
    """The 16 values of ``"nf4"`` or ``"fp4"``, float32, the largest magnitude 1; FP4's are not sorted.

    Raises:
        ValueError: there is no such type.
    """
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    values = torch.tensor(_NF4 if quant_type == "nf4" else _FP4, dtype=torch.float32, device=device)
    return values / values.abs().max()


@dataclass(frozen=True)
class FourBit:
    """A 4-bit weight. What bitsandbytes keeps in ``weight`` and ``weight.quant_state``, tensors shared.

    Attributes:
        packed: uint8, ``[ceil(N K / 2)]``.
        absmax: float32, one a block; with ``nested`` uint8 codes of them.
        nested: None, or ``(code2, absmax2, offset)``: float32 ``[256]``, one for each 256 blocks, and one number.
        shape: ``(N, K)``, of experts ``(E, N, K)``.
        blocksize: elements that share an ``absmax``.
        code: float32 ``[16]``, the values that the codes stand for.
        transposed: of experts, whether each lies as ``[K, N]``; see :attr:`mT`.
    """

    packed: Tensor
    code: Tensor
    absmax: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | None
    shape: tuple[int, ...]
    blocksize: int
    transposed: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where sizes do not fit each other; TypeError where a dtype is another one."""
        if len(self.shape) not in (2, 3):
            raise ValueError(f"shape must be (N, K), or (E, N, K) of experts, got {self.shape}")
        if self.transposed and len(self.shape) == 2:
            raise ValueError(f"transposed must be False for a single weight, of shape {self.shape}")
        elements = math.prod(self.shape)
        if self.code.dtype != torch.float32 or self.code.numel() != 16:
            raise ValueError(f"code must hold 16 float32 numbers, got {self.code.numel()} of {self.code.dtype}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        if self.packed.dtype != torch.uint8:
            raise TypeError(f"packed must be uint8, got {self.packed.dtype}")
        if self.packed.numel() != (elements + 1) // 2:
            raise ValueError(
                f"packed must hold {(elements + 1) // 2} bytes for shape {self.shape}, got {self.packed.numel()}"
            )
        for tensor in (self.code, self.absmax, *(self.nested or ())):
            if tensor.device != self.packed.device:
                raise ValueError(
                    f"code and statistics must be on {self.packed.device} with packed, got {tensor.device}"
                )
        blocks = -(-elements // self.blocksize)
        if self.absmax.numel() != blocks:
            raise ValueError(f"absmax must have one entry for each of the {blocks} blocks, got {self.absmax.numel()}")
        wanted = torch.uint8 if self.nested else torch.float32
        if self.absmax.dtype != wanted:
            raise TypeError(f"absmax must be {wanted}, got {self.absmax.dtype}")
        if self.nested:
            groups = -(-blocks // NESTED_BLOCKSIZE)
            for name, tensor, size in zip(("code2", "absmax2", "offset"), self.nested, (256, groups, 1), strict=True):
                if tensor.numel() != size or tensor.dtype != torch.float32:
                    raise ValueError(f"{name} must hold {size} float32 numbers, got {tensor.numel()} of {tensor.dtype}")

    @property
    def quant(self) -> list[Tensor]:
        """``[code, absmax]``, or ``[code, absmax, code2, absmax2, offset]``: what the op takes beside ``packed``."""
        return [tensor.contiguous() for tensor in (self.code, self.absmax, *(self.nested or ()))]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.packed.device

    @property
    def mT(self) -> FourBit:
        """Of experts each one transposed, not copied: what is stored as ``[E, K, N]``, read as ``[E, N, K]``."""
        *experts, N, K = self.shape
        return replace(self, shape=(*experts, K, N), transposed=not self.transposed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight, of :attr:`shape`; the product of value and absmax is rounded once, from float32."""
        if self.transposed:
            return self.mT.dequantize(dtype).mT
        return dequantize(self.packed, self.quant, self.blocksize, self.shape, dtype)


def dequantize(
    packed: Tensor, quant: Sequence[Tensor], blocksize: int, shape: Sequence[int], dtype: torch.dtype, first: int = 0
) -> Tensor:
    """See :meth:`FourBit.dequantize`; the arguments are its attributes. ``first``: the element to begin with, where
    ``shape`` is that of a part, as one expert is."""
    code, absmax, *nested = (tensor.flatten() for tensor in quant)
    elements = math.prod(shape)
    end = first + elements
    halves = packed.flatten()[first // 2 : (end + 1) // 2]
    codes = torch.stack((halves >> 4, halves & 15), dim=1).flatten()[first % 2 :][:elements]
    blocks = torch.arange(first // blocksize, -(-end // blocksize), device=packed.device)
    scales = absmax[blocks]
    if nested:
        code2, absmax2, offset = nested
        scales = code2[scales.int()] * absmax2[blocks // NESTED_BLOCKSIZE] + offset
    scales = scales.repeat_interleave(blocksize)[first % blocksize :][:elements]
    return (code[codes.int()] * scales).view(*shape).to(dtype)


def quantize(weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True) -> FourBit:
    """``weight [N, K]``, or experts' ``[E, N, K]`` (float32, float16 or bfloat16), in 4 bits: for each element the
    nearest value of its block.

    Args:
        nested: whether the blocks' absmax are quantized to 8 bits too, as QLoRA does.

    Raises:
        TypeError: another dtype. ValueError: ``weight`` is no matrix and no stack, or a setting is unknown.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight must have shape [N, K] or [E, N, K], got {list(weight.shape)}")
    if not isinstance(blocksize, int):
        raise TypeError(f"blocksize must be an integer, got {blocksize!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    code = code_table(quant_type, weight.device)
    parts = [_nearest(part, code, blocksize) for part in weight.detach().flatten().split(_AT_ONCE)]
    codes, absmax = (torch.cat(some) for some in zip(*parts, strict=True))
    if codes.numel() % 2:
        codes = torch.cat((codes, _nearest(code.new_zeros(1), code, 1)[0]))
    packed = codes[::2] << 4 | codes[1::2]
    plain = FourBit(packed, code, absmax, None, tuple(weight.shape), blocksize)
    if not nested:
        return plain
    offset, code2 = absmax.mean(), _dynamic_table(weight.device)
    q, absmax2 = _nearest(absmax - offset, code2, NESTED_BLOCKSIZE, grid=_STATISTICS_GRID)
    return replace(plain, absmax=q, nested=(code2, absmax2, offset))


def _nearest(values: Tensor, table: Tensor, blocksize: int, grid: int | None = None) -> tuple[Tensor, Tensor]:
    """The codes (uint8) of the table's values nearest to ``values / absmax``, and ``absmax`` of each block.

    ``grid`` points in [-1, 1] that the scaled values are rounded to first.
    """
    values = values.float()
    whole = values.numel() // blocksize * blocksize
    blocks, rest = values[:whole].view(-1, blocksize), values[whole:]
    absmax = blocks.abs().amax(1)
    scaled = [(blocks * (1.0 / absmax.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(1)).flatten()]
    if rest.numel():
        last = rest.abs().max() if grid else rest.abs().max().clamp(min=_SMALLEST_ABSMAX)
        absmax = torch.cat((absmax, last.view(1)))
        scaled.append(rest / last.clamp(min=_SMALLEST_ABSMAX))
    ratio = torch.cat(scaled).clamp(-1, 1)
    if grid:
        half = (grid - 1) / 2
        ratio = ((ratio + 1) * half + 0.5).int() / half - 1
    order = table.argsort()
    midpoints = (table[order][:-1] + table[order][1:]) / 2
    codes = order[torch.bucketize(ratio, midpoints)].to(torch.uint8)
    if grid:  # a block of zeros has the first code
        codes = codes.where(absmax.repeat_interleave(blocksize)[: values.numel()] > 0, 0)
    return codes, absmax


def _dynamic_table(device: torch.device) -> Tensor:
    """The 256 sorted values of signed dynamic quantization (Dettmers, "8-bit approximations", 2016): an exponent in
    base ten in unary, the bits that are left a linear fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (10 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def from_bitsandbytes(weight: Tensor, quant_state: Any) -> FourBit:
    """The 4-bit weight that ``weight`` (any ``quant_storage``) and its bitsandbytes ``QuantState`` hold, not copied.

    Raises:
        TypeError, ValueError: they do not belong together, or hold what fastpeft cannot read; the message says what.
    """
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError("weight was repacked in place by bitsandbytes' CPU inference and is not in its own format")
    state2 = getattr(quant_state, "state2", None)
    nested = None
    if state2 is not None:
        if state2.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(f"nested statistics must be in blocks of {NESTED_BLOCKSIZE}, got {state2.blocksize}")
        nested = state2.code, state2.absmax, quant_state.offset
    with torch._C.DisableTorchFunctionSubclass():  # a plain tensor of bitsandbytes' Parameter
        packed = weight.detach().contiguous().view(torch.uint8).flatten()
    shape = tuple(quant_state.shape)
    return FourBit(packed, quant_state.code, quant_state.absmax, nested, shape, quant_state.blocksize)

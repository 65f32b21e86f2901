"""The Triton backend: NVIDIA GPUs. Kernels in kernels/triton; products without a mask in them may be the vendor's."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call import Adapters, Kept, Needs, Weight
from ...four_bit import NESTED_BLOCKSIZE
from ..base import Backend, Forward
from ..compiled import DTYPES, STACKED
from . import compose, compose_grouped, plans
from .kernel_set import DyGradients, DyNeeds, DyOperands, GroupedSums, GroupedTail, Mask, Tail
from .plans import SHARED, Plan

INTERPRETED_DTYPES = (torch.float32, torch.float16)  # Triton's interpreter computes nonsense in bfloat16
# A product by descriptors takes more tokens: z of one token may be float32, and one tile leaves the GPU idle.
FEWEST_TOKENS = 17
PROGRAMS = 2  # of a skinny product for each multiprocessor, at least
# Inputs of a product that a program sums up, at least: float32, whose launches are not what counts, in chains as short
# as those of the vendor's product of few tokens, or else its error is several times the vendor's.
SHORTEST_SPLIT, SHORTEST_SPLIT_FLOAT32 = 256, 32
MOST_TOKENS = 1024  # that a program of a gradient takes
MOST_BYTES_OF_V = 1 << 26  # of partial sums of v, unless v itself takes more
ROW_BLOCKS = (16, 64, 128)  # rows that a program of experts takes: by how many an expert has on the average
RANK_BLOCKS = (16, 32, 64)  # ranks that a program may hold; the matrix instructions want 16 at least
# Architectures whose copy engine moves tiles of a matrix, and that hold enough of them. Not 103: Triton 3.6 to 3.8 is
# reported to miscompile two products into one sum there.
COPY_TILES = (90, 100, 101, 110)
ALIGNED = 16  # bytes of its rows and address


class TritonBackend(Backend):
    """The ops of compose.py and compose_grouped.py out of :class:`TritonKernels`."""

    name = "triton"
    device = "cuda"

    def unavailable(self) -> str | None:
        if not is_installed():
            return "Triton is not installed"
        if not torch.cuda.is_available() and not _is_interpreted():
            return "torch finds no NVIDIA GPU"
        return None

    def refuses(self, x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
        if x.device.type != "cuda" and not _is_interpreted():
            return f"it runs on NVIDIA GPUs, and x is on {x.device}"
        if not is_installed():
            return "Triton is not installed"
        if _is_interpreted() and x.dtype in DTYPES and x.dtype not in INTERPRETED_DTYPES:
            return f"Triton's interpreter computes nonsense in {x.dtype}"
        if weight.dim() == STACKED and any(factor.dim() != STACKED for factor in factors):
            return "its kernels for experts compute no DoRA"
        return compose.refusal(x, weight, factors)

    def worth_a_warning(self, x: Tensor) -> bool:
        return x.device.type == "cuda" and x.dtype in DTYPES and self.unavailable() is not None

    def describe(self, weight: Weight, adapters: Adapters, dtype: torch.dtype) -> str:
        (N, K), device = adapters.shape, weight.data.device
        return plans.describe(K, N, dtype, device, shared_plans(device, dtype))

    def lora_linear(self, x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool) -> Forward:
        return compose.lora_linear(kernels(), x, weight, bias, adapters, keep_z)

    def lora_linear_backward(
        self, dy: Tensor, x: Tensor | None, weight: Weight, adapters: Adapters, kept: Kept, needs: Needs
    ) -> list[Tensor]:
        return compose.lora_linear_backward(kernels(), dy, x, weight, adapters, kept, needs)

    def lora_grouped_linear(
        self, x: Tensor, offsets: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters, keep_z: bool
    ) -> Forward:
        return compose_grouped.lora_grouped_linear(kernels(), x, offsets, weight, bias, adapters)

    def lora_grouped_linear_backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        offsets: Tensor,
        weight: Weight,
        adapters: Adapters,
        kept: Kept,
        needs: Needs,
    ) -> list[Tensor]:
        operands = dy, x, offsets, weight, adapters, kept.u, needs
        return compose_grouped.lora_grouped_linear_backward(kernels(), *operands)

    def dora_norm(self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        return compose.dora_norm(kernels(), weight, A, B, scaling, dtype)


class TritonKernels:
    """A :class:`fastpeft.backends.gpu.kernel_set.Kernels`: allocates what the launchers write, sums up partial sums."""

    def __init__(self) -> None:
        self._launch: Any = importlib.import_module("fastpeft.kernels")

    def lora_down(self, x: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask], index: Tensor | None) -> None:
        """Where tokens and ranks do not fill the GPU with programs, each takes a part of the inputs."""
        M, rank = x.shape[0], max(a.shape[0] for a in A)
        kind = _kind(x, rank)
        if index is None and not any(mask.threshold for mask in masks) and _torch_is_faster(kind, rank):
            for a, part in zip(A, compose.parts_of(u, A), strict=True):
                part.copy_(_product(x, a.t().to(x.dtype)))
            return
        config = self._launch.lora_down_config(*kind)
        programs = _ceil(M, config.BLOCK_M) * sum(_ceil(a.shape[0], kind.rank_block) for a in A)
        config, sums = _split(x, u, config, programs)
        operands = x, A, compose.parts_of(sums, A), [(mask.threshold, mask.seed) for mask in masks], index
        self._launch.lora_down(*operands, kind.rank_block, _precision(x), config)
        _add_up(sums, u)

    def lora_dy(self, dy: Tensor, operands: DyOperands, v: Tensor | None, needs: DyNeeds) -> DyGradients:
        (M, N), rank = dy.shape, operands.B.shape[1]
        kind = _kind(dy, rank)
        if not (operands.adapter_index is not None or needs.dc or needs.dz) and _torch_is_faster(kind, rank):
            return self._dy_by_torch(dy, operands, v, needs)
        config = self._dy_config(dy, rank, operands.c is not None)
        groups, parts = _ceil(N, config.BLOCK_N * config.SLABS), _ceil(M, config.BLOCK_M * config.TILES)
        shapes = (groups, M, rank), (parts, N, rank), (parts, N)
        v_sums, dB, dc = (
            dy.new_empty(shape, dtype=torch.float32) if need else None
            for shape, need in zip(shapes, (v is not None, needs.dB, needs.dc), strict=True)
        )
        dz = dy.new_empty((M, N)) if needs.dz else None
        out = self._launch.DyOutputs(v=v_sums, dB=dB, dc=dc, dz=dz)
        self._launch.lora_dy(dy, operands, out, kind.rank_block, _precision(dy), config)
        if v is not None and v_sums is not None:
            torch.sum(v_sums, 0, out=v)
        return DyGradients(None if dB is None else dB.sum(0), None if dc is None else dc.sum(0), dz)

    def _dy_by_torch(self, dy: Tensor, operands: DyOperands, v: Tensor | None, needs: DyNeeds) -> DyGradients:
        B, u, scale, c = operands.B, operands.u, operands.scale, operands.c
        if v is not None:
            v.copy_(_product(dy, (B if c is None else B * c.unsqueeze(1)).to(dy.dtype))).mul_(scale)
        if not needs.dB:
            return DyGradients(None, None, None)
        assert u is not None
        dB = _product(dy.t(), (u * scale).to(dy.dtype))
        return DyGradients(dB if c is None else dB.mul_(c.unsqueeze(1)), None, None)

    def _dy_config(self, dy: Tensor, rank: int, scaled: bool) -> Any:
        """A program sums up as many slabs of columns as it takes to keep the partial sums of v within their bound."""
        (M, N), kind = dy.shape, _kind(dy, rank)
        most_groups = max(1, MOST_BYTES_OF_V // (M * rank * torch.float32.itemsize))
        config = self._launch.lora_dy_config(*kind, scaled, many_slabs=False)
        if _ceil(N, config.BLOCK_N) > most_groups:
            config = self._launch.lora_dy_config(*kind, scaled, many_slabs=True)
        slabs = _power_of_two(_ceil(_ceil(N, config.BLOCK_N), most_groups))
        programs = _ceil(N, config.BLOCK_N * slabs) * _ceil(rank, kind.rank_block)
        return replace(config, SLABS=slabs, TILES=_tiles(dy, config.BLOCK_M, programs))

    def lora_dA(self, x: Tensor, v: Tensor, mask: Mask) -> Tensor:
        rank = v.shape[1]
        kind = _kind(x, rank)
        if not mask.threshold and _torch_is_faster(kind, rank):
            return _product(v.t().to(x.dtype), x)
        config = self._launch.lora_dA_config(*kind)
        programs = _ceil(x.shape[1], config.BLOCK_K) * _ceil(rank, kind.rank_block)
        config = replace(config, TILES=_tiles(x, config.BLOCK_M, programs))
        sums = v.new_empty((_ceil(x.shape[0], config.BLOCK_M * config.TILES), rank, x.shape[1]))
        self._launch.lora_dA(x, v, sums, mask.threshold, mask.seed, kind.rank_block, _precision(x), config)
        return sums.sum(0)

    def lora_up(self, base: Tensor, second: Tensor | None, y: Tensor, tail: Tail) -> None:
        kind = _kind(y, tail.q.shape[1])
        config = self._launch.lora_up_config(*kind)
        self._launch.lora_up(base, second, y, tail, kind.rank_block, _precision(y), config)

    def shared_plans(self, x: Tensor, weight: Tensor, rank: int) -> tuple[Plan, ...]:
        (M, K), N = x.shape, weight.shape[0]
        fits = M >= FEWEST_TOKENS and K > 1 and rank <= RANK_BLOCKS[-1] and N * x.element_size() % ALIGNED == 0
        if fits and _has_descriptor(x) and (_has_descriptor(weight) or _has_descriptor(weight.t())):
            return shared_plans(x.device, x.dtype)
        return (Plan.one_accumulator,)

    def lora_linear(
        self, plan: Plan, x: Tensor, weight: Tensor, y: Tensor, tail: Tail, input_factor: float = 0.0
    ) -> None:
        kind = _kind(x, tail.q.shape[1])
        if plan is Plan.one_accumulator_persistent:
            config = self._launch.lora_linear_persistent_config(kind.rank_block)
            operands = x, weight, y, tail, kind.rank_block, multiprocessors(x.device)
            return self._launch.lora_linear_persistent(*operands, config)
        config = self._launch.lora_linear_config(*kind, masked_input=input_factor != 0 and tail.threshold > 0)
        return self._launch.lora_linear(x, weight, y, tail, input_factor, kind.rank_block, _precision(x), config)

    def dropout(self, x: Tensor, mask: Mask) -> Tensor:
        out = x.new_empty(x.shape)
        self._launch.dropout(x, out, mask.threshold, mask.factor, mask.seed, self._launch.DropoutConfig())
        return out

    def dora_norm(self, weight: Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        dense = self.four_bit_decode(weight, B.shape[0], A.shape[1], dtype) if weight.quant else weight.data
        norm = dense.new_empty(dense.shape[0], dtype=torch.float32)
        A, B = A.to(dtype), B.float().contiguous()
        kind = _kind(A, A.shape[0])
        config = self._launch.dora_norm_config(*kind)
        self._launch.dora_norm(dense, A, B, norm, scaling, kind.rank_block, _precision(A), config)
        return norm

    def four_bit_decode(self, weight: Weight, N: int, K: int, dtype: torch.dtype) -> Tensor:
        (packed, quant, blocksize), config = weight, self._launch.FourBitDecodeConfig()
        out = packed.new_empty((N, K), dtype=dtype)
        self._launch.four_bit_decode(packed, quant, _block_bits(blocksize), NESTED_BLOCKSIZE, out, config)
        return out

    def lora_grouped_down(
        self, x: Tensor, offsets: Tensor, A: Sequence[Tensor], u: Tensor, masks: Sequence[Mask]
    ) -> None:
        ranks = [a.shape[1] for a in A]
        kind = _kind(x, max(ranks))
        config = self._launch.lora_down_config(*kind)
        tiles = self._launch.row_tiles(x.shape[0], A[0].shape[0], config.BLOCK_M)
        config, sums = _split(x, u, config, tiles * sum(_ceil(rank, kind.rank_block) for rank in ranks))
        operands = x, offsets, A, sums.split(ranks, -1), masks
        self._launch.lora_grouped_down(*operands, kind.rank_block, _precision(x), config)
        _add_up(sums, u)

    def lora_grouped_linear(self, x: Tensor, offsets: Tensor, weight: Tensor, y: Tensor, tail: GroupedTail) -> None:
        kind, mean = _kind(x, max(q.shape[1] for q in tail.q)), _ceil(x.shape[0], weight.shape[0])
        rows = next((size for size in ROW_BLOCKS if size >= mean), ROW_BLOCKS[-1])
        config = self._launch.lora_grouped_linear_config(rows, *kind, several=len(tail.q) > 1)
        operands = x, offsets, weight, y, tail
        self._launch.lora_grouped_linear(*operands, kind.rank_block, _precision(x), config)

    def lora_grouped_gradient(self, sums: GroupedSums, offsets: Tensor, out: Tensor) -> None:
        kind = _kind(sums.wide, out.shape[1])
        config = self._launch.lora_grouped_gradient_config(*kind)
        self._launch.lora_grouped_gradient(sums, offsets, out, kind.rank_block, _precision(sums.wide), config)


@lru_cache
def kernels() -> TritonKernels:
    """Made at the first call, since importing Triton takes a while."""
    return TritonKernels()


@lru_cache
def is_installed() -> bool:
    """Whether there is a package ``triton``."""
    return importlib.util.find_spec("triton") is not None


def shared_plans(device: torch.device, dtype: torch.dtype) -> tuple[Plan, ...]:
    """Those of ``plans.SHARED`` that there are on this device, where the operands allow for them."""
    return SHARED if _architecture(device) in COPY_TILES and dtype != torch.float32 else (Plan.one_accumulator,)


def _torch_is_faster(kind: _Kind, rank: int) -> bool:
    """A program that does not hold all ranks would read x once more for the others; torch has no masks."""
    return rank > kind.rank_block


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of one dtype in float32: torch may add up parts of what it rounds in a lower precision. A CPU, which the
    interpreter uses, has no such product."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _has_descriptor(matrix: Tensor) -> bool:
    """Whether the GPU's copy engine can move tiles of it."""
    rows, columns = matrix.stride()
    apart = columns == 1 and rows >= matrix.shape[1]
    return apart and rows * matrix.element_size() % ALIGNED == 0 and matrix.data_ptr() % ALIGNED == 0


def _programs_wanted(x: Tensor) -> int:
    """So many that every multiprocessor has some to choose from."""
    return PROGRAMS * multiprocessors(x.device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many this GPU has; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def _architecture(device: torch.device) -> int:
    """90 for compute capability 9.0; the interpreter has every kernel."""
    if device.type != "cuda":
        return COPY_TILES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tiles(x: Tensor, block: int, programs: int) -> int:
    """How many tiles of ``block`` tokens a program takes, a power of two: more of them write fewer partial sums, fewer
    fill the GPU. There are ``programs`` programs for each part of the tokens."""
    tiles = _ceil(x.shape[0], block)
    parts = min(tiles, _ceil(_programs_wanted(x), programs))
    return min(MOST_TOKENS // block, 1 << (tiles // parts).bit_length() - 1)


def _split(x: Tensor, u: Tensor, config: Any, programs: int) -> tuple[Any, Tensor]:
    """Where that many programs do not fill the GPU, each takes a part of the inputs; and where their sums go, ``u`` or
    one more of it for each part."""
    K, shortest = x.shape[1], SHORTEST_SPLIT_FLOAT32 if x.dtype == torch.float32 else SHORTEST_SPLIT
    splits = min(_ceil(_programs_wanted(x), programs), _ceil(K, shortest))
    config = replace(config, SPLIT_K=_ceil(_ceil(K, splits), config.BLOCK_K) * config.BLOCK_K)
    splits = _ceil(K, config.SPLIT_K)
    return config, u.unsqueeze(0) if splits == 1 else u.new_empty((splits, *u.shape))


def _add_up(sums: Tensor, u: Tensor) -> None:
    """What the parts of :func:`_split` came to."""
    if sums.shape[0] > 1:
        torch.sum(sums, 0, out=u)


def _power_of_two(size: int) -> int:
    """The next one that is not smaller."""
    return 1 << (size - 1).bit_length()


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def _block_bits(blocksize: int) -> int:
    return blocksize.bit_length() - 1


class _Kind(NamedTuple):
    """What launch configs depend on: how many ranks a program holds, and whether it multiplies float32."""

    rank_block: int
    float32: bool


def _kind(x: Tensor, rank: int) -> _Kind:
    float32 = x.dtype == torch.float32  # more ranks of it do not fit the registers
    block = next((size for size in RANK_BLOCKS if size >= rank), RANK_BLOCKS[-1])
    return _Kind(RANK_BLOCKS[0] if float32 else block, float32)


def _precision(x: Tensor) -> str:
    """How float32 is multiplied: in tf32 where torch allows it."""
    tf32 = x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _is_interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors, slowly: what the tests do where there is no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""4-bit weights agree bit for bit with bitsandbytes: tables, codes, statistics, dense values."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from fastpeft import four_bit

SHAPES = [(64, 64), (3, 100), (1, 1), (5, 7), (33, 257), (300, 130), (1, 4097), (2, 2), (3, 5, 7), (2, 33, 64)]
every_format = pytest.mark.parametrize(("quant_type", "nested"), [(t, n) for t in four_bit.QUANT_TYPES for n in (0, 1)])


@pytest.mark.parametrize("quant_type", four_bit.QUANT_TYPES)
def test_tables(quant_type: str) -> None:
    assert torch.equal(four_bit.code_table(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))


def test_the_table_of_the_statistics() -> None:
    assert torch.equal(four_bit._dynamic_table(torch.device("cpu")), bnb.create_dynamic_map())


def exact(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' own formula in PyTorch: its AVX-512 code for large blocks is inexact, as its authors note."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    shape = tuple(state.shape)
    return _dequantize_4bit_compute(
        packed.view(torch.uint8).flatten(), absmax, state.code, state.blocksize, shape, dtype
    )


@every_format
@pytest.mark.parametrize("blocksize", four_bit.BLOCKSIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_and_dequantize_are_bitsandbytes(
    shape: tuple[int, ...], blocksize: int, quant_type: str, nested: int
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(shape).to(dtype)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=bool(nested)
        )
        ours = four_bit.quantize(weight, quant_type, blocksize, bool(nested))
        assert torch.equal(ours.packed, packed.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        if nested:
            for mine, theirs in zip(
                ours.nested or (), (state.state2.code, state.state2.absmax, state.offset), strict=True
            ):
                assert torch.equal(mine, theirs)
        theirs = four_bit.from_bitsandbytes(packed, state)
        for out in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(ours.dequantize(out), exact(packed, state, out))
            assert torch.equal(theirs.dequantize(out), exact(packed, state, out))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_any_quant_storage(storage: torch.dtype) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(24, 64), quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    assert torch.equal(four_bit.from_bitsandbytes(packed, state).dequantize(), exact(packed, state, torch.float32))


def test_a_block_of_zeros_and_of_ties() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = (four_bit.code_table("nf4")[3] + four_bit.code_table("nf4")[4]) / 2
    weight[1, 0] = 1
    packed, _ = bnb.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(four_bit.quantize(weight, nested=False).packed, packed.flatten())
    assert torch.equal(four_bit.quantize(weight).dequantize()[0], torch.zeros(64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(3, dtype=torch.uint8)}, "packed must hold 2048 bytes for shape"),
        ({"packed": torch.zeros(2048)}, "packed must be uint8, got torch.float32"),
        ({"absmax": torch.zeros(3, dtype=torch.uint8)}, "absmax must have one entry for each of the 64 blocks, got 3"),
        ({"absmax": torch.zeros(64)}, "absmax must be torch.uint8"),
        ({"code": torch.zeros(16, device="meta")}, "code and statistics must be on cpu with packed, got meta"),
        ({"blocksize": 48}, "blocksize must be one of"),
        ({"shape": (4096,)}, r"shape must be \(N, K\), or \(E, N, K\) of experts, got \(4096,\)"),
        ({"code": torch.zeros(15)}, "code must hold 16 float32 numbers, got 15"),
        ({"nested": (torch.zeros(255), torch.zeros(1), torch.zeros(()))}, "code2 must hold 256 float32 numbers"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    good = vars(four_bit.quantize(torch.randn(64, 64)))
    with pytest.raises((TypeError, ValueError), match=message):
        four_bit.FourBit(**(good | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(4, 4).double(),), "weight must be float32, float16 or bfloat16, got torch.float64"),
        ((torch.randn(4),), "weight must have shape"),
        ((torch.randn(4, 4), "int4"), "quant_type must be one of"),
        ((torch.randn(4, 4), "nf4", 63), "blocksize must be one of"),
    ],
)
def test_quantize_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        four_bit.quantize(*arguments)


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_a_large_weight_is_quantized_part_by_part(blocksize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 33, 129)
    whole = four_bit.quantize(weight, "nf4", blocksize)
    monkeypatch.setattr(four_bit, "_AT_ONCE", 4096)
    parts = four_bit.quantize(weight, "nf4", blocksize)
    assert torch.equal(parts.packed, whole.packed) and torch.equal(parts.dequantize(), whole.dequantize())


def test_a_stack_read_the_other_way_and_its_parts() -> None:
    stack = four_bit.quantize(torch.randn(3, 7, 9))
    assert stack.mT.shape == (3, 9, 7) and torch.equal(stack.mT.dequantize(), stack.dequantize().mT)
    assert torch.equal(stack.mT.mT.dequantize(), stack.dequantize())
    for e, expert in enumerate(stack.dequantize()):
        part = four_bit.dequantize(stack.packed, stack.quant, 64, (7, 9), torch.float32, first=e * 63)
        assert torch.equal(part, expert)
    with pytest.raises(ValueError, match="transposed must be False for a single weight, of shape"):
        _ = four_bit.quantize(torch.randn(7, 9)).mT


def test_a_repacked_weight_is_refused() -> None:
    packed, state = bnb.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked in place"):
        four_bit.from_bitsandbytes(packed, state)

"""4-bit weights through the op, on every backend and instruction set; the oracle takes the dequantized weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from oracle import Expected, LoraInputs, assert_close_as_eager, fused, make_inputs
from test_cpu import ISAS, extension
from test_dora_norm import eager as eager_norm
from torch import nn

import fastpeft
from fastpeft import four_bit, ops
from fastpeft.call import Adapters, BackwardCall, ForwardCall, Kept, Needs, Weight
from fastpeft.nn import QDoRALinear, QLoRALinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, K, N: a few tokens; odd rows, which blocks cross and which start in the middle of a byte; stripes, depths, parts.
SHAPES = [
    *[(1, 130, 66), (3, 63, 100), (70, 257, 33), (65, 96, 128), (20, 3202, 66), (35, 66, 3202), (577, 64, 70)],
    *[(1, 4224, 33), (5, 192, 66), (8, 128, 9)],  # a few tokens and whole groups of 64, more and less than one run
]
FORMATS = [("nf4", 64, True), ("fp4", 32, False), ("nf4", 4096, False), ("fp4", 128, True)]


@pytest.fixture(params=(*ISAS, "reference"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU's backend on each instruction set in turn, and the reference."""
    if request.param == "reference":
        yield "reference"
        return
    extension().set_isa(request.param)
    yield "cpu"
    extension().set_isa("auto")


def inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    form: tuple[str, int, bool],
    dropout_p: float = 0.0,
    dora: bool = False,
) -> LoraInputs:
    """``weight`` is what ``packed`` stands for in ``dtype``."""
    M, K, N = shape
    made = make_inputs(
        (M, K), N, (8, 3) if dropout_p == 0.5 else (4,), dtype, torch.float32, dropout_p=dropout_p, dora=dora
    )
    packed = four_bit.quantize(made.weight, *form)
    return replace(made, weight=packed.dequantize(dtype), packed=packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient_are_as_close_as_eager(
    backend: str, shape: tuple[int, int, int], form: tuple[str, int, bool], dtype: torch.dtype
) -> None:
    Expected.of(lambda: inputs(shape, dtype, form)).assert_met_by(lambda i: fused(i, backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dropout_p", "dora"), [(0.5, False), (0.0, True), (0.5, True), (0.1, True)])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_dropout_and_dora(
    backend: str, shape: tuple[int, int, int], dropout_p: float, dora: bool, dtype: torch.dtype
) -> None:
    make = lambda: inputs(shape, dtype, FORMATS[0], dropout_p, dora)  # noqa: E731
    Expected.of(make).assert_met_by(lambda i: fused(i, backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_is_as_close_as_eager(
    backend: str, shape: tuple[int, int, int], form: tuple[str, int, bool], dtype: torch.dtype
) -> None:
    made = inputs(shape, dtype, form)
    A, B = made.A[0], made.B[0]
    assert made.packed is not None
    norm = ops.dora_norm(*Weight.of(made.packed), A, B, 0.75, dtype, backend)
    exact = eager_norm(made.weight.double(), A.double(), B.double(), 0.75)
    assert_close_as_eager(norm, exact, eager_norm(made.weight, A, B, 0.75))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(65, 96, 128), (1, 63, 100), (1, 4224, 6)], ids=str)
def test_with_a_unit_input_the_output_is_the_dequantized_weight_bit_by_bit(
    backend: str, shape: tuple[int, int, int], form: tuple[str, int, bool], dtype: torch.dtype
) -> None:
    _, K, N = shape
    packed = four_bit.quantize(torch.randn(N, K), *form)
    weight = Weight.of(packed)
    zeros = Adapters([torch.zeros(2, K)], [torch.zeros(N, 2)], [], [1.0], [0.0])
    for tokens in (K, 1):
        x = torch.eye(K, dtype=dtype)[:tokens]
        y, *_ = ops.lora_linear(*ForwardCall(x, weight, None, zeros, False).flat(), backend)
        assert torch.equal(y, packed.dequantize(dtype).t()[:tokens])
    needs = Needs.of([True] + [False] * 4, 1)
    call = BackwardCall(torch.eye(N, dtype=dtype), None, weight, zeros, Kept(None, []), needs)
    (dx,) = ops.lora_linear_backward(*call.flat(), backend)
    assert torch.equal(dx, packed.dequantize(dtype))


def test_opcheck(backend: str) -> None:
    made = inputs((5, 64, 32), torch.float32, FORMATS[0])
    assert made.packed is not None
    for tensor in (made.x, *made.A, *made.B):
        tensor.requires_grad_()
    torch.library.opcheck(ops.lora_linear, (*made.call(keep_z=False).flat(), backend))
    weight = Weight.of(made.packed)
    torch.library.opcheck(ops.dora_norm, (*weight, made.A[0].detach(), made.B[0].detach(), 1.0, torch.float32, backend))


@pytest.mark.parametrize("kind", [QLoRALinear, QDoRALinear])
@pytest.mark.parametrize("dtype", DTYPES)
def test_module(kind: type[QLoRALinear], dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 48).to(dtype)
    layer = kind.from_linear(linear, r=4, alpha=6.0)
    dense = nn.Linear(64, 48).to(dtype)
    dense.weight.data, dense.bias.data = layer.matrix().dequantize(dtype), linear.bias.detach()
    x = torch.randn(9, 64, dtype=dtype)
    assert_close_as_eager(layer(x), copy.deepcopy(dense).double()(x.double()), dense(x))
    nn.init.normal_(layer.lora_B)
    layer(x).float().square().sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if kind is QDoRALinear else set())
    assert linear.weight.grad is None and layer.weight.dtype == torch.uint8 and layer.weight.numel() == 64 * 48 // 2


def test_a_modules_statistics_keep_their_dtypes_and_survive_a_state_dict() -> None:
    layer = QLoRALinear.from_linear(nn.Linear(64, 48), r=4)
    before = layer.matrix().dequantize()
    layer.to(torch.bfloat16).double().half()
    assert torch.equal(layer.matrix().dequantize(), before)
    other = QLoRALinear.from_linear(nn.Linear(64, 48), r=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.matrix().dequantize(), before)
    assert "cpu runs it" in str(fastpeft.explain(layer))


def test_the_layer_of_a_dense_weight_s_size_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """No allocation of a training step is as large as the dense weight."""
    layer, x = QDoRALinear.from_linear(nn.Linear(2048, 2048), r=4).bfloat16(), torch.randn(4, 2048).bfloat16()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(x.requires_grad_()).sum().backward()
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(sizes) < 2048 * 2048

"""The Triton backend: on a GPU where there is one, else its kernels run on CPU tensors by Triton's interpreter, see
conftest.py and triton_interpreter.py. Oracle and eager compute on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from cases import CASES, Case, expected
from devices import DEVICE, DTYPES, moved_to, on_device, run
from oracle import Expected, LoraInputs, Results, assert_close_as_eager, make_inputs
from test_dora_norm import eager as eager_norm
from triton.runtime.interpreter import InterpretedFunction

import fastpeft
from fastpeft import kernels, nf4, ops
from fastpeft.backends import gpu_plans
from fastpeft.backends import triton as backend
from fastpeft.backends.gpu import Tail
from fastpeft.backends.gpu_plans import Plan, Product, plans_for
from fastpeft.dropout import dropout_keep, dropout_threshold

PLANNED = {
    "plain": Case(M=70, K=130, N=90),
    "adapters": Case(ranks=(8, 70, 3), bias=False),
    "dropout": Case(M=70, K=130, N=90, dropout_p=0.3),
    "half": Case(dtype=torch.bfloat16, dropout_p=0.3, weight_layout="transposed"),
    "dora": Case(dora=True),
    "dora_dropout": Case(M=70, K=130, N=90, dora=True, dropout_p=0.3),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the backend takes calls on CPU tensors."""
    if DEVICE == "cpu":
        triton_interpreter.use(monkeypatch)


without_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")


def by_triton(inputs: LoraInputs) -> Results:
    return run(inputs, "triton")


@triton.jit
def _square_kernel(a_ptr, b_ptr, out_ptr, rounded_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(out_ptr + at, product)
    tl.store(rounded_ptr + at, product.to(rounded_ptr.dtype.element_ty))


@without_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_interpreters_product_and_its_rounding_are_right(dtype: torch.dtype) -> None:
    a, b, out = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    rounded = torch.empty(16, 16, dtype=dtype)
    InterpretedFunction(_square_kernel.fn)[(1,)](a, b, out, rounded, SIZE=16)
    assert torch.equal(out, (a.double() @ b.double()).float())
    assert torch.equal(rounded, out.to(dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient_are_as_close_as_eager(case: Case) -> None:
    expected(case).assert_met_by(by_triton)


@pytest.fixture(params=Plan)
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each plan in turn, where it can run at all."""

    def planned(product: Product, device: torch.device, fuses: bool) -> Plan:
        return request.param if request.param in plans_for(product.ending, fuses) else Plan.epilogue

    monkeypatch.setattr(gpu_plans, "choose", planned)
    yield


@pytest.mark.parametrize("case", PLANNED.values(), ids=PLANNED)
def test_every_plan_is_as_close_as_eager(plan: None, case: Case) -> None:
    Expected.of(case.inputs).assert_met_by(by_triton)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 8), (2, 257), (63, 100), (33, 130)])
def test_the_mask_is_the_references(rows: int, columns: int, p: float) -> None:
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=DEVICE)
    x, out = torch.ones(rows, columns, device=DEVICE), torch.empty(rows, columns, device=DEVICE)
    kernels.dropout(x, out, dropout_threshold(p), 1.0, seed, kernels.DropoutConfig())
    assert torch.equal(out != 0, dropout_keep(seed, rows, columns, p))


def test_a_product_that_drops_its_input_reads_w_once() -> None:
    """``base - dropped + c (dropped + s u Bᵀ)``, both products in the one kernel."""
    with torch.device(DEVICE):
        x, weight = torch.randn(70, 130), torch.randn(90, 130)
        u, B, c, seed = torch.randn(70, 4), torch.randn(90, 4), torch.rand(90), torch.tensor(5)
        y, z = torch.empty(70, 90), torch.empty(70, 90)
    keep, factor = dropout_keep(seed, 70, 130, 0.25), 4 / 3
    tail = Tail(u, B, 1.5, dropout_threshold(0.25), seed, c, z)
    config = kernels.lora_linear_config(16, True, masked_input=True)
    kernels.lora_linear(x, weight, y, tail, factor, 16, "ieee", config)

    def formula(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        dropped = factor * (x * keep).to(dtype) @ weight.to(dtype).t()
        exact_z = dropped + 1.5 * u.to(dtype) @ B.to(dtype).t()
        return x.to(dtype) @ weight.to(dtype).t() - dropped + c.to(dtype) * exact_z, exact_z

    for actual, exact, eager in zip((y, z), formula(torch.float64), formula(torch.float32), strict=True):
        assert_close_as_eager(actual, exact, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 3), (33, 100), (70, 257)], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 70])
def test_the_norm_is_as_close_as_eager(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    made = make_inputs((1, shape[1]), shape[0], (rank,), dtype)
    weight, A, B = moved_to(DEVICE, (made.weight, made.A[0], made.B[0]))
    norm = ops.dora_norm(weight, [], 0, A, B, 0.75, dtype, "triton").cpu()
    exact = eager_norm(made.weight.double(), made.A[0].double(), made.B[0].double(), 0.75)
    assert_close_as_eager(norm, exact, eager_norm(made.weight, made.A[0], made.B[0], 0.75))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [("nf4", 64, True), ("fp4", 32, False), ("nf4", 4096, False), ("fp4", 128, True)])
@pytest.mark.parametrize("shape", [(1, 1), (63, 101), (96, 130)], ids=str)
def test_a_4_bit_weight_is_decoded_bit_by_bit(
    shape: tuple[int, int], form: tuple[str, int, bool], dtype: torch.dtype
) -> None:
    packed = nf4.quantize(torch.randn(shape), *form)
    decoded = backend.kernels().four_bit_decode(*nf4.weight_operands(moved_to(DEVICE, packed)), *shape, dtype)
    assert torch.equal(decoded.cpu(), packed.dequantize(dtype))


@pytest.mark.parametrize("dora", [False, True], ids=["qlora", "qdora"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "K", "form"),
    [
        (33, 100, ("nf4", 64, True)),
        (1, 192, ("nf4", 64, True)),
        (16, 128, ("fp4", 128, False)),
        (3, 64, ("nf4", 32, True)),
    ],
)
def test_forward_and_gradients_over_4_bits(
    M: int, K: int, form: tuple[str, int, bool], dtype: torch.dtype, dora: bool
) -> None:
    def make() -> LoraInputs:
        made = make_inputs((M, K), 66, (4,), dtype, torch.float32, dora=dora)
        packed = nf4.quantize(made.weight, *form)
        return replace(made, weight=packed.dequantize(dtype), packed=packed)

    Expected.of(make).assert_met_by(by_triton)


@pytest.mark.parametrize("case", [Case(ranks=(8, 3), dropout_p=0.5, mixed=True), Case(M=300, dora=True)], ids=str)
def test_the_same_call_twice_gives_the_same_bits(case: Case) -> None:
    inputs = case.inputs()
    first, second = by_triton(inputs), by_triton(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [Case(), Case(ranks=(8, 3), dropout_p=0.5, mixed=True), Case(dora=True)], ids=str)
def test_only_the_gradients_asked_for(case: Case) -> None:
    i = on_device(case.inputs())
    settings = i.scaling, i.dropout_p, i.seed, i.adapter_index
    _, u, z = ops.lora_linear(i.x, i.weight, [], 0, i.bias, i.A, i.B, i.c, *settings, True, "triton")
    count = 3 + len(i.A) + len(i.B) + len(i.c)
    operands = i.dy, i.x, i.weight, [], 0, i.A, i.B, i.c, u, z
    every = ops.lora_linear_backward(*operands, *settings, [True] * count, "triton")
    for n in range(count):
        needs = [k == n for k in range(count)]
        (one,) = ops.lora_linear_backward(*operands, *settings, needs, "triton")
        assert torch.equal(one, every[n])


@without_gpu
def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, A, B = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)

    def reason(x: torch.Tensor, weight: torch.Tensor = weight) -> str | None:
        return backend.refuses("lora_linear", x, weight, [A], [B])

    assert reason(torch.randn(3, 6)) is None
    assert reason(torch.randn(3, 6).double()) == "it computes in float32, bfloat16 or float16, and x is torch.float64"
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(torch.randn(3, 6)) is None
    assert reason(torch.randn(3, 6).bfloat16()) == "Triton's interpreter computes nonsense in torch.bfloat16"
    assert reason(torch.randn(3, 0), torch.empty(4, 0)) == "weight is empty, [4, 0]"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert reason(torch.randn(3, 6)) == "it runs on NVIDIA GPUs, and x is on cpu"
    with pytest.raises(
        fastpeft.BackendRefusal, match="backend='triton' cannot run lora_linear: it runs on NVIDIA GPUs"
    ):
        fastpeft.functional.lora_linear(torch.randn(3, 6), weight, None, A, B, 1.0, backend="triton")

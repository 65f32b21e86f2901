"""DoRA's norm on every backend and instruction set: against float64, against whole numbers, on any layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import in_layout
from oracle import POOL, assert_close_as_eager
from test_cpu import ISAS, PAIRS, extension
from torch import Tensor

from fastpeft import ops
from fastpeft.call import NormCall, Weight
from fastpeft.functional import dora_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (3, 257, 3), (63, 100, 8), (257, 63, 17), (100, 1, 64), (300, 520, 16), (33, 2000, 1)]
LAYOUTS = ("contiguous", "transposed", "row_stride", "column_stride")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    extension().set_isa(request.param)
    yield request.param
    extension().set_isa("auto")


def draw(N: int, K: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B such that W and B A weigh alike."""
    weight = torch.randn(N, K).to(dtype)
    return weight, torch.randn(r, K).to(adapter_dtype), (torch.randn(N, r) / r**0.5).to(adapter_dtype)


def eager(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """As peft/tuners/lora/dora.py has it, the adapter in the weight's dtype."""
    lora_weight = torch.nn.functional.linear(A.to(weight.dtype).t(), B.to(weight.dtype)).t()
    return torch.linalg.norm(weight + scaling * lora_weight, dim=1)


def assert_as_close_as_eager(backend: str, N: int, K: int, r: int, dtype: torch.dtype, layout: str) -> None:
    draws = [draw(N, K, r, dtype, torch.float32) for _ in range(max(1, POOL // N))]
    actual = [ops.dora_norm(in_layout(W, layout), [], 0, A, B, 0.75, dtype, backend) for W, A, B in draws]
    exact = [eager(W.double(), A.double(), B.double(), 0.75) for W, A, B in draws]
    assert all(norm.dtype == torch.float32 for norm in actual)
    assert_close_as_eager(actual, exact, [eager(*some, 0.75) for some in draws])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "r"), SHAPES)
def test_the_cpus_is_as_close_as_eager(isa: str, N: int, K: int, r: int, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    assert_as_close_as_eager("cpu", N, K, r, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_as_close_as_eager(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_as_close_as_eager("reference", 63, 100, 8, dtype, "transposed")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_region_of_autocast_changes_no_bit(backend: str) -> None:
    W, A, B = torch.randn(63, 100), torch.randn(8, 100), torch.randn(63, 8)
    call = NormCall(Weight.of(W), A, B, 1.5, torch.float32)
    expected = ops.dora_norm(*call.flat(), backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.dora_norm(*call.flat(), backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "r"), [*SHAPES, (40, 9000, 8)])
def test_an_embeddings_is_as_close_as_eager(isa: str, N: int, K: int, r: int, dtype: torch.dtype) -> None:
    """Of a transposed W with wider adapters, in their dtype."""
    torch.manual_seed(0)
    draws = []
    for _ in range(max(1, POOL // N)):
        W, *adapter = draw(N, K, r, dtype, torch.float32)
        draws.append((in_layout(W, "transposed"), *adapter))
    norms = [ops.dora_norm(W, [], 0, A, B, 0.75, torch.float32, "cpu") for W, A, B in draws]
    exact = [eager(W.double(), A.double(), B.double(), 0.75) for W, A, B in draws]
    assert_close_as_eager(norms, exact, [eager(W.float(), A, B, 0.75) for W, A, B in draws])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "r"), SHAPES)
def test_whole_numbers_come_out_exactly(isa: str, N: int, K: int, r: int, dtype: torch.dtype, layout: str) -> None:
    """Every product, sum and square is exact; the root is the correctly rounded one."""
    torch.manual_seed(0)
    W, A, B = (torch.randint(-2, 3, shape).to(dtype) for shape in ((N, K), (r, K), (N, r)))
    W[W.shape[0] // 2] = 0
    norm = ops.dora_norm(in_layout(W, layout), [], 0, A, B, -1.0, dtype, "cpu")
    squares = (W.double() - B.double() @ A.double()).square().sum(1)
    assert torch.equal(norm, squares.float().sqrt())


@pytest.mark.parametrize("isa", PAIRS or ISAS[:1], indirect=True)
def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    torch.manual_seed(0)
    before, results = torch.get_num_threads(), []
    W, *adapter = draw(300, 520, 16, torch.bfloat16, torch.float32)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.dora_norm(W, [], 0, *adapter, 1.0, torch.bfloat16, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(backend: str, layout: str) -> None:
    W, A, B = draw(9, 12, 3, torch.float32, torch.float32)
    torch.library.opcheck(ops.dora_norm, (in_layout(W, layout), [], 0, A, B, 0.5, torch.float32, backend))


def test_a_float64_weight_has_a_float64_norm() -> None:
    W, A, B = draw(9, 12, 3, torch.float64, torch.float64)
    assert torch.equal(dora_norm(W, A, B, 0.5), torch.linalg.vector_norm(torch.addmm(W, B, A, alpha=0.5), dim=1))


def test_it_is_a_constant_for_autograd_and_compiles() -> None:
    W, A, B = (t.requires_grad_() for t in draw(9, 12, 3, torch.float32, torch.float32))
    norm = dora_norm(W, A, B, 0.5)
    assert not norm.requires_grad
    compiled = torch.compile(dora_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(W, A, B, 0.5), norm)

"""functional.dora_linear and dora_norm: what they refuse, exact numbers, the norm given or computed, dtypes, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from derivatives import differentiated
from oracle import assert_close_as_eager
from torch import Tensor

from fastpeft.functional import dora_linear, dora_norm

M, K, N, R = 6, 5, 4, 3
NAN = float("nan")


def good() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 3, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "A": torch.randn(R, K),
        "B": torch.randn(N, R),
        "magnitude": torch.rand(N) + 1,
        "scaling": 2.0,
        "dropout_p": 0.1,
    }


def two() -> dict[str, Any]:
    one = good()
    others = {"A": torch.randn(2, K), "B": torch.randn(N, 2), "magnitude": torch.rand(N)}
    return one | {name: [one[name], other] for name, other in others.items()}


def zero_row() -> dict[str, Any]:
    made = good()
    made["weight"][2] = made["B"][2] = 0
    return made


def nan_at(row: int, size: int = N) -> Tensor:
    values = torch.ones(size)
    values[row] = NAN
    return values


WRONG = [
    (good, {"x": [1.0]}, TypeError, r"x must be a Tensor, got list"),
    (good, {"weight": torch.ones(N)}, ValueError, r"weight must have shape \[N, K\], got \[4\]"),
    (good, {"B": torch.ones(N, R + 1)}, ValueError, r"B must have shape \[N=4, r=3\], got \[4, 4\]"),
    (good, {"scaling": NAN}, ValueError, r"scaling must be finite, got nan"),
    (good, {"magnitude": None}, TypeError, r"magnitude must be a Tensor, got NoneType"),
    (good, {"magnitude": 1.0}, TypeError, r"magnitude must be a Tensor, got float"),
    (good, {"magnitude": [1.0]}, TypeError, r"magnitude\[0\] must be a Tensor, got float"),
    (good, {"magnitude": torch.ones(N).long()}, TypeError, r"magnitude must have a floating dtype, got torch.int64"),
    (good, {"magnitude": torch.ones(N + 1)}, ValueError, r"magnitude must have shape \[N=4\], got \[5\]"),
    (good, {"magnitude": torch.ones(N, 1)}, ValueError, r"magnitude must have shape \[N=4\], got \[4, 1\]"),
    (good, {"magnitude": torch.ones(N, device="meta")}, ValueError, r"magnitude must be on the device of x, .*meta"),
    (good, {"magnitude": [torch.ones(N)] * 2}, ValueError, r"magnitude must have one entry for .* 1 adapters .* got 2"),
    (good, {"magnitude": nan_at(1)}, ValueError, r"magnitude / .* is nan in row 1: magnitude nan, norm \d"),
    (good, {"norm": 1.0}, TypeError, r"norm must be a Tensor, got float"),
    (good, {"norm": [None]}, TypeError, r"norm\[0\] must be a Tensor, got NoneType"),
    (good, {"norm": torch.ones(N).int()}, TypeError, r"norm must have a floating dtype, got torch.int32"),
    (good, {"norm": torch.ones(K)}, ValueError, r"norm must have shape \[N=4\], got \[5\]"),
    (good, {"norm": torch.ones(N, device="meta")}, ValueError, r"norm must be on the device of x, cpu, got meta"),
    (good, {"norm": []}, ValueError, r"norm must have one entry for each of the 1 adapters in A, got 0"),
    (good, {"norm": nan_at(3)}, ValueError, r"magnitude / .* is nan in row 3: magnitude \d\.\d+, norm nan"),
    (good, {"norm": torch.full((N,), torch.inf)}, ValueError, r"norm must be finite, and is infinite in row 0"),
    (good, {"norm": torch.zeros(N)}, ValueError, r"magnitude / .* is inf in row 0: magnitude \d\.\d+, norm 0.0"),
    (zero_row, {}, ValueError, r"magnitude / .* must be finite, and is inf in row 2: magnitude \d\.\d+, norm 0.0"),
    (zero_row, {"magnitude": torch.zeros(N)}, ValueError, r"magnitude / .* and is nan in row 2: magnitude 0.0, norm 0"),
    (good, {"backend": "opencl"}, ValueError, r"backend must be None or one of .*cpu.*reference.*got 'opencl'"),
    (two, {"magnitude": torch.ones(N)}, ValueError, r"magnitude must have one entry for each of the 2 .* got 1"),
    (two, {"magnitude": [torch.ones(N), torch.ones(1)]}, ValueError, r"magnitude\[1\] must have shape \[N=4\], got"),
    (two, {"magnitude": [torch.ones(N), nan_at(1)]}, ValueError, r"magnitude\[1\] / .* is nan in row 1: magnitude nan"),
    (two, {"norm": [torch.ones(N), torch.ones(2)]}, ValueError, r"norm\[1\] must have shape \[N=4\], got \[2\]"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "wrong", "error", "message"), WRONG)
def test_wrong_input_is_named_and_nothing_is_modified(
    base: Callable[[], dict[str, Any]], wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = base() | wrong
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    generator = torch.get_rng_state()
    with pytest.raises(error, match=message):
        dora_linear(**arguments)
    for name, tensor in before.items():
        assert torch.equal(*(t.flatten().view(torch.uint8) for t in (arguments[name], tensor))), name
    assert torch.equal(torch.get_rng_state(), generator)


WRONG_NORM = [
    ({"weight": None}, TypeError, r"weight must be a Tensor, got NoneType"),
    ({"weight": torch.ones(N, K).int()}, TypeError, r"weight must be float64, .*got torch.int32"),
    ({"weight": torch.tensor(1.0)}, ValueError, r"weight must have shape \[N, K\], got \[\]"),
    ({"A": [torch.ones(R, K)]}, TypeError, r"A must be a Tensor, got list"),
    ({"A": torch.ones(R, K + 1)}, ValueError, r"A must have shape \[r, K=5\].*got \[3, 6\]"),
    ({"B": torch.ones(R, N)}, ValueError, r"B must have shape \[N=4, r=3\], got \[3, 4\]"),
    ({"B": torch.ones(N, R, device="meta")}, ValueError, r"B must be on the device of .*, cpu, got meta"),
    ({"scaling": "2"}, TypeError, r"scaling must be a number, got str"),
    ({"scaling": torch.ones(2)}, ValueError, r"scaling must hold one number, got a tensor of shape \[2\]"),
    ({"backend": "opencl"}, ValueError, r"backend must be None or one of"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG_NORM)
def test_wrong_input_of_the_norm_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    made = good()
    arguments = {name: made[name] for name in ("weight", "A", "B", "scaling")} | wrong
    with pytest.raises(error, match=message):
        dora_norm(**arguments)


def exact(dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Two adapters that add up to rows of norm 5, in numbers that no dtype rounds; and ``y``."""
    adapted = torch.tensor([[3, 4, 0, 0, 0], [0, 0, -3, 0, 4], [0, -4, 0, -3, 0], [0, 0, 0, 5, 0]], dtype=dtype)
    A, B = (torch.randint(-1, 2, shape).to(dtype) for shape in ((R, K), (N, R)))
    bias, x = torch.randint(-3, 4, (N,)).to(dtype), torch.randint(-1, 2, (M, K)).to(dtype)
    delta = (B @ A) / 2
    first, second = torch.tensor([5, 10, -5, 2.5]).to(dtype), torch.tensor([2.5, -5, 5, 10]).to(dtype)
    made = {"x": x, "weight": adapted - delta, "bias": bias, "A": [A, 2 * A.flip(0)], "B": [B, B.flip(1)]}
    z = x @ adapted.t() * (first / 5) + x @ delta.t()
    return made | {"magnitude": [first, second], "scaling": [0.5, 0.25]}, z * (second / 5) + bias


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.float16), ("cpu", torch.bfloat16)]
    + [("reference", dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)],
)
def test_exact_numbers(backend: str, dtype: torch.dtype) -> None:
    made, expected = exact(dtype)
    norms = [dora_norm(made["weight"], made["A"][i], made["B"][i], made["scaling"][i], backend) for i in (0, 1)]
    for norm in norms:
        assert torch.equal(norm, torch.full((N,), 5.0, dtype=torch.promote_types(dtype, torch.float32)))
    tensors = [torch.tensor(s) for s in made["scaling"]]
    for by_whom in ({}, {"norm": norms}, {"scaling": tensors}, {"scaling": tensors, "norm": tuple(norms)}):
        y = dora_linear(**made | by_whom, backend=backend)
        assert y.dtype == dtype and torch.equal(y, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_it_runs_in_autocasts_dtype(backend: str, autocast: torch.dtype, base: torch.dtype) -> None:
    made, expected = exact(torch.float32)
    made = {k: v.to(base) if isinstance(v, Tensor) else v for k, v in made.items()}
    leaves = {k: v.requires_grad_() for k, v in made.items() if isinstance(v, Tensor)}
    leaves |= {f"{k}[{i}]": made[k][i].requires_grad_() for k in ("A", "B", "magnitude") for i in (0, 1)}
    with torch.autocast("cpu", autocast):
        y = dora_linear(**made, backend=backend)
    assert y.dtype == autocast and torch.equal(y.float(), expected)
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype, name
    c = made["magnitude"][1].detach() / 5
    z = (expected - made["bias"].detach().float()) / c
    assert torch.equal(leaves["magnitude[1]"].grad, z.sum(0) / 5)


@pytest.mark.parametrize("dropout_p", [0.0, [0.5, 0.25]], ids=["plain", "dropout"])
def test_gradients_in_float64(dropout_p: Any) -> None:
    made = {k: v.double() if isinstance(v, Tensor) else v for k, v in two().items()}
    leaves = [made[name].requires_grad_() for name in ("x", "weight", "bias")]
    leaves += [t.double().requires_grad_() for name in ("A", "B", "magnitude") for t in made[name]]
    norm = [torch.rand(N).double() + 1 for _ in range(2)]  # given: a constant, as the formula has it

    def call(x: Tensor, weight: Tensor, bias: Tensor, *adapters: Tensor) -> Tensor:
        torch.manual_seed(5)
        A, B, magnitude = adapters[:2], adapters[2:4], adapters[4:]
        return dora_linear(x, weight, bias, A, B, magnitude, [2.0, -0.5], dropout_p, norm=norm)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("make", [good, two], ids=["one", "several"])
def test_norm_given_or_computed_is_the_same_constant(backend: str, make: Callable[[], dict[str, Any]]) -> None:
    made = make()
    As, Bs, magnitudes = (v if isinstance(v, list) else [v] for v in (made["A"], made["B"], made["magnitude"]))
    leaves = [made["x"], made["weight"], *As, *Bs, *magnitudes]
    for leaf in leaves:
        leaf.requires_grad_()
    norm = [dora_norm(made["weight"], a, b, 2.0, backend) for a, b in zip(As, Bs, strict=True)]
    assert not any(n.requires_grad for n in norm)
    results = []
    for given in ({}, {"norm": norm}, {"norm": [n.requires_grad_() for n in norm]}):
        torch.manual_seed(7)
        y = dora_linear(**made | given, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)])
    for computed, of_constant, of_leaf in zip(*results, strict=True):
        assert torch.equal(computed, of_constant) and torch.equal(computed, of_leaf)
    assert torch.autograd.grad(y.sum(), norm, allow_unused=True) == (None,) * len(norm)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scaling", [-1.3, torch.tensor([0.7]), torch.tensor(0.7, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_norm_is_the_vector_norm(
    dtype: torch.dtype, adapter_dtype: torch.dtype, transposed: bool, scaling: Any, backend: str
) -> None:
    dtype_of_norm = torch.promote_types(dtype, torch.float32)
    weight = (torch.randn(72, 96).t() if transposed else torch.randn(96, 72)).to(dtype)
    A, B = torch.randn(5, 72).to(adapter_dtype).requires_grad_(), torch.randn(96, 5).to(adapter_dtype)
    norm = dora_norm(weight, A, B, scaling, None if dtype == torch.float64 else backend)
    assert norm.dtype == dtype_of_norm and not norm.requires_grad
    in_dtype = weight + (B.to(dtype) @ A.detach().to(dtype)) * float(scaling)  # as PEFT does it
    eager = torch.linalg.vector_norm(in_dtype, dim=1)
    W, A, B = (t.detach().double().numpy().astype(numpy.longdouble) for t in (weight, A, B))
    true = numpy.sqrt(numpy.square(W + B @ A * float(scaling)).sum(1))
    assert_close_as_eager(norm, torch.from_numpy(true.astype(numpy.float64)), eager, "norm")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scaling", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_compiled_as_a_full_graph_it_gives_the_same_bits(backend: str, scaling: Any) -> None:
    made = two() | {"scaling": scaling, "dropout_p": [0.5, 0.25], "backend": backend}
    leaves = [made["x"], *made["A"], *made["B"], *made["magnitude"]]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.compiler.reset()
    results = []
    for function in (dora_linear, torch.compile(dora_linear, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        y = function(**made)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_transforms_and_forward_mode_give_what_torch_gives(backend: str | None) -> None:
    torch.manual_seed(0)
    x, W, b, A, B, m = (torch.randn(s) for s in ((6, K), (N, K), (N,), (3, K), (N, 3), (N,)))

    def formula(x: Tensor, A: Tensor) -> Tensor:
        c = m / torch.linalg.vector_norm(W + 2 * B @ A, dim=1).detach()
        return (c * (x @ W.t() + 2 * (x @ A.t()) @ B.t()) + b).square().sum()

    def fused(x: Tensor, A: Tensor) -> Tensor:
        return dora_linear(x, W, b, A, B, m, 2.0, backend=backend).square().sum()

    found, right = differentiated(fused, x, A), differentiated(formula, x, A)
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_float64_weight_under_autocast_has_a_norm_too() -> None:
    made = {"x": torch.randn(5, 8), "weight": torch.randn(6, 8).double(), "bias": None}
    A, B, magnitude = torch.randn(2, 8), torch.randn(6, 2), torch.rand(6) + 1
    norm = torch.linalg.vector_norm(made["weight"] + B.double() @ A.double(), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(**made, A=A, B=B, magnitude=magnitude, scaling=1.0)
        assert torch.equal(y, dora_linear(**made, A=A, B=B, magnitude=magnitude, scaling=1.0, norm=norm.float()))

"""reference.py states the right equations: exactly, by integers; through calculus, by gradcheck."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import LoraInputs, eager, make_inputs, oracle
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import ops, reference
from fastpeft.reference import lora_linear_backward_reference

FLOAT64_CASES = {
    "plain": {"ranks": (3,)},
    "no_bias": {"ranks": (1,), "bias": False},
    "dropout": {"ranks": (3,), "dropout_p": 0.5},
    "adapters": {"ranks": (3, 1, 2), "dropout_p": (0.5, 0.0, 0.5)},
    "mixed": {"ranks": (3, 2), "dropout_p": 0.5, "mixed": True},
    "dora": {"ranks": (3,), "dora": True},
    "dora_dropout": {"ranks": (3,), "dropout_p": 0.5, "dora": True, "bias": False},
    "dora_adapters": {"ranks": (3, 1, 2), "dropout_p": (0.0, 0.5, 0.0), "dora": True},
}


def float64_inputs(shape: tuple[int, ...], N: int, name: str) -> LoraInputs:
    return make_inputs(shape, N, dtype=torch.float64, **FLOAT64_CASES[name])


def integers(inputs: LoraInputs) -> LoraInputs:
    """The same shapes with small whole numbers: every product and sum of the formulas is exact in float64."""

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randint(-8, 9, tensor.shape).to(tensor.dtype)

    return replace(
        inputs,
        x=draw(inputs.x),
        weight=draw(inputs.weight),
        bias=None if inputs.bias is None else draw(inputs.bias),
        A=[draw(a) for a in inputs.A],
        B=[draw(b) for b in inputs.B],
        dy=draw(inputs.dy),
        c=[draw(c) for c in inputs.c],
        scaling=[2.0, -0.5, 3.0][: len(inputs.A)],
    )


@pytest.mark.parametrize("name", FLOAT64_CASES)
@pytest.mark.parametrize(("shape", "N"), [((1, 1), 1), ((2, 5, 63), 17), ((63, 3), 100)])
def test_reference_is_peft_and_its_derivatives_exactly(shape: tuple[int, ...], N: int, name: str) -> None:
    inputs = integers(float64_inputs(shape, N, name))
    by_formula, by_autograd = oracle(inputs), eager(inputs)
    assert by_formula.keys() == by_autograd.keys()
    for key, expected in by_autograd.items():
        assert torch.equal(by_formula[key], expected), key


@pytest.mark.parametrize("name", FLOAT64_CASES)
def test_gradcheck_in_float64(name: str) -> None:
    i = float64_inputs((2, 3, 5), 4, name)
    tensors = list(i.differentiable().values())
    count = len(i.A)

    def lora_linear(*leaves: torch.Tensor) -> torch.Tensor:
        x, weight, *rest = leaves
        bias = rest.pop(0) if i.bias is not None else None
        A, B, c = rest[:count], rest[count : 2 * count], rest[2 * count :]
        made = replace(i, x=x, weight=weight, bias=bias, A=A, B=B, c=c)
        return ops.lora_linear(*made.call().flat(), "reference")[0]

    assert torch.autograd.gradcheck(lora_linear, [t.requires_grad_() for t in tensors])


def test_u_is_the_dropped_input_times_A() -> None:
    i = integers(float64_inputs((7, 9), 4, "adapters"))
    _, u, _ = ops.lora_linear(*i.call().flat(), "reference")
    dropped = [i.x if keep is None else i.x * keep for keep in i.keep()]
    assert torch.equal(u, torch.cat([x @ A.t() for x, A in zip(dropped, i.A, strict=True)], dim=1))


@pytest.mark.parametrize(("needed", "products"), [("x", 3), ("weight", 1), ("bias", 0), ("A[0]", 2), ("B[0]", 1)])
def test_no_product_is_spent_on_gradients_nobody_asked_for(needed: str, products: int) -> None:
    i = float64_inputs((7, 9), 4, "plain")
    u = i.x @ i.A[0].t()
    needs = [name == needed for name in i.differentiable()]
    with MatrixProducts() as counter:
        adapter = reference.Adapter(i.A[0], i.B[0], i.scaling[0])
        lora_linear_backward_reference(i.dy, i.x, i.weight, u, [], [adapter], needs)
    assert counter.count == products


class MatrixProducts(TorchDispatchMode):
    """Counts the matrix products that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_adapters_side_by_side_are_one_adapter_of_their_ranks() -> None:
    i = integers(float64_inputs((7, 9), 4, "plain"))
    one = oracle(i)
    two = oracle(
        replace(
            i,
            A=list(i.A[0].split([1, 2])),
            B=list(i.B[0].split([1, 2], dim=1)),
            scaling=i.scaling * 2,
            dropout_p=i.dropout_p * 2,
        )
    )
    assert torch.equal(two["y"], one["y"])
    assert torch.equal(two["x"], one["x"])
    assert torch.equal(torch.cat((two["A[0]"], two["A[1]"])), one["A[0]"])
    assert torch.equal(torch.cat((two["B[0]"], two["B[1]"]), dim=1), one["B[0]"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_token_is_untouched_by_the_overflow_of_an_adapter_that_does_not_serve_it(dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max
    i = make_inputs((2, 4), 3, (2,), dtype)
    x = torch.full((2, 4), 1.0, dtype=dtype)
    A = torch.full((2, 4), huge, dtype=dtype)
    index = torch.tensor([0, -1])
    made = replace(i, x=x, bias=None, A=[A], scaling=[1.0], adapter_index=index)
    y, _, _ = ops.lora_linear(*made.call().flat(), "reference")
    assert not y[0].isfinite().all()
    assert torch.equal(y[1], (x @ i.weight.t())[1])


def test_reference_imports_torch_alone() -> None:
    tree = ast.parse(inspect.getsource(reference))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "typing", "torch"}

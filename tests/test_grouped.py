"""Experts stacked in one weight: parity with plain PyTorch, the op, what is kept, masks, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from grouped_cases import (
    BACKENDS,
    CASES,
    DTYPES,
    PEFTS,
    SLOWER,
    Case,
    Experts,
    assert_as_close_as_eager,
    assert_same_bits,
    by_functional,
    every_backend,
    every_case,
    fused,
    plain,
    results,
)
from oracle import assert_close_as_eager
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft import dispatch, extension, ops
from fastpeft import functional as F
from fastpeft.call import GroupedBackwardCall, Kept, Needs
from fastpeft.dropout import dropout_keep, dropout_seeds
from fastpeft.reference import Adapter, lora_grouped_linear_backward_reference, lora_grouped_linear_reference


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_forward_and_every_gradient_are_as_close_as_eager(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_as_close_as_eager(case, dtype, lambda i: fused(i, backend))


@every_backend
def test_a_region_of_autocast_changes_no_bit(backend: str) -> None:
    i = PEFTS.make()
    expected = fused(i, backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(fused(i, backend), expected)


@every_backend
def test_gradients_have_the_layout_of_their_parameters_and_zeros_where_no_row_went(backend: str) -> None:
    i = replace(PEFTS, transposed=True).make()
    grads = fused(i, backend)
    for name, tensor in i.differentiable().items():
        assert grads[name].stride() == tensor.stride(), name
        if tensor.dim() == 3:
            assert not grads[name][2].any(), name
            assert grads[name][3].any(), name


# Without the extension they stand under the one name that every processor has, and fail.


@pytest.mark.parametrize("isa", SLOWER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [PEFTS, CASES[10]], ids=["peft", "transposed"])
def test_every_instruction_set_is_as_close_as_eager(isa: str, case: Case, dtype: torch.dtype) -> None:
    extension.built().set_isa(isa)
    try:
        test_forward_and_every_gradient_are_as_close_as_eager("cpu", case, dtype)
    finally:
        extension.built().set_isa("auto")


@pytest.mark.parametrize("counts", [(400, 3, 0, 40), (30, 41, 50, 62, 27, 33)], ids=["one is large", "all are small"])
def test_any_number_of_threads(counts: tuple[int, ...]) -> None:
    """Of a large expert's sweeps each thread takes a part, small experts are a thread's each."""
    case = Case(counts=counts, K=300, N=270, dropout_p=0.1)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            test_forward_and_every_gradient_are_as_close_as_eager("cpu", case, torch.float32)
            i = case.make(torch.bfloat16)
            assert_same_bits(fused(i, "cpu"), fused(i, "cpu"))
        finally:
            torch.set_num_threads(before)


def test_strides_of_operands_change_nothing() -> None:
    """The vendor's products, which the reference takes, sum in another order then."""
    made = PEFTS.make()
    plainly = replace(made, B=[b.contiguous() for b in made.B])

    def apart(t: Tensor) -> Tensor:
        return torch.stack((t, torch.full_like(t, -1)), dim=-1)[..., 0]

    A, B = ([apart(t) for t in some] for some in (made.A, made.B))
    x, dy, offsets = made.x.t().contiguous().t(), apart(made.dy), apart(made.offsets)
    strided = replace(made, x=x, A=A, B=B, dy=dy, offsets=offsets)
    assert_same_bits(fused(made, "cpu"), fused(plainly, "cpu"))
    assert_same_bits(fused(strided, "cpu"), fused(plainly, "cpu"))


def test_a_stack_without_contiguous_rows_or_columns_goes_to_the_reference() -> None:
    made = Case().make()
    i = replace(made, weight=torch.stack((made.weight, made.weight), dim=-1)[..., 0])
    reason = dispatch.refusals(i.x, i.weight, [*i.A, *i.B])["cpu"]
    assert reason is not None and "strides" in reason
    assert_same_bits(fused(i, None), fused(i, "reference"))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_with_its_row(backend: str, dtype: torch.dtype) -> None:
    i = Case(counts=(3, 40, 2)).make(dtype)
    x = i.x.clone()
    x[3, 5] = torch.nan
    expected, actual = fused(i, backend), fused(replace(i, x=x), backend)
    others = torch.arange(len(x)) != 3
    assert not actual["y"][3].isfinite().any()
    assert torch.equal(actual["y"][others], expected["y"][others])
    for name in ("A[0]", "B[0]"):
        assert torch.equal(actual[name][::2], expected[name][::2]), name


@every_backend
def test_the_mask_counts_rows_of_the_sorted_input(backend: str) -> None:
    """With A the identity and x ones, u is the mask."""
    K, counts, p = 72, (40, 0, 3, 70), 0.3
    i = Case(counts=counts, K=K, dropout_p=p).make()
    i = replace(i, x=torch.ones_like(i.x), A=[torch.eye(K).expand(4, K, K)], B=[torch.ones(4, i.weight.shape[1], K)])
    _, u, _ = ops.lora_grouped_linear(*i.call().flat(), backend)
    assert i.seed is not None
    assert torch.equal(u, dropout_keep(i.seed[0], sum(counts), K, p).float())


@pytest.mark.parametrize(("backend", "case"), [("reference", Case()), ("cpu", PEFTS)], ids=BACKENDS)
def test_opcheck(backend: str, case: Case) -> None:
    i, _ = case.make().requiring()
    torch.library.opcheck(ops.lora_grouped_linear, (*i.call().flat(), backend))
    i = case.make()
    _, u, _ = ops.lora_grouped_linear(*i.call().flat(), backend)
    needs = Needs.of([True] * len(i.differentiable()) if case.bias else [True, True, False] + [True] * 4, len(i.A))
    _, offsets, weight, _, adapters, _ = i.call()
    backward = GroupedBackwardCall(i.dy, i.x, offsets, weight, adapters, Kept(u, []), needs)
    torch.library.opcheck(ops.lora_grouped_linear_backward, (*backward.flat(), backend))


@every_backend
@pytest.mark.parametrize("case", [PEFTS, CASES[4]], ids=["peft", "empty"])
def test_the_same_call_twice_and_both_ways_give_the_same_bits(backend: str, case: Case) -> None:
    i = case.make()
    expected = fused(i, backend)
    assert_same_bits(fused(i, backend), expected)
    assert_same_bits(results(lambda i: ops.call_lora_grouped_linear(i.call(), backend), i), expected)


@every_backend
@pytest.mark.parametrize("names", [("x",), ("weight",), ("bias",), ("A[1]",), ("B[0]",), ("x", "A[0]")], ids=str)
def test_only_what_is_asked_for_is_kept_and_computed(backend: str, names: tuple[str, ...]) -> None:
    made = replace(PEFTS, transposed=True).make()
    expected = fused(made, backend)
    i, leaves = made.requiring(*names)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.call_lora_grouped_linear(i.call(), backend)
    owned = {t.data_ptr() for t in (i.weight, *i.A, *i.B)}
    beside = [t for t in kept if t.data_ptr() not in owned]
    sizes = {"x": i.x.shape, "u": (len(i.x), 11), "offsets": i.offsets.shape, "seed": (2,)}
    wanted = {"offsets", "seed"}
    wanted |= {"x"} if {"weight", "A[0]", "A[1]"} & set(names) else set()
    wanted |= {"u"} if "B[0]" in names else set()
    assert sorted(tuple(t.shape) for t in beside) == sorted(tuple(sizes[name]) for name in wanted)
    y.backward(i.dy)
    assert_same_bits(
        {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None},
        {name: expected[name] for name in names},
    )


@every_backend
def test_functional_is_the_op_with_a_seed_of_torchs(backend: str) -> None:
    i = PEFTS.make()
    torch.manual_seed(5)
    actual = results(lambda i: by_functional(i, backend), i)
    torch.manual_seed(5)
    assert_same_bits(actual, fused(replace(i, seed=dropout_seeds(2, torch.device("cpu"))), backend))
    tensors = [torch.tensor(s) for s in i.scaling]
    y = F.lora_grouped_linear(i.x, i.offsets, i.weight, i.bias, i.A, i.B, tensors, training=False, backend=backend)
    assert_close_as_eager(
        y, plain(replace(i, seed=None).to(torch.float64)), plain(replace(i, seed=None)), "scaling in tensors"
    )


def test_compiled_without_a_break() -> None:
    i = replace(PEFTS, dropout_p=0.0).make()
    compiled = torch.compile(by_functional, fullgraph=True, backend="aot_eager")
    actual, truth = results(compiled, i), results(plain, i.to(torch.float64))
    eager = results(plain, i)
    for name, tensor in actual.items():
        assert_close_as_eager(tensor, truth[name], eager[name], name)


@every_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_call_draws_the_same_mask(backend: str, reentrant: bool) -> None:
    made, found = PEFTS.make(), []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        i, leaves = made.requiring()
        torch.manual_seed(7)
        y = run(lambda x, i=i: by_functional(replace(i, x=x), backend), leaves["x"])
        y.backward(i.dy)
        found.append({"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    assert len(found[0]) == 8
    assert_same_bits(*found)


def test_functions_of_torchs_that_ask_for_other_derivatives_get_the_references() -> None:
    i = replace(Case(counts=(3, 0, 2), K=6, N=5, ranks=(2,)).make(torch.float64), seed=None)

    def of(function: Callable[[Experts], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, A: function(replace(i, x=x, A=[A])).cos().sum()

    func, x, A = torch.func, i.x, i.A[0]
    for make in (
        lambda f: func.grad(f, argnums=(0, 1))(x, A),
        lambda f: func.vmap(f, in_dims=(None, 0))(x, torch.stack([A, A + 1])),
        lambda f: func.jvp(f, (x, A), (x.cos(), A.sin())),
        lambda f: func.hessian(lambda x: f(x, A))(x),
    ):
        torch.testing.assert_close(make(of(by_functional)), make(of(plain)))


@every_backend
def test_a_batch_of_gradients_and_no_second_derivative(backend: str) -> None:
    i, leaves = Case().make().requiring("x", "A[0]", "B[0]")
    y = ops.call_lora_grouped_linear(i.call(), backend)
    dys = torch.stack([i.dy, i.dy.cos()])
    batched = torch.autograd.grad(y, list(leaves.values())[:1], dys, retain_graph=True, is_grads_batched=True)[0]
    for dy, one in zip(dys, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, leaves["x"], dy, retain_graph=True)[0], one)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_references_gradients_are_those_of_its_forward_pass() -> None:
    i = Case(counts=(3, 0, 2), K=4, N=3, ranks=(2, 1), dropout_p=0.5).make(torch.float64)

    def adapters(A: list[Tensor], B: list[Tensor]) -> list[Adapter]:
        return [
            Adapter(a, b, s, keep=keep, factor=2.0) for a, b, s, keep in zip(A, B, i.scaling, i.keep(), strict=True)
        ]

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
            y, u, _ = lora_grouped_linear_reference(x, i.offsets, weight, bias, adapters(factors[:2], factors[2:]))
            ctx.save_for_backward(x, weight, u, *factors)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, weight, u, *factors = ctx.saved_tensors
            these = adapters(factors[:2], factors[2:])
            return tuple(lora_grouped_linear_backward_reference(dy, x, i.offsets, weight, u, [], these, [True] * 7))

    leaves = [t.clone().requires_grad_() for t in i.differentiable().values()]
    assert torch.autograd.gradcheck(Node.apply, leaves)


def test_autocast_casts_x_and_leaves_the_stack_alone() -> None:
    i = CASES[11].make()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.lora_grouped_linear(i.x, i.offsets, i.weight, i.bias, i.A, i.B, i.scaling)
    eager = plain(i.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert_close_as_eager(y, plain(i.to(torch.float64)), eager)


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "falling": ({"offsets": torch.tensor([0, 5, 3, 8])}, ValueError, "offsets must ascend, .* expert 1 are 5 and 3"),
    "too short": ({"offsets": torch.tensor([0, 3, 5, 7])}, ValueError, "end at the 8 rows of x, got 0 and 7"),
    "late": ({"offsets": torch.tensor([1, 3, 5, 8])}, ValueError, "offsets must start at 0"),
    "experts": ({"offsets": torch.tensor([0, 3, 8])}, ValueError, r"offsets must have shape \[E \+ 1 = 4\], got \[3\]"),
    "float": ({"offsets": torch.tensor([0.0, 3, 5, 8])}, TypeError, "offsets must be int32 or int64"),
    "list": ({"offsets": [0, 3, 5, 8]}, TypeError, "offsets must be a Tensor, got list"),
    "x": ({"x": torch.ones(2, 4, 6)}, ValueError, r"x must have shape \[T, K=6\]"),
    "columns": ({"x": torch.ones(8, 5)}, ValueError, "x must have shape"),
    "dtype": ({"x": torch.ones(8, 6, dtype=torch.bfloat16)}, TypeError, "x must have the dtype of weight"),
    "matrix": ({"weight": torch.ones(5, 6)}, ValueError, r"weight must have shape \[E, N, K\], got"),
    "none": ({"weight": torch.ones(0, 5, 6), "bias": None}, ValueError, "weight holds no expert"),
    "bias": ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[E=3, N=5\], got \[5\]"),
    "A's experts": ({"A": torch.ones(2, 2, 6)}, ValueError, r"A must have shape \[E=3, r, K=6\]"),
    "A flat": ({"A": torch.ones(6, 6)}, ValueError, r"A must have shape \[E=3, r, K=6\]"),
    "A's rank": ({"A": torch.ones(3, 0, 6)}, ValueError, "a rank r of at least 1"),
    "B's experts": ({"B": torch.ones(4, 5, 2)}, ValueError, r"B must have shape \[E=3, N=5, r=2\]"),
    "B": ({"B": torch.ones(3, 2, 5)}, ValueError, r"B must have shape \[E=3, N=5, r=2\]"),
    "count": ({"B": [torch.ones(3, 5, 2)] * 2}, ValueError, "B must have one entry"),
    "scaling": ({"scaling": math.nan}, ValueError, "scaling must be finite"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
    "training": ({"training": 1}, TypeError, "training must be"),
    "backend": ({"backend": "fast"}, ValueError, "backend must be None or one of"),
}


@pytest.mark.parametrize(("given", "error", "words"), REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_by_name(given: dict[str, Any], error: type[Exception], words: str) -> None:
    right: dict[str, Any] = {
        "x": torch.ones(8, 6),
        "offsets": torch.tensor([0, 3, 5, 8]),
        "weight": torch.ones(3, 5, 6),
        "bias": torch.ones(3, 5),
        "A": torch.ones(3, 2, 6),
        "B": torch.ones(3, 5, 2),
        "scaling": 1.0,
    }
    F.lora_grouped_linear(**right)
    with pytest.raises(error, match=words):
        F.lora_grouped_linear(**(right | given))


@every_backend
def test_offsets_that_were_changed_since_or_come_into_a_graph_unchecked_are_refused(backend: str) -> None:
    i, _ = Case().make().requiring()
    wrong = i.offsets.flip(0)
    with pytest.raises((ValueError, RuntimeError), match="offsets must"):
        ops.lora_grouped_linear(*i.call()._replace(offsets=wrong).flat(), backend)


def test_other_backends_say_that_they_have_no_such_kernels() -> None:
    i = Case().make()
    for name in ("cuda", "triton"):
        reason = dispatch.refusals(i.x, i.weight, [*i.A, *i.B])[name]
        assert reason is not None
    with pytest.raises(dispatch.BackendRefusal, match="lora_grouped_linear"):
        by_functional(i, "cuda")

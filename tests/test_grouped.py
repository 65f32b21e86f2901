"""Experts stacked in one weight: parity with plain PyTorch, the op, what is kept, masks, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from oracle import POOL, Results, assert_close_as_eager, worst
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft import dispatch, extension, ops
from fastpeft import functional as F
from fastpeft.call import Adapters, GroupedBackwardCall, GroupedCall, Needs, Weight
from fastpeft.dropout import dropout_keep, dropout_scale, dropout_seeds
from fastpeft.four_bit import quantize
from fastpeft.reference import Adapter, lora_grouped_linear_backward_reference, lora_grouped_linear_reference

BACKENDS = ("reference", "cpu")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
linear = torch.nn.functional.linear


@dataclass(frozen=True)
class Experts:
    """One call of the op, and ``dy`` that flows back."""

    x: Tensor
    offsets: Tensor
    weight: Tensor
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    dropout_p: list[float]
    seed: Tensor | None
    dy: Tensor

    @property
    def scaling(self) -> list[float]:
        """Another one each."""
        return [1.5, -0.625, 2.0][: len(self.A)]

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, in the order of the op's gradients."""
        named = {"x": self.x, "weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return named | {f"{s}[{i}]": t for s in "AB" for i, t in enumerate(getattr(self, s))}

    def requiring(self, *names: str) -> tuple[Experts, dict[str, Tensor]]:
        """The same with leaves, of which these require a gradient, all where none is named; and the leaves."""
        leaves = {name: tensor.detach() for name, tensor in self.differentiable().items()}
        for name in names or leaves:
            leaves[name].requires_grad_()
        A, B = ([leaves[f"{s}[{i}]"] for i in range(len(self.A))] for s in "AB")
        return replace(self, x=leaves["x"], weight=leaves["weight"], bias=leaves.get("bias"), A=A, B=B), leaves

    def call(self) -> GroupedCall:
        """The op's arguments but the backend."""
        adapters = Adapters(self.A, self.B, [], self.scaling, self.dropout_p, self.seed)
        return GroupedCall(self.x, self.offsets, Weight.of(self.weight), self.bias, adapters)

    def keep(self) -> list[Tensor | None]:
        """Each adapter's mask over all rows."""
        if self.seed is None:
            return [None] * len(self.A)
        return [
            dropout_keep(seed, *self.x.shape, p) if p else None
            for seed, p in zip(self.seed, self.dropout_p, strict=True)
        ]

    def to(self, dtype: torch.dtype) -> Experts:
        """In another dtype."""
        moved = {name: t.to(dtype) for name, t in self.differentiable().items()}
        A, B = ([moved[f"{s}[{i}]"] for i in range(len(self.A))] for s in "AB")
        x, weight, bias = moved["x"], moved["weight"], moved.get("bias")
        return replace(self, x=x, weight=weight, bias=bias, A=A, B=B, dy=self.dy.to(dtype))


@dataclass(frozen=True)
class Case:
    """Experts with so many rows each, and what else is particular."""

    counts: tuple[int, ...] = (5, 0, 40, 1, 18)
    K: int = 65
    N: int = 63
    ranks: tuple[int, ...] = (8,)
    dropout_p: float = 0.0
    bias: bool = True
    wide_adapters: bool = False  # in float32, as PEFT keeps them
    transposed: bool = False  # the stack is [E, K, N] in memory
    as_peft: bool = False  # A and B are views of PEFT's lora_A [E r, K] and lora_B [N, r E]
    offsets: torch.dtype = torch.int64

    def make(self, dtype: torch.dtype = torch.float32) -> Experts:
        """Random ones, base and adapters of equal weight in ``y``."""
        E, T, K, N = len(self.counts), sum(self.counts), self.K, self.N
        adapter_dtype = torch.float32 if self.wide_adapters else dtype
        weight = (random(E, N, K) / math.sqrt(K)).to(dtype)
        A = [(random(E, r, K) / math.sqrt(K)).to(adapter_dtype) for r in self.ranks]
        B = [(random(E, N, r) / math.sqrt(r)).to(adapter_dtype) for r in self.ranks]
        if self.as_peft:
            B = [b.permute(1, 2, 0).contiguous().permute(2, 0, 1) for b in B]
        seeds = dropout_seeds(len(A), torch.device("cpu"))
        return Experts(
            x=random(T, K).to(dtype),
            offsets=torch.tensor([0, *itertools.accumulate(self.counts)], dtype=self.offsets),
            weight=weight.transpose(1, 2).contiguous().transpose(1, 2) if self.transposed else weight,
            bias=random(E, N).to(dtype) if self.bias else None,
            A=A,
            B=B,
            dropout_p=[self.dropout_p] * len(A),
            seed=seeds if self.dropout_p else None,
            dy=random(T, N).to(dtype),
        )


def random(*shape: int) -> Tensor:
    """Magnitudes within a factor of two, so that no single element decides how two errors compare."""
    return (torch.rand(shape) + 1) * (2.0 * torch.randint(2, shape) - 1)


CASES = [
    Case(),
    Case(counts=(70,)),
    Case(counts=(1,), K=1, N=1, ranks=(1,)),
    Case(counts=(0, 150, 0, 0), dropout_p=0.1, K=129, N=131),
    Case(counts=(0, 0, 0)),
    Case(counts=(0, 0), dropout_p=0.5, ranks=(8, 3)),
    Case(counts=(1, 1, 1, 0, 1, 1, 0, 2), K=64, N=96, ranks=(16,), as_peft=True),
    Case(counts=(3, 17, 0, 65, 33), dropout_p=0.5, ranks=(8, 3), as_peft=True, offsets=torch.int32),
    Case(counts=(2, 9, 1, 4), ranks=(1, 17, 16), bias=False, transposed=True),
    Case(counts=(31, 0, 2), K=257, N=100, ranks=(64,), wide_adapters=True, as_peft=True, dropout_p=0.1),
    Case(counts=(7, 540, 130, 0, 5), K=130, N=66, wide_adapters=True, transposed=True, dropout_p=0.5),
    Case(counts=(33, 2, 0, 66), K=256, N=192, ranks=(16,), wide_adapters=True, as_peft=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
PEFTS = CASES[7]


def plain(i: Experts) -> Tensor:
    """What PEFT's layer makes of each expert's rows."""
    outputs, keeps = [], i.keep()
    for e, (first, end) in enumerate(itertools.pairwise(i.offsets.tolist())):
        x = i.x[first:end]
        y = linear(x, i.weight[e], None if i.bias is None else i.bias[e])
        for A, B, s, p, keep in zip(i.A, i.B, i.scaling, i.dropout_p, keeps, strict=True):
            dropped = x if keep is None else x * keep[first:end] * dropout_scale(p)
            y = y + linear(linear(dropped, A[e].to(x.dtype)), B[e].to(x.dtype)) * s
        outputs.append(y.to(i.x.dtype))
    return torch.cat(outputs)


def results(function: Callable[[Experts], Tensor], inputs: Experts, *names: str) -> Results:
    """``y`` and the gradient of each tensor, of these where some are named."""
    i, leaves = inputs.requiring(*names)
    y = function(i)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), i.dy), strict=True))


def fused(i: Experts, backend: str | None) -> Results:
    """By the op."""
    return results(lambda i: ops.lora_grouped_linear(*i.call().flat(), backend)[0], i)


def assert_same_bits(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_as_close_as_eager(
    case: Case,
    dtype: torch.dtype,
    compute: Callable[[Experts], Results],
    eagers: Callable[[Experts], Iterable[Results]] = lambda i: [results(plain, i)],
) -> None:
    """``y`` and every gradient; each element of eager's counts where it is worst."""
    i = case.make(dtype)
    tokens = len(i.x) * min(case.ranks)
    draws = math.ceil(POOL / min(tokens, *(t.numel() for t in i.differentiable().values()))) if tokens else 1
    inputs = [i, *(case.make(dtype) for _ in range(draws - 1))]
    truth = [results(plain, i.to(torch.float64)) for i in inputs]
    eager = [worst(exact, eagers(i)) for exact, i in zip(truth, inputs, strict=True)]
    actual = [compute(i) for i in inputs]
    for name, like in eager[0].items():
        assert actual[0][name].dtype == like.dtype, name
        assert_close_as_eager(*([each[name] for each in some] for some in (actual, truth, eager)), name)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_forward_and_every_gradient_are_as_close_as_eager(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_as_close_as_eager(case, dtype, lambda i: fused(i, backend))


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
SLOWER = ("plain",) if extension.C is None else tuple(extension.C.isas()[1:])


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
    _, u = ops.lora_grouped_linear(*i.call().flat(), backend)
    assert i.seed is not None
    assert torch.equal(u, dropout_keep(i.seed[0], sum(counts), K, p).float())


@pytest.mark.parametrize(("backend", "case"), [("reference", Case()), ("cpu", PEFTS)], ids=BACKENDS)
def test_opcheck(backend: str, case: Case) -> None:
    i, _ = case.make().requiring()
    torch.library.opcheck(ops.lora_grouped_linear, (*i.call().flat(), backend))
    i = case.make()
    _, u = ops.lora_grouped_linear(*i.call().flat(), backend)
    needs = Needs.of([True] * len(i.differentiable()) if case.bias else [True, True, False] + [True] * 4, len(i.A))
    _, offsets, weight, _, adapters = i.call()
    backward = GroupedBackwardCall(i.dy, i.x, offsets, weight, adapters, u, needs)
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


def by_functional(i: Experts, backend: str | None = None) -> Tensor:
    return F.lora_grouped_linear(
        i.x, i.offsets, i.weight, i.bias, i.A, i.B, i.scaling, i.dropout_p, training=i.seed is not None, backend=backend
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
            y, u = lora_grouped_linear_reference(x, i.offsets, weight, bias, adapters(factors[:2], factors[2:]))
            ctx.save_for_backward(x, weight, u, *factors)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, weight, u, *factors = ctx.saved_tensors
            these = adapters(factors[:2], factors[2:])
            return tuple(lora_grouped_linear_backward_reference(dy, x, i.offsets, weight, u, these, [True] * 7))

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
    "four bits": ({"weight": quantize(torch.randn(6, 64))}, TypeError, "weight must be a Tensor .* 4 bits"),
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

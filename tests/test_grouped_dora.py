"""DoRA on experts stacked in one weight: parity with plain PyTorch, the norm, what is kept, refusals."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from grouped_cases import (
    DTYPES,
    SLOWER,
    Case,
    Experts,
    assert_as_close_as_eager,
    assert_same_bits,
    every_backend,
    fused,
    linear,
    random,
    results,
)
from largest import Largest
from oracle import assert_close_as_eager
from torch import Tensor

from fastpeft import extension, ops
from fastpeft import functional as F
from fastpeft.call import GroupedBackwardCall, Kept, Needs
from fastpeft.dropout import dropout_scale
from fastpeft.reference import (
    Adapter,
    lora_grouped_linear_backward_reference,
    lora_grouped_linear_reference,
    wide_dtype,
)


@dataclass(frozen=True)
class DoraExperts(Experts):
    """Each adapter with its factor ``c [E, N]``."""

    FACTORS: ClassVar = "ABc"
    c: list[Tensor]

    def to(self, dtype: torch.dtype) -> Experts:
        """The factors stay wide."""
        moved = super().to(dtype)
        return replace(moved, c=[c.to(wide_dtype(dtype)) for c in self.c])


@dataclass(frozen=True)
class DoraCase(Case):
    """Factors about 1, as in training."""

    def make(self, dtype: torch.dtype = torch.float32) -> DoraExperts:
        """Random ones."""
        made = super().make(dtype)
        c = [1 + random(*made.weight.shape[:2]).to(wide_dtype(dtype)) / 8 for _ in made.A]
        return DoraExperts(**vars(made), c=c)


CASES = [
    DoraCase(),
    DoraCase(counts=(70,)),
    DoraCase(counts=(1,), K=1, N=1, ranks=(1,)),
    DoraCase(counts=(0, 150, 0, 0), dropout_p=0.1, K=129, N=131),
    DoraCase(counts=(0, 0, 0)),
    DoraCase(counts=(40, 0, 70), ranks=(1, 17, 16), dropout_p=0.5),
    DoraCase(counts=(0, 0), dropout_p=0.5, ranks=(8, 3)),
    DoraCase(counts=(1, 1, 1, 0, 1, 1, 0, 2), K=64, N=96, ranks=(16,), as_peft=True),
    DoraCase(counts=(3, 17, 0, 65, 33), dropout_p=0.5, ranks=(8, 3), as_peft=True, offsets=torch.int32),
    DoraCase(counts=(2, 9, 1, 4), ranks=(1, 17), bias=False, transposed=True),
    DoraCase(counts=(31, 0, 2), K=257, N=100, ranks=(64,), wide_adapters=True, as_peft=True, dropout_p=0.1),
    DoraCase(counts=(7, 340, 130, 0, 5), K=130, N=66, wide_adapters=True, transposed=True, dropout_p=0.5),
    DoraCase(counts=(33, 2, 0, 66), K=256, N=192, ranks=(16,), wide_adapters=True, as_peft=True),
]
SEVERAL = CASES[8]


def plain(i: DoraExperts) -> Tensor:
    """What PEFT's layer makes of each expert's rows, one adapter after the other."""
    outputs, keeps = [], i.keep()
    for e, (first, end) in enumerate(itertools.pairwise(i.offsets.tolist())):
        x, bias = i.x[first:end], None if i.bias is None else i.bias[e]
        y = linear(x, i.weight[e], bias)
        for A, B, c, s, p, keep in zip(i.A, i.B, i.c, i.scaling, i.dropout_p, keeps, strict=True):
            dropped = x if keep is None else x * keep[first:end] * dropout_scale(p)
            base = linear(dropped, i.weight[e])
            if keep is None:
                base = y if bias is None else y - bias
            added = linear(linear(dropped, A[e].to(x.dtype)), B[e].to(x.dtype)) * s
            y = y + (c[e] - 1) * base + c[e] * added
        outputs.append(y.to(i.x.dtype))
    return torch.cat(outputs)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient_are_as_close_as_eager(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_as_close_as_eager(case, dtype, lambda i: fused(i, backend), plain=plain)


@pytest.mark.parametrize("isa", SLOWER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_is_as_close_as_eager(isa: str, dtype: torch.dtype) -> None:
    extension.built().set_isa(isa)
    try:
        assert_as_close_as_eager(SEVERAL, dtype, lambda i: fused(i, "cpu"), plain=plain)
    finally:
        extension.built().set_isa("auto")


@pytest.mark.parametrize("counts", [(400, 3, 0, 40), (30, 41, 50, 62, 27, 33)], ids=["one is large", "all are small"])
def test_any_number_of_threads(counts: tuple[int, ...]) -> None:
    case = DoraCase(counts=counts, K=300, N=270, dropout_p=0.1)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            assert_as_close_as_eager(case, torch.float32, lambda i: fused(i, "cpu"), plain=plain)
            i = case.make(torch.bfloat16)
            assert_same_bits(fused(i, "cpu"), fused(i, "cpu"))
        finally:
            torch.set_num_threads(before)


@every_backend
def test_each_expert_is_a_layer_with_dora(backend: str) -> None:
    """Of its own rows; without dropout, as a layer's mask counts from its first row."""
    i = replace(DoraCase(ranks=(8, 3)).make(), seed=None)
    found = ops.lora_grouped_linear(*i.call().flat(), backend)
    for e, (first, end) in enumerate(itertools.pairwise(i.offsets.tolist())):
        m, ones = [c[e] for c in i.c], [torch.ones_like(c[e]) for c in i.c]
        A, B = ([t[e] for t in some] for some in (i.A, i.B))
        y = F.dora_linear(
            i.x[first:end], i.weight[e], i.bias[e], A, B, m, i.scaling, norm=ones, training=False, backend=backend
        )
        torch.testing.assert_close(found[0][first:end], y)


@pytest.mark.parametrize(("backend", "case"), [("reference", DoraCase()), ("cpu", SEVERAL)], ids=["reference", "cpu"])
def test_opcheck(backend: str, case: Case) -> None:
    i, _ = case.make().requiring()
    torch.library.opcheck(ops.lora_grouped_linear, (*i.call().flat(), backend))
    i = case.make()
    _, u, z = ops.lora_grouped_linear(*i.call().flat(), backend)
    needs = Needs.of([True] * len(i.differentiable()), len(i.A))
    _, offsets, weight, _, adapters, _ = i.call()
    backward = GroupedBackwardCall(i.dy, i.x, offsets, weight, adapters, Kept(u, z), needs)
    torch.library.opcheck(ops.lora_grouped_linear_backward, (*backward.flat(), backend))
    norm = (i.weight, [], 0, i.A[0], i.B[0], 1.5, torch.float32, backend)
    torch.library.opcheck(ops.dora_norm, norm)


@every_backend
@pytest.mark.parametrize("names", [("x",), ("bias",), ("A[1]",), ("B[0]",), ("c[0]",), ("c[1]", "x")], ids=str)
def test_only_what_is_asked_for_is_kept_and_computed(backend: str, names: tuple[str, ...]) -> None:
    made = SEVERAL.make()
    expected = fused(made, backend)
    i, leaves = made.requiring(*names)
    kept: list[Tensor] = []
    magnitudes = any(name.startswith("c") for name in names)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.call_lora_grouped_linear(i.call()._replace(keep_z=magnitudes), backend)
    owned = {t.data_ptr() for t in (i.weight, *i.A, *i.B, *i.c)}
    T, N = i.dy.shape
    shapes = [tuple(t.shape) for t in kept if t.data_ptr() not in owned]
    assert shapes.count((T, N)) == (2 if magnitudes else 0)
    assert shapes.count(tuple(i.x.shape)) == ("A[1]" in names)
    assert shapes.count((T, 11)) == ("B[0]" in names)
    y.backward(i.dy)
    assert_same_bits(
        {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None},
        {name: expected[name] for name in names},
    )


def test_the_references_gradients_are_those_of_its_forward_pass() -> None:
    i = DoraCase(counts=(3, 0, 2), K=4, N=3, ranks=(2, 1), dropout_p=0.5).make(torch.float64)

    def adapters(factors: tuple[Tensor, ...]) -> list[Adapter]:
        each = zip(factors[:2], factors[2:4], i.scaling, factors[4:], i.keep(), strict=True)
        return [Adapter(A, B, s, c, keep, 2.0) for A, B, s, c, keep in each]

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
            y, u, z = lora_grouped_linear_reference(x, i.offsets, weight, bias, adapters(factors))
            ctx.save_for_backward(x, weight, u, *z, *factors)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, weight, u, z1, z2, *factors = ctx.saved_tensors
            these = adapters(tuple(factors))
            grads = lora_grouped_linear_backward_reference(dy, x, i.offsets, weight, u, [z1, z2], these, [True] * 9)
            return tuple(grads)

    leaves = [t.clone().requires_grad_() for t in i.differentiable().values()]
    assert torch.autograd.gradcheck(Node.apply, leaves)


def by_functional(i: Experts, magnitude: list[Tensor], **settings: Any) -> Tensor:
    dropout: dict[str, Any] = {"dropout_p": i.dropout_p, "training": i.seed is not None}
    return F.dora_grouped_linear(
        i.x, i.offsets, i.weight, i.bias, i.A, i.B, magnitude, i.scaling, **(dropout | settings)
    )


@every_backend
def test_functional_is_the_op_with_magnitudes_over_norms(backend: str) -> None:
    i = SEVERAL.make()
    norms = [F.dora_grouped_norm(i.weight, A, B, s, backend) for A, B, s in zip(i.A, i.B, i.scaling, strict=True)]
    magnitude = [(c * n).requires_grad_() for c, n in zip(i.c, norms, strict=True)]
    for norm in (None, norms):
        torch.manual_seed(5)
        y = by_functional(i, magnitude, norm=norm, backend=backend)
        grads = torch.autograd.grad(y, magnitude, i.dy)
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (2,))
        c = [m.detach() / n for m, n in zip(magnitude, norms, strict=True)]
        expected = results(lambda i: ops.lora_grouped_linear(*i.call().flat(), backend)[0], replace(i, seed=seed, c=c))
        assert torch.equal(y, expected["y"])
        for k in range(2):
            assert torch.equal(grads[k], expected[f"c[{k}]"] / norms[k])


def test_compiled_without_a_break() -> None:
    i = replace(SEVERAL, dropout_p=0.0).make()
    magnitude = [c.clone().requires_grad_() for c in i.c]
    compiled = torch.compile(by_functional, fullgraph=True, backend="aot_eager")
    for run in (by_functional, compiled):
        run(i, magnitude).backward(i.dy)
    found = [m.grad for m in magnitude]
    for m in magnitude:
        m.grad = None
    by_functional(i, magnitude).backward(i.dy)
    for m, twice in zip(magnitude, found, strict=True):
        torch.testing.assert_close(twice, 2 * m.grad)


def test_functions_of_torchs_that_ask_for_other_derivatives_get_the_references() -> None:
    i = replace(DoraCase(counts=(3, 0, 2), K=6, N=5, ranks=(2,)).make(torch.float64), seed=None)
    norm = F.dora_grouped_norm(i.weight, i.A[0], i.B[0], 1.5)

    def of(magnitude: Tensor) -> Tensor:
        return by_functional(i, [magnitude], norm=[norm]).cos().sum()

    def expected(magnitude: Tensor) -> Tensor:
        return plain(replace(i, c=[magnitude / norm])).cos().sum()

    for make in (lambda f: torch.func.grad(f)(i.c[0]), lambda f: torch.func.jvp(f, (i.c[0],), (i.c[0].sin(),))):
        torch.testing.assert_close(make(of), make(expected))


@every_backend
def test_no_second_derivative(backend: str) -> None:
    i, leaves = DoraCase().make().requiring("x", "c[0]")
    y = ops.call_lora_grouped_linear(i.call(), backend)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@every_backend
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[9], CASES[10]], ids=str)
def test_the_norm_of_each_expert_and_row(backend: str, dtype: torch.dtype, case: Case) -> None:
    if dtype == torch.float64:
        backend = "reference"
    i = case.make(dtype)
    for A, B, s in zip(i.A, i.B, i.scaling, strict=True):
        found = F.dora_grouped_norm(i.weight, A, B, s, backend)
        assert found.shape == i.weight.shape[:2] and found.dtype == wide_dtype(dtype)

        def norms(kind: torch.dtype, A: Tensor = A, B: Tensor = B, s: float = s) -> Tensor:
            return (i.weight.to(kind) + s * B.to(kind) @ A.to(kind)).norm(dim=2)

        if dtype != torch.float64:
            assert_close_as_eager(found, norms(torch.float64), norms(dtype))
        for e, (weight, a, b) in enumerate(zip(i.weight, A, B, strict=True)):
            assert torch.equal(found[e], F.dora_norm(weight, a, b, s, backend))


@every_backend
def test_nothing_of_the_stacks_size_is_made(backend: str) -> None:
    i = DoraCase(counts=(2, 0, 2, 1, 0, 0, 0, 0), K=64, N=48, bias=False).make()
    magnitude = [c.clone().requires_grad_() for c in i.c]
    with Largest() as largest:
        y = by_functional(i, magnitude, backend=backend)
        torch.autograd.grad(y, magnitude, i.dy)
    assert 0 < largest.elements < i.weight.numel()


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"magnitude": torch.ones(5)}, ValueError, r"magnitude must have shape \[E=3, N=5\], got \[5\]"),
    "dtype": ({"magnitude": torch.ones(3, 5).int()}, TypeError, "magnitude must have a floating dtype"),
    "count": ({"magnitude": [torch.ones(3, 5)] * 2}, ValueError, "magnitude must have one entry"),
    "norm": ({"norm": torch.ones(3, 4)}, ValueError, r"norm must have shape \[E=3, N=5\]"),
    "norm's count": ({"norm": [torch.ones(3, 5)] * 2}, ValueError, "norm must have one entry"),
    "infinite": ({"norm": torch.full((3, 5), math.inf)}, ValueError, "is infinite in row 0 of expert 0"),
    "zero": ({"weight": torch.zeros(3, 5, 6)}, ValueError, "must be finite, and is inf in row 0 of expert 0"),
    "weight": ({"weight": torch.ones(5, 6)}, ValueError, r"weight must have shape \[E, N, K\]"),
    "offsets": ({"offsets": torch.tensor([0, 3, 8])}, ValueError, "offsets must have shape"),
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
        "B": torch.zeros(3, 5, 2),
        "magnitude": torch.ones(3, 5),
        "scaling": 1.0,
    }
    F.dora_grouped_linear(**right)
    with pytest.raises(error, match=words):
        F.dora_grouped_linear(**(right | given))


def test_the_norms_operands_are_refused_by_name() -> None:
    A, B = torch.ones(3, 2, 6), torch.ones(3, 5, 2)
    for weight, words in ((torch.ones(5, 6), "weight must have shape"), (torch.ones(2, 5, 6), "A must have shape")):
        with pytest.raises(ValueError, match=words):
            F.dora_grouped_norm(weight, A, B)
    with pytest.raises(TypeError, match="A must be a Tensor"):
        F.dora_grouped_norm(torch.ones(3, 5, 6), [A], B)

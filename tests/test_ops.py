"""Both ops on every backend: parity, opcheck, what is computed, what is kept, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case, expected
from oracle import Expected, LoraInputs, Results, fused, oracle
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import ops

BACKENDS = ("reference", "cpu")  # by name: where one is missing its tests fail
every_backend = pytest.mark.parametrize("backend", BACKENDS)

TYPICAL = {
    "plain": Case(),
    "dropout": Case(dropout_p=0.1, dtype=torch.bfloat16),
    "no_bias": Case(bias=False, dtype=torch.float16, adapter_dtype=torch.float16),
    "adapters": Case(ranks=(8, 3), dropout_p=0.5),
    "mixed": Case(ranks=(8, 3), dropout_p=0.5, mixed=True, x_layout="3d"),
    "strided": Case(x_layout="transposed", weight_layout="transposed"),
    "empty": Case(M=0, dropout_p=0.1),
    "dora": Case(dora=True, dtype=torch.bfloat16),
    "dora_dropout": Case(dora=True, ranks=(8, 3), dropout_p=0.5),
}
every_typical = pytest.mark.parametrize("case", TYPICAL.values(), ids=TYPICAL)


def forward_args(i: LoraInputs, backend: str | None) -> tuple[Any, ...]:
    return *i.call().flat(), backend


def backward_args(
    i: LoraInputs, u: torch.Tensor | None, z: list[torch.Tensor], needs: list[bool], backend: str | None
) -> tuple[Any, ...]:
    return *i.backward_call(u, z, needs).flat(), backend


def requiring(i: LoraInputs, *names: str) -> tuple[LoraInputs, dict[str, torch.Tensor]]:
    """The inputs with fresh leaves, of which ``names`` require a gradient; and the leaves by name."""
    leaves = {name: tensor.detach() for name, tensor in i.differentiable().items()}
    for name in names:
        leaves[name].requires_grad_()
    A, B, c = ([leaves[f"{s}[{n}]"] for n in range(len(getattr(i, s)))] for s in "ABc")
    return replace(i, x=leaves["x"], weight=leaves["weight"], bias=leaves.get("bias"), A=A, B=B, c=c), leaves


def output(way: str, i: LoraInputs, backend: str) -> torch.Tensor:
    """``y`` by torch's dispatcher, or without it; then the backend may have the node in C++."""
    if way == "dispatched":
        return ops.lora_linear(*forward_args(i, backend))[0]
    return ops.call_lora_linear(i.call(), backend)


every_way = pytest.mark.parametrize("way", ["dispatched", "direct"])


def assert_same_bits(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


class BackwardCalls(TorchDispatchMode):
    """Collects the arguments of each call of the backward op."""

    def __init__(self) -> None:
        super().__init__()
        self.args: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ops.lora_linear_backward:
            self.args.append(args)
        return func(*args, **(kwargs or {}))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_every_gradient_are_as_close_as_eager(backend: str, case: Case) -> None:
    expected(case).assert_met_by(lambda inputs: fused(inputs, backend))


@every_backend
@every_typical
def test_a_region_of_autocast_changes_no_bit(backend: str, case: Case) -> None:
    """functional.py has cast what is cast."""
    i = case.inputs()
    expected = fused(i, backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(fused(i, backend), expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_dimensional_input(backend: str, dtype: torch.dtype) -> None:
    def make() -> LoraInputs:
        i = Case(M=1, dtype=dtype, dropout_p=0.5).inputs()
        return replace(i, x=i.x[0], dy=i.dy[0])

    Expected.of(make).assert_met_by(lambda inputs: fused(inputs, backend))


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 100), (4, 0, 100), (0, 100)], ids=str)
def test_zero_size_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    i = Case(dropout_p=0.5).inputs()
    i = replace(i, x=torch.empty(shape), dy=torch.empty(*shape[:-1], 63))
    assert_same_bits(fused(i, backend), {name: t.to(torch.float32) for name, t in oracle(i).items()})


@pytest.mark.parametrize(("N", "K"), [(0, 5), (5, 0), (0, 0)])
def test_layers_without_features_run_on_the_reference(N: int, K: int) -> None:
    i = Case(M=3).inputs()
    i = replace(
        i, x=torch.ones(3, K), weight=torch.ones(N, K), bias=torch.ones(N), A=[torch.ones(2, K)], B=[torch.ones(N, 2)]
    )
    i = replace(i, dy=torch.ones(3, N))
    assert_same_bits(fused(i, None), {name: t.to(torch.float32) for name, t in oracle(i).items()})


@every_backend
@every_typical
def test_opcheck_forward(backend: str, case: Case) -> None:
    i, _ = requiring(case.inputs(), *case.inputs().differentiable())
    torch.library.opcheck(ops.lora_linear, forward_args(i, backend))


@every_backend
@every_typical
def test_opcheck_backward(backend: str, case: Case) -> None:
    i = case.inputs()
    _, u, z = ops.lora_linear(*forward_args(i, backend))
    needs = [True, True, i.bias is not None] + [True] * (2 * len(i.A) + len(i.c))
    torch.library.opcheck(ops.lora_linear_backward, backward_args(i, u, z, needs, backend))


@every_backend
def test_u_is_wide_and_not_differentiable(backend: str) -> None:
    i, _ = requiring(Case(ranks=(8, 3), dtype=torch.bfloat16).inputs(), "A[0]", "B[1]", "x")
    y, u, _ = ops.lora_linear(*forward_args(i, backend))
    assert y.requires_grad
    assert not u.requires_grad
    assert u.dtype == torch.float32
    assert u.shape == (63, 11)


@every_backend
@pytest.mark.parametrize(
    "names",
    [("x",), ("weight",), ("bias",), ("A[0]",), ("A[1]",), ("B[0]",), ("B[1]",), ("x", "B[1]"), ("bias", "A[1]")],
)
def test_only_the_gradients_asked_for_are_computed(backend: str, names: tuple[str, ...]) -> None:
    made = Case(ranks=(8, 3), dropout_p=0.5).inputs()
    i, leaves = requiring(made, *names)
    y, _, _ = ops.lora_linear(*forward_args(i, backend))
    with BackwardCalls() as calls:
        y.backward(i.dy)
    ((*_, needs, _),) = calls.args
    assert {name for name, need in zip(leaves, needs, strict=True) if need} == set(names)
    everything = fused(made, backend)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names), name
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, everything[name]), name


@every_backend
def test_the_backward_op_returns_what_needs_asks_for(backend: str) -> None:
    i = Case(ranks=(8, 3)).inputs()
    _, u, _ = ops.lora_linear(*forward_args(i, backend))
    order = list(i.differentiable())
    everything = ops.lora_linear_backward(*backward_args(i, u, [], [True] * len(order), backend))
    for n, name in enumerate(order):
        needs = [position == n for position in range(len(order))]
        x = None if name in ("x", "bias", "B[0]", "B[1]") else i.x
        kept_u = u if name.startswith("B") else None
        (grad,) = ops.lora_linear_backward(*backward_args(replace(i, x=x), kept_u, [], needs, backend))
        assert torch.equal(grad, everything[n]), name


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("names", "keeps_x", "keeps_u"),
    [
        (("x",), False, False),
        (("bias",), False, False),
        (("weight",), True, False),
        (("A[1]",), True, False),
        (("B[0]",), False, True),
        (("x", "A[0]", "A[1]", "B[0]", "B[1]"), True, True),
    ],
)
@pytest.mark.parametrize("x_layout", ["3d", "transposed"])
def test_kept_for_backward_are_x_as_it_came_and_u(
    backend: str, dtype: torch.dtype, names: tuple[str, ...], keeps_x: bool, keeps_u: bool, x_layout: str
) -> None:
    i, _ = requiring(Case(ranks=(8, 3), dropout_p=0.1, dtype=dtype, x_layout=x_layout).inputs(), *names)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.lora_linear(*forward_args(i, backend))
    parameters = {t.data_ptr() for t in (i.weight, *i.A, *i.B)}
    others = [t for t in kept if t.data_ptr() not in parameters]
    assert i.seed is not None
    of_x = [t for t in others if t.data_ptr() == i.x.data_ptr()]
    of_seed = [t for t in others if t.data_ptr() == i.seed.data_ptr()]
    of_u = [t for t in others if t.shape == (63, 11)]
    assert len(of_x) == keeps_x
    assert len(of_u) == keeps_u
    assert all(t.dtype == torch.float32 for t in of_u)
    assert all(t.dtype == i.x.dtype and t.stride() == i.x.stride() for t in of_x)
    assert len(others) == len(of_x) + len(of_seed) + len(of_u)


@every_backend
@every_typical
def test_the_same_call_twice_gives_the_same_bits(backend: str, case: Case) -> None:
    i = case.inputs()
    assert_same_bits(fused(i, backend), fused(i, backend))


LARGE = {
    "large_M": Case(M=1000, K=33, N=70, ranks=(16,), dropout_p=0.1),
    "large_K": Case(M=5, K=3000, N=70, ranks=(16,), dropout_p=0.1),
    "large_N": Case(M=5, K=33, N=3000, ranks=(16,), dropout_p=0.1),
    "square": Case(M=200, K=300, N=300, ranks=(16,), dropout_p=0.1),
}


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_any_number_of_threads(backend: str, case: Case, dtype: torch.dtype) -> None:
    judge = expected(replace(case, dtype=dtype))
    for count in (1, 2):
        with threads(count):
            judge.assert_met_by(lambda inputs: fused(inputs, backend))
            assert_same_bits(fused(judge.inputs[0], backend), fused(judge.inputs[0], backend))


@every_backend
@every_way
def test_double_backward_is_refused(backend: str, way: str) -> None:
    i, leaves = requiring(Case().inputs(), "x", "A[0]")
    y = output(way, i, backend)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@every_backend
@every_way
@pytest.mark.parametrize("name", ["x", "weight", "A[0]", "B[0]"])
def test_modifying_what_was_kept_is_detected(backend: str, way: str, name: str) -> None:
    i, leaves = requiring(Case().inputs(), "x", "A[0]", "B[0]")
    y = output(way, i, backend)
    with torch.no_grad():
        leaves[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(i.dy)


@every_backend
@every_way
def test_x_may_be_modified_when_only_B_is_trained(backend: str, way: str) -> None:
    made = Case().inputs()
    expected = fused(made, backend)["B[0]"]
    i, leaves = requiring(replace(made, x=made.x.clone()), "B[0]")
    y = output(way, i, backend)
    leaves["x"].zero_()
    y.backward(i.dy)
    assert leaves["B[0]"].grad is not None
    assert torch.equal(leaves["B[0]"].grad, expected)


@every_backend
@every_way
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_without_grad_mode(backend: str, way: str, mode: Any) -> None:
    i, _ = requiring(Case(dropout_p=0.5).inputs(), "x", "A[0]", "B[0]")
    with mode():
        y = output(way, i, backend)
    assert not y.requires_grad
    assert torch.equal(y, fused(i, backend)["y"])


@every_backend
@every_typical
def test_both_ways_give_the_same_bits(backend: str, case: Case) -> None:
    made = case.inputs()
    learned = [name for name in made.differentiable() if name != "dy"]
    results = []
    for way in ("dispatched", "direct"):
        i, leaves = requiring(made, *learned)
        y = output(way, i, backend)
        y.backward(i.dy)
        results.append({"y": y.detach()} | {name: leaves[name].grad for name in learned})
    assert_same_bits(*results)


@every_backend
@every_way
def test_whatever_requires_a_gradient_gets_it(backend: str, way: str) -> None:
    made = Case(ranks=(8, 3), dora=True).inputs()
    expected = fused(made, backend)
    names = [name for name in made.differentiable() if name != "dy"]
    for n in range(len(names)):
        for some in (names[n : n + 1], names[n:], names[:n]):
            i, leaves = requiring(made, *some)
            y = output(way, i, backend)
            assert y.requires_grad == bool(some)
            if some:
                y.backward(i.dy)
            found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            assert_same_bits(found, {name: expected[name] for name in some})


@every_backend
@every_way
def test_what_is_kept_can_be_moved_away_and_is_given_up(backend: str, way: str) -> None:
    """Saved tensors' hooks see it; a graph that was not retained holds nothing any more."""
    i, leaves = requiring(Case(dropout_p=0.5).inputs(), "x", "A[0]", "B[0]")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = output(way, i, backend)
    assert {t.shape for t in packed} >= {i.x.shape, i.weight.shape, i.A[0].shape, i.B[0].shape}
    first = torch.autograd.grad(y, list(leaves.values())[:1], i.dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values())[:1], i.dy)
    assert torch.equal(*first, *second)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, list(leaves.values())[:1], i.dy)


class Cut(torch.autograd.Function):
    """Lets no gradient through."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> None:
        return None


@every_backend
@every_way
def test_no_gradient_in_no_gradients_out(backend: str, way: str) -> None:
    i, leaves = requiring(Case().inputs(), "x", "A[0]", "B[0]")
    Cut.apply(output(way, i, backend)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
@every_backend
@every_way
def test_anomaly_detection_names_the_op(backend: str, way: str) -> None:
    i, _ = requiring(Case().inputs(), "x", "A[0]", "B[0]")
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"LoraLinear.*returned nan"):
        output(way, i, backend).backward(torch.full_like(i.dy, torch.nan))


@every_backend
def test_settings_in_tensors_may_have_strides(backend: str) -> None:
    i = Case(ranks=(8, 3), dropout_p=0.5, mixed=True).inputs()
    assert i.seed is not None
    assert i.adapter_index is not None
    seed, index = (torch.stack((t, t + 1), dim=1)[:, 0] for t in (i.seed, i.adapter_index.to(torch.int32)))
    assert_same_bits(fused(replace(i, seed=seed, adapter_index=index), backend), fused(i, backend))


@every_backend
def test_nothing_that_came_in_is_written_to(backend: str) -> None:
    i = Case(ranks=(8, 3), dropout_p=0.5, mixed=True, x_layout="row_stride").inputs()
    before = {name: tensor.clone() for name, tensor in i.differentiable().items()}
    fused(i, backend)
    assert_same_bits(i.differentiable(), before)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinities_and_nans_pass_through(backend: str, dtype: torch.dtype) -> None:
    i = Case(M=3, dtype=dtype, adapter_dtype=dtype).inputs()
    x = i.x.clone()
    x[0, 0], x[1, 0] = torch.inf, torch.nan
    y = fused(replace(i, x=x), backend)["y"]
    assert not y[:2].isfinite().any()
    assert torch.equal(y[2], fused(i, backend)["y"][2])


@every_backend
@every_way
def test_factors_with_strides_are_read_right(backend: str, way: str) -> None:
    made = Case(dora=True).inputs()
    strided = torch.stack((made.c[0], made.c[0] + 1), dim=1)[:, 0]
    assert not strided.is_contiguous()
    results = []
    for c in (made.c[0], strided):
        i, leaves = requiring(replace(made, c=[c]), "x", "c[0]")
        y = output(way, i, backend)
        y.backward(i.dy)
        results.append({"y": y.detach(), "x": leaves["x"].grad, "c": leaves["c[0]"].grad})
    assert_same_bits(*results)


@every_backend
def test_a_compiled_backward_pass_runs_it(backend: str) -> None:
    made = Case(dropout_p=0.5).inputs()
    gradients = []
    for compiled in (False, True):
        i, leaves = requiring(made, "x", "A[0]", "B[0]")
        y = output("direct", i, backend)
        with compiled_autograd._enable(torch.compile(backend="eager")) if compiled else nullcontext():
            y.backward(i.dy)
        gradients.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    assert_same_bits(*gradients)

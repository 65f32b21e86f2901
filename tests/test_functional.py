"""functional.lora_linear: what it refuses, the dtype it runs in, its seeds, checkpointing and compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from derivatives import differentiated
from oracle import make_inputs, run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.functional import lora_linear, lora_update

M, K, N, R = 6, 5, 4, 3


def good() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 3, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "A": torch.randn(R, K),
        "B": torch.randn(N, R),
        "scaling": 2.0,
        "dropout_p": 0.1,
    }


def two() -> dict[str, Any]:
    one = good()
    return one | {"A": [one["A"], torch.randn(2, K)], "B": [one["B"], torch.randn(N, 2)]}


WRONG = [
    ({"x": [1.0]}, TypeError, r"x must be a Tensor, got list"),
    ({"x": torch.ones(2, K, dtype=torch.int64)}, TypeError, r"x must have a floating dtype, got torch.int64"),
    ({"x": torch.ones(2, K).half()}, TypeError, r"x must have the dtype of weight, torch.float32, got torch.float16"),
    ({"x": torch.ones(2, K + 1)}, ValueError, r"x must have shape \[..., K=5\], got \[2, 6\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[..., K=5\], got \[\]"),
    ({"x": torch.ones(2, K, device="meta")}, ValueError, r"x is a meta tensor"),
    ({"weight": None}, TypeError, r"weight must be a Tensor, got NoneType"),
    ({"weight": torch.ones(N, K, dtype=torch.uint8)}, TypeError, r"weight must be float64, .*got torch.uint8"),
    ({"weight": torch.ones(N, K).to(torch.float8_e4m3fn)}, TypeError, r"weight must be float64, .*got torch.float8"),
    ({"bias": [1.0]}, TypeError, r"bias must be a Tensor, got list"),
    ({"bias": torch.ones(N, dtype=torch.int32)}, TypeError, r"bias must have a floating dtype, got torch.int32"),
    ({"A": None}, TypeError, r"A must be a Tensor, got NoneType"),
    ({"B": [None]}, TypeError, r"B\[0\] must be a Tensor, got NoneType"),
    ({"scaling": "2"}, TypeError, r"scaling must be a number, got str"),
    ({"dropout_p": None}, TypeError, r"dropout_p must be a number, got NoneType"),
    ({"adapter_index": [0, 0]}, TypeError, r"adapter_index must be a Tensor, got list"),
    ({"adapter_index": torch.tensor([[0, -1, 0], [0, 1, 0]])}, ValueError, r"adapter_index must be .* 0, got -1 to 1"),
    ({"adapter_index": torch.full((2, 3), -2)}, ValueError, r"adapter_index must be from -1 to 0, got -2 to -2"),
    ({"weight": torch.ones(N)}, ValueError, r"weight must have shape \[N, K\], got \[4\]"),
    ({"weight": torch.ones(N, K, device="meta")}, ValueError, r"weight must be on the device of x, cpu, got meta"),
    ({"bias": torch.ones(N + 1)}, ValueError, r"bias must have shape \[N=4\], got \[5\]"),
    ({"bias": torch.ones(N, device="meta")}, ValueError, r"bias must be on the device of x, cpu, got meta"),
    ({"A": torch.ones(R, K + 1)}, ValueError, r"A must have shape \[r, K=5\].*got \[3, 6\]"),
    ({"A": torch.ones(K)}, ValueError, r"A must have shape \[r, K=5\].*got \[5\]"),
    ({"A": torch.ones(0, K), "B": torch.ones(N, 0)}, ValueError, r"A must have .* rank r of at least 1, got \[0, 5\]"),
    ({"A": torch.ones(R, K, device="meta")}, ValueError, r"A must be on the device of x, cpu, got meta"),
    ({"A": torch.ones(R, K, dtype=torch.int8)}, TypeError, r"A and B must have floating dtypes, got torch.int8"),
    ({"A": [], "B": []}, ValueError, r"A holds no adapter"),
    ({"B": torch.ones(N + 1, R)}, ValueError, r"B must have shape \[N=4, r=3\], got \[5, 3\]"),
    ({"B": torch.ones(N, R + 1)}, ValueError, r"B must have shape \[N=4, r=3\], got \[4, 4\]"),
    ({"B": torch.ones(N, R, device="meta")}, ValueError, r"B must be on the device of x, cpu, got meta"),
    ({"scaling": float("nan")}, ValueError, r"scaling must be finite, got nan"),
    ({"scaling": float("inf")}, ValueError, r"scaling must be finite, got inf"),
    ({"scaling": torch.tensor(float("nan"))}, ValueError, r"scaling must be finite, got nan"),
    ({"scaling": torch.ones(2)}, ValueError, r"scaling must hold one number, got a tensor of shape \[2\]"),
    ({"scaling": [1.0, 2.0]}, ValueError, r"scaling must have one entry for each of the 1 adapters in A, got 2"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    ({"dropout_p": [0.1, 0.2]}, ValueError, r"dropout_p must have one entry for each of the 1 adapters in A, got 2"),
    ({"adapter_index": torch.zeros(2, 3)}, TypeError, r"adapter_index must have an integer .* got torch.float32"),
    ({"adapter_index": torch.zeros(2, 3, dtype=torch.uint16)}, TypeError, r"adapter_index must .* got torch.uint16"),
    ({"B": torch.tensor(1.0)}, ValueError, r"B must have shape \[N=4, r=3\], got \[\]"),
    ({"scaling": True}, TypeError, r"scaling must be a number, got bool"),
    ({"scaling": 10**400}, ValueError, r"scaling must fit a float, got an integer of 1329 bits"),
    ({"scaling": torch.ones((), device="meta")}, ValueError, r"scaling is a meta tensor and holds no number"),
    ({"dropout_p": True}, TypeError, r"dropout_p must be a number, got bool"),
    ({"training": "no"}, TypeError, r"training must be True or False, got 'no'"),
    ({"backend": ["cpu"]}, TypeError, r"backend must be None or a backend's name, got list"),
    ({"adapter_index": torch.zeros(6).long()}, ValueError, r"adapter_index must have .* of x, \[2, 3\], got \[6\]"),
    ({"adapter_index": torch.zeros(2, 3, device="meta").long()}, ValueError, r"adapter_index must be on .* got meta"),
    ({"backend": "opencl"}, ValueError, r"backend must be None or one of .*cpu.*reference.*got 'opencl'"),
]  # fmt: skip
WRONG_OF_TWO = [
    ({"B": [torch.ones(N, R)]}, ValueError, r"B must have one entry for each of the 2 adapters in A, got 1"),
    ({"A": [torch.ones(R, K), torch.ones(2, 1)]}, ValueError, r"A\[1\] must have shape \[r, K=5\]"),
    ({"B": [torch.ones(N, R), torch.ones(N, 1)]}, ValueError, r"B\[1\] must have shape \[N=4, r=2\], got \[4, 1\]"),
    ({"scaling": [1.0, float("nan")]}, ValueError, r"scaling\[1\] must be finite, got nan"),
    ({"dropout_p": [1.5, 0.0]}, ValueError, r"dropout_p\[0\] must be in \[0, 1\), got 1.5"),
]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"A": []}, ValueError, r"A holds no adapter"),
        ({"A": torch.ones(K)}, ValueError, r"A must be a matrix, got shape \[5\]"),
        ({"B": torch.ones(N, R, 1)}, ValueError, r"B must be a matrix, got shape \[4, 3, 1\]"),
        ({"B": torch.ones(N, R + 1)}, ValueError, r"B must have shape \[N=4, r=3\], got \[4, 4\]"),
        ({"x": torch.ones(2, K + 1)}, ValueError, r"x must have shape \[..., K=5\], got \[2, 6\]"),
        ({"x": torch.ones(2, 3, K).to(torch.float8_e4m3fn)}, TypeError, r"x must be float64.*got torch.float8_e4m3fn"),
        ({"x": torch.ones(2, 3, K).to("meta")}, ValueError, r"A must be on the device of x, meta, got cpu"),
        ({"bias": torch.ones(N + 1)}, ValueError, r"bias must have shape \[N=4\], got \[5\]"),
        ({"training": 1}, TypeError, r"training must be True or False, got 1"),
        ({"backend": "opencl"}, ValueError, r"backend must be None or one of"),
    ],
)
def test_wrong_input_of_an_update_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = good()
    del arguments["weight"]
    with pytest.raises(error, match=message):
        lora_update(**(arguments | wrong))


@pytest.mark.parametrize(
    ("base", "wrong", "error", "message"), [(good, *w) for w in WRONG] + [(two, *w) for w in WRONG_OF_TWO]
)
def test_wrong_input_is_named_and_nothing_is_modified(
    base: Callable[[], dict[str, Any]], wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = base() | wrong
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    lists = {k: list(v) for k, v in arguments.items() if isinstance(v, list)}
    generator = torch.get_rng_state()
    with pytest.raises(error, match=message):
        lora_linear(**arguments)
    for name, tensor in before.items():
        assert torch.equal(*(t.flatten().view(torch.uint8) for t in (arguments[name], tensor))), name
        assert arguments[name]._version == 0, name
    for name, values in lists.items():
        assert all(a is b for a, b in zip(arguments[name], values, strict=True)), name
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_cpus_refuses_float64_by_name_with_the_reason() -> None:
    arguments = {k: v.double() if isinstance(v, Tensor) else v for k, v in good().items()}
    with pytest.raises(fastpeft.BackendRefusal, match=r"backend='cpu' cannot run lora_linear: .*float64"):
        lora_linear(**arguments, backend="cpu")
    assert lora_linear(**arguments).dtype == torch.float64


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_it_runs_in_autocasts_dtype(backend: str, autocast: torch.dtype, base: torch.dtype) -> None:
    made = good()
    made = {k: v.to(base) if k in ("x", "weight", "bias") else v for k, v in made.items()} | {"dropout_p": 0.0}
    leaves = {k: v.requires_grad_() for k, v in made.items() if isinstance(v, Tensor)}
    with torch.autocast("cpu", autocast):
        y = lora_linear(**made, backend=backend)
        expected = torch.nn.functional.linear(made["x"], made["weight"]).dtype
    assert y.dtype == expected == autocast
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype, name
    cast = {k: v.detach().to(autocast) if k in ("x", "weight", "bias") else v for k, v in made.items()}
    assert torch.equal(y, lora_linear(**cast, backend=backend))


def test_without_autocast_it_runs_in_the_dtype_of_the_weight() -> None:
    made = {k: v.bfloat16() if k in ("x", "weight") else v for k, v in good().items()}
    assert lora_linear(**made).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_tensor_scaling_may_change_between_calls_and_gets_no_gradient(backend: str) -> None:
    made = good() | {"dropout_p": 0.0}
    scaling = torch.tensor(2.0, requires_grad=True)
    B = made["B"].requires_grad_()
    for value in (2.0, -0.5):
        with torch.no_grad():
            scaling.fill_(value)
        by_tensor = lora_linear(**made | {"scaling": scaling}, backend=backend)
        by_float = lora_linear(**made | {"scaling": value}, backend=backend)
        # powers of two: multiplying by them rounds nothing, wherever it is done
        assert torch.equal(by_tensor, by_float)
        (of_tensor,) = torch.autograd.grad(by_tensor.sum(), B)
        (of_float,) = torch.autograd.grad(by_float.sum(), B)
        assert torch.equal(of_tensor, of_float)
    assert scaling.grad is None


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_dropout_follows_torch_manual_seed_and_training(backend: str) -> None:
    made = two() | {"x": torch.randn(64, K), "dropout_p": [0.5, 0.0]}
    torch.manual_seed(5)
    first, second = lora_linear(**made, backend=backend), lora_linear(**made, backend=backend)
    torch.manual_seed(5)
    assert torch.equal(lora_linear(**made, backend=backend), first)
    assert not torch.equal(first, second)
    off = lora_linear(**made, training=False, backend=backend)
    assert torch.equal(off, lora_linear(**made | {"dropout_p": 0.0}, backend=backend))
    assert not torch.equal(off, first)


def test_no_random_number_is_drawn_when_nothing_is_dropped() -> None:
    made = good()
    generator = torch.get_rng_state()
    lora_linear(**made, training=False)
    lora_linear(**made | {"dropout_p": 0.0})
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_reproduces_the_mask(backend: str, use_reentrant: bool) -> None:
    layers = nn.Sequential(
        fastpeft.nn.LoRALinear.from_linear(nn.Linear(K, 16), r=R, dropout=0.5, backend=backend),
        nn.GELU(),
        fastpeft.nn.LoRALinear.from_linear(nn.Linear(16, N), r=R, dropout=0.5, backend=backend),
    )
    for module in (layers[0], layers[2]):
        nn.init.normal_(module.lora_B)
    x = torch.randn(7, K, requires_grad=True)
    leaves = [x, *(p for p in layers.parameters() if p.requires_grad)]
    results = []
    for run_layers in (layers, lambda x: checkpoint(layers, x, use_reentrant=use_reentrant)):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(11)
        y = run_layers(x)
        torch.randn(3)  # what another layer would draw between forward and backward
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiled_as_a_full_graph_it_gives_the_same_bits(backend: str, dropout_p: float) -> None:
    made = make_inputs((3, 7, 16), 8, (4, 2), torch.float32, dropout_p=dropout_p)
    i = replace(made, scaling=[2.0, -0.5])  # powers of two: a graph multiplies them into B
    torch._dynamo.reset()

    def call(*leaves: Tensor) -> Tensor:
        x, weight, bias, *AB = leaves
        return lora_linear(x, weight, bias, AB[:2], AB[2:], i.scaling, i.dropout_p, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        torch.manual_seed(2)
        results.append(run(lambda j, f=function: f(*j.differentiable().values()), i))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_one_graph_serves_any_number_of_tokens(backend: str) -> None:
    torch._dynamo.reset()
    made = good()
    made.pop("x")

    def call(x: Tensor) -> Tensor:
        return lora_linear(x, **made, training=False, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 8, 30):
            x = torch.randn(rows, 3, K)
            assert torch.equal(compiled(x), call(x))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_scaling_that_changes_between_calls_breaks_no_graph(backend: str) -> None:
    torch._dynamo.reset()
    made = good() | {"dropout_p": 0.0}
    made.pop("scaling")

    def call(scaling: float) -> Tensor:
        return lora_linear(**made, scaling=scaling, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for scaling in (2.0, 0.5, -4.0):
        assert torch.equal(compiled(scaling), call(scaling))


NOT_DENSE = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
}


@pytest.mark.parametrize("name", ["x", "weight", "A", "B"])
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense_are_named(kind: str, name: str) -> None:
    arguments = {"x": torch.ones(2, K), "weight": torch.ones(N, K), "A": torch.ones(R, K), "B": torch.ones(N, R)}
    arguments[name] = NOT_DENSE[kind](arguments[name])
    words = kind.removeprefix("_")
    with pytest.raises(TypeError, match=rf"{name} must be a dense tensor, got a _?{words} one"):
        lora_linear(**arguments, bias=None, scaling=1.0)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_transforms_and_forward_mode_give_what_torch_gives(backend: str | None) -> None:
    torch.manual_seed(0)
    x, W, b, A, B = (torch.randn(s) for s in ((6, K), (N, K), (N,), (R, K), (N, R)))
    found = differentiated(lambda x, A: lora_linear(x, W, b, A, B, 2.0, backend=backend).square().sum(), x, A)
    right = differentiated(lambda x, A: (x @ W.t() + b + 2 * (x @ A.t()) @ B.t()).square().sum(), x, A)
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert any(t.abs().max() > 0 for t in found["jvp"])


class _OpsSeen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op_and_changes_no_bit():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 20, requires_grad=True), torch.randn(9, 20)
    A, B = torch.randn(4, 20, requires_grad=True), torch.randn(9, 4, requires_grad=True)

    def run():
        torch.manual_seed(1)
        y = lora_linear(x, weight, None, A, B, 0.5, 0.25)
        return y, *torch.autograd.grad(y.square().sum(), (x, A, B))

    unseen = run()
    with _OpsSeen() as seen:
        watched = run()
    assert "fastpeft::lora_linear" in seen.names
    assert "fastpeft::lora_linear_backward" in seen.names
    assert all(torch.equal(a, b) for a, b in zip(unseen, watched, strict=True))

"""PEFT's models under torch.compile, torch.export and checkpointing: one graph, all of it fused, made once."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import assert_close_as_eager
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_layers import (
    adalora_model,
    layer_of,
    lora_model,
    no_peft_forward,
    signed,
    tiny_llama,
    tokens,
    train,
)
from test_peft_four_bit import K, N, dense_twin, four_bit_model, quantized
from test_peft_vera import vera_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastpeft
from fastpeft import ops

F32 = torch.float32


def dense() -> nn.Linear:
    return nn.Linear(K, N)


QADALORA = {"init_r": 4, "target_r": 2, "total_step": 10}
MODELS: dict[str, Callable[[float], peft.PeftModel]] = {
    "lora": lambda p: lora_model(dense(), lora_dropout=p),
    "dora": lambda p: lora_model(dense(), lora_dropout=p, use_dora=True),
    "adalora": lambda p: adalora_model(dense(), lora_dropout=p),
    "vera": lambda p: vera_model(dense(), vera_dropout=p),
    "qlora": lambda p: four_bit_model(quantized(F32), lora_dropout=p),
    "qdora": lambda p: four_bit_model(quantized(F32), lora_dropout=p, use_dora=True),
    "qadalora": lambda p: four_bit_model(quantized(F32), lora_dropout=p, **QADALORA),
}
lora_and_dora = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
with_scaling = pytest.mark.parametrize("name", ["lora", "dora", "qlora", "qdora"])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph of another test's; a layer that goes to PEFT's own forward fails the test."""
    torch.compiler.reset()
    with no_peft_forward(monkeypatch):
        yield


def fused(name: str, p: float = 0.0) -> peft.PeftModel:
    model = MODELS[name](p)
    assert fastpeft.patch(model).left_to_peft == {}
    return model


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """``y`` and every gradient, with masks and a gradient of ``y`` of one seed."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = call(x)
    y.backward(signed(*y.shape).to(y.dtype))
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def in_float64(model: peft.PeftModel) -> peft.PeftModel:
    """The same layer, fused; of 4 bits with the weight that they stand for."""
    if layer_of(model).base_layer.weight.is_floating_point():
        return copy.deepcopy(model).double()
    twin = dense_twin(model, F32).train(model.training)
    fastpeft.patch(twin)
    return twin


def assert_as_close(compiled: Callable[[Tensor], Tensor], model: peft.PeftModel, rows: int = 33) -> None:
    """A graph may multiply in another order: it has at most twice the error of the fused layer."""
    exact, draws = in_float64(model), [signed(rows, K) for _ in range(4)]
    found, expected = ([step(call, model, x) for x in draws] for call in (compiled, model))
    oracle = [step(exact, exact, x.double()) for x in draws]
    for results in zip(*(zip(*each, strict=True) for each in (found, oracle, expected)), strict=True):
        assert_close_as_eager(*results)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_one_graph_with_one_op(name: str, training: bool) -> None:
    model = fused(name, p=0.3).train(training)
    model(signed(5, K))  # in its first call a layer of bitsandbytes settles its dtype
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_as_close(compiled, model)
    (graph,) = counter.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count("fastpeft.lora_linear.default") == 1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_dropout": 0.5},
        {"lora_bias": True},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.5},
    ],
    ids=["plain", "dropout", "bias", "dora", "dora_dropout"],
)
def test_a_graph_gives_the_same_bits(config: dict[str, Any]) -> None:
    model = lora_model(nn.Linear(24, 24), lora_alpha=8, **config)  # a scaling of 2: a graph multiplies it into B
    fastpeft.patch(model)
    layer, x = layer_of(model), torch.randn(5, 24, requires_grad=True)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        results = []
        for run in (compiled, layer):
            torch.manual_seed(4)
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
        for graph, eager in zip(*results, strict=True):
            assert torch.equal(graph, eager)
        train_by_halves(trained)


def train_by_halves(trained: list[nn.Parameter]) -> None:
    """What a graph must not have taken for a constant."""
    with torch.no_grad():
        for parameter in trained:
            parameter /= 2


@lora_and_dora
@pytest.mark.parametrize("scaling", [2.0, torch.tensor(2.0)], ids=["float", "tensor"])
def test_one_graph_lasts_through_training(use_dora: bool, scaling: Any) -> None:
    model = lora_model(nn.Linear(24, 24), use_dora=use_dora)
    fastpeft.patch(model)
    layer, x = layer_of(model), torch.randn(5, 24)
    layer.scaling["default"] = scaling
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert torch.equal(compiled(x), layer(x))
            train_by_halves(list(layer.parameters()))  # as to the scaling, powers of two: no matter where it goes in
            if isinstance(scaling, Tensor):
                layer.scaling["default"] *= 2


@pytest.mark.parametrize("name", MODELS)
def test_no_number_makes_another_graph(name: str) -> None:
    """Sizes of batches after the second, seeds, training itself."""
    model = fused(name, p=0.3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for samples in (4, 6):
        step(compiled, model, signed(samples, 3, K))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for samples in (7, 12):
            step(compiled, model, signed(samples, 3, K))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter *= 0.9


@with_scaling
@pytest.mark.parametrize("dynamic", [None, True])
def test_scalings_after_the_second_make_no_graph(name: str, dynamic: bool | None) -> None:
    """The second one turns the number into a symbol, as in PEFT's own layers."""
    model = fused(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for scale in (1.0, 3.0):
        layer_of(model).set_scale("default", scale)
        step(compiled, model, signed(33, K))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (0.5, 0.3, 0.7, -1.1):
            layer_of(model).set_scale("default", scale)
            assert_as_close(compiled, model)


@pytest.mark.parametrize("patched", ["before", "after"])
def test_a_hot_swap_makes_no_graph(patched: str, tmp_path: Path) -> None:
    """Of adapters of other ranks and scalings, by PEFT's own preparation."""
    base = dense()
    others = {}
    for rank, alpha in ((6, 5), (3, 9), (8, 2)):
        others[rank] = lora_model(copy.deepcopy(base), r=rank, lora_alpha=alpha)
        others[rank].save_pretrained(tmp_path / str(rank))
        fastpeft.patch(others[rank])
    model = lora_model(copy.deepcopy(base))
    if patched == "before":
        fastpeft.patch(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    fastpeft.patch(model)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), signed(5, K)
    with torch.no_grad():
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rank, other in others.items():
                hotswap_adapter(model, str(tmp_path / str(rank)), adapter_name="default", torch_device="cpu")
                torch.testing.assert_close(compiled(x), other(x))


@lora_and_dora
def test_a_compiled_model_trains_as_an_eager_one(use_dora: bool) -> None:
    """Gradients of two batches are added up in each step."""
    model = tiny_llama(use_dora=use_dora)
    fastpeft.patch(model)
    batches, losses = [tokens() for _ in range(4)], []
    for compiles in (False, True):
        own = copy.deepcopy(model)
        call = torch.compile(own, backend="aot_eager") if compiles else own
        optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.5)
        found = []
        for i, ids in enumerate(batches):
            loss = call(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append(loss.detach())
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0][2:].ne(losses[0][:2]).all()


def save_products(context: object, op: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.fastpeft.lora_linear.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("name", ["lora", "dora", "qlora", "qdora"])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "selective"])
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_checkpointing(name: str, kind: str, compiles: bool) -> None:
    model, x = fused(name, p=0.3), signed(5, K)
    options: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, save_products)

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(lambda t: model(t).tanh(), x, **options)

    layer_of(model).scaling["default"] = 0.5  # a power of two may be multiplied in anywhere
    call = torch.compile(recomputed, backend="aot_eager") if compiles else recomputed
    for found, expected in zip(step(call, model, x), step(lambda t: model(t).tanh(), model, x), strict=True):
        assert torch.equal(found, expected)


@lora_and_dora
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(use_reentrant: bool, use_dora: bool) -> None:
    model = lora_model(nn.Linear(24, 24), lora_dropout=0.5, use_dora=use_dora)
    fastpeft.patch(model)
    layer = layer_of(model)
    x = torch.randn(33, 24, requires_grad=True)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = run(x)
        y = run(y)
        grads = torch.autograd.grad(y.square().sum(), [x, *trained]) if run is layer else None
        if grads is None:
            layer.zero_grad()
            x.grad = None
            y.square().sum().backward()
            grads = (x.grad, *(parameter.grad for parameter in trained))
        results.append([y, *grads])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_a_model(use_reentrant: bool) -> None:
    model, ids = tiny_llama(lora_dropout=0.5, init_lora_weights=False), tokens()
    model.enable_input_require_grads()
    fastpeft.patch(model)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train().zero_grad()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids).loss.backward()
        results.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


# Where modules share one, as VeRA's layers do, torch.export puts others in their place unless it is strict.
EXPORTED = [(name, strict) for name in MODELS for strict in (True, False) if (name, strict) != ("vera", False)]


@pytest.mark.parametrize(("name", "strict"), EXPORTED)
def test_an_exported_program_has_the_op(name: str, strict: bool) -> None:
    """Also once it was saved and loaded; of 4 bits it holds the packed weight."""
    model, x = fused(name).eval(), signed(5, K)
    program = torch.export.export(
        model, (x,), dynamic_shapes={"args": ({0: torch.export.Dim("rows", min=2)},)}, strict=strict
    )
    assert sum(str(node.target) == "fastpeft.lora_linear.default" for node in program.graph.nodes) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for rows in (5, 9):
        x = signed(rows, K)
        for exported in (program, loaded):
            torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("name", ["lora", "qdora"])
def test_a_program_compiled_ahead_of_time_calls_the_op(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By AOTInductor; it runs where Python has the op."""
    model, x = fused(name).eval(), signed(5, K)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"args": ({0: torch.export.Dim("rows", min=2)},)})
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        calls, run = [], ops._run_forward
        monkeypatch.setattr(ops, "_run_forward", lambda *call: calls.append(None) or run(*call))
        for rows in (5, 9):
            x = signed(rows, K)
            torch.testing.assert_close(loaded(x), model(x))
    assert len(calls) == 2


def test_a_model_is_one_graph_that_trains() -> None:
    model = tiny_llama(lora_dropout=0.1)
    fastpeft.patch(model)
    losses = train(torch.compile(model, backend="aot_eager", fullgraph=True), [tokens()] * 6)
    assert losses[-1] < losses[0]

"""Whatever a router hands over, fused experts give what PEFT's give, as close to float64, or raise what they raise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import Results, assert_close_as_eager
from peft_experts import (
    EXPERTS,
    HIDDEN,
    IMPLEMENTATIONS,
    KINDS,
    Call,
    draw,
    fused_calls,
    moe,
    run,
    wrappers,
)
from peft_layers import no_peft_forward, tokens
from test_peft_experts import DRAWS, EXPERTS_ONLY, assert_parity, dtypes, in_float64, set_implementation
from torch import nn

import fastpeft

SPOILT = 3  # the token that is


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@dtypes
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("routing", ["to one expert", "none to most", "twice to the same", "to all"])
def test_routings(routing: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_parity(moe(kind, **EXPERTS_ONLY).to(dtype), monkeypatch, lambda: draw(routing))


@pytest.mark.parametrize("count", [1, 2])
def test_few_tokens(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_parity(moe(**EXPERTS_ONLY), monkeypatch, lambda: draw(tokens=count))


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss", "NemotronH"])
def test_no_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe(kind, **EXPERTS_ONLY)
    fastpeft.patch(model)
    with fused_calls(monkeypatch) as seen:
        found = run(model, draw(tokens=0))
    assert len(seen) == 1 and found["y"].shape == found["x"].shape == (0, HIDDEN)
    assert len(found) == 3 + 4 and not any(gradient.any() for gradient in found.values())


def spoilt(call: Call, where: str, value: float) -> Call:
    """One token with ``value`` as the weight of its first expert or in its ``x``."""
    x, index, weights, dy = (each.clone() for each in call)
    (weights if where == "weights" else x)[SPOILT, 0] = value
    return x, index, weights, dy


def assert_finite_alike(actual: list[Results], oracle: list[Results], eager: list[Results]) -> None:
    """Finite where PEFT's results are, and there as close to float64."""
    for name in eager[0]:
        where = [each[name].isfinite() for each in eager]
        assert all(torch.equal(each[name].isfinite(), fine) for each, fine in zip(actual, where, strict=True)), name
        parts = ([each[name][fine] for each, fine in zip(some, where, strict=True)] for some in (actual, oracle, eager))
        assert_close_as_eager(*parts, name)


@dtypes
@pytest.mark.parametrize(("where", "value"), [("weights", torch.nan), ("weights", torch.inf), ("x", torch.nan)])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_what_is_not_finite_stays_with_its_token_and_experts(
    kind: str, where: str, value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = moe(kind, **EXPERTS_ONLY).to(dtype)
    double, fused = in_float64(stock), copy.deepcopy(stock)
    fastpeft.patch(fused)
    calls = [spoilt(draw(), where, value) for _ in range(DRAWS)]
    with fused_calls(monkeypatch):
        actual = [run(fused, call) for call in calls]
    oracle, eager = ([run(model, call) for call in calls] for model in (double, stock))
    rows = torch.arange(len(calls[0][0])) == SPOILT
    assert all(torch.equal(each["y"].isfinite().all(1), ~rows) for each in actual)
    assert_finite_alike(actual, oracle, eager)


def routers(model: nn.Module) -> list[Any]:
    """What chooses the experts that are adapted, of each block."""
    blocks = [module for module in model.modules() if getattr(module, "experts", None) in wrappers(model)]
    return [block.router if hasattr(block, "router") else block.gate for block in blocks]


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_of_nan(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a step that diverged leaves it: NaN, as PEFT gives, and no exception."""
    stock, ids = moe(kind), tokens()
    assert routers(stock)
    for router in routers(stock):
        with torch.no_grad():
            router.weight.fill_(torch.nan)
    fused = copy.deepcopy(stock)
    assert fastpeft.patch(fused).left_to_peft == {}
    with fused_calls(monkeypatch) as seen:
        outputs = [fused(input_ids=ids, labels=ids)]
    assert len(seen) == len(wrappers(stock))
    outputs.append(stock(input_ids=ids, labels=ids))
    assert all(output.logits.isnan().all() for output in outputs)
    for output in outputs:
        output.loss.backward()
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.equal(ours.grad.isnan().any(), theirs.grad.isnan().any()), name


def with_stranger(call: Call, stranger: int) -> Call:
    """One choice is of an expert that there is not."""
    x, index, weights, dy = call
    index = index.clone()
    index[SPOILT, 1] = stranger
    return x, index, weights, dy


@pytest.mark.parametrize("stranger", [EXPERTS, EXPERTS + 3, -1])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_an_expert_that_there_is_not_is_pefts_to_judge(
    kind: str, implementation: str, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = moe(kind, **EXPERTS_ONLY)
    set_implementation(stock, implementation)
    fused = copy.deepcopy(stock)
    assert fastpeft.patch(fused).left_to_peft == {}
    monkeypatch.setattr(type(wrappers(fused)[0]), "_run", lambda *args: pytest.fail("fused"))
    call, found = with_stranger(draw(), stranger), []
    for model in (stock, fused):
        try:
            found.append(run(model, call)["lora_B.default.weight"].shape)  # its numbers are memory that nobody wrote
        except (RuntimeError, IndexError) as error:
            found.append(f"{type(error).__name__}: {error}")
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_indices_of_another_dtype_are_pefts(implementation: str, dtype: torch.dtype) -> None:
    stock = moe("GptOss", **EXPERTS_ONLY)
    set_implementation(stock, implementation)
    fused = copy.deepcopy(stock)
    fastpeft.patch(fused)
    x, index, weights, dy = draw()
    found: list[Any] = []
    for model in (stock, fused):
        try:
            found.append(run(model, (x, index.to(dtype), weights, dy)))
        except (RuntimeError, IndexError) as error:
            found.append(f"{type(error).__name__}: {error}")
    assert type(found[0]) is type(found[1])
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def weightless(call: Call) -> Call:
    """The same with the stranger's choice given to the first expert, and no weight to it."""
    x, index, weights, dy = call
    weights = weights.clone()
    weights[SPOILT, 1] = 0
    return with_stranger((x, index, weights, dy), 0)


@pytest.mark.parametrize("stranger", [EXPERTS, EXPERTS + 3, -1])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_in_a_graph_an_expert_that_there_is_not_gives_nothing(
    kind: str, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody reads an index; and as transformers' experts leave out those of other processes."""
    stock = moe(kind, **EXPERTS_ONLY)
    set_implementation(stock, "eager")
    double, fused = in_float64(stock), copy.deepcopy(stock)
    fastpeft.patch(fused)
    torch.compiler.reset()
    wrapper = wrappers(fused)[0]
    wrapper.forward = torch.compile(wrapper.forward, backend="aot_eager", fullgraph=True)
    calls = [draw() for _ in range(DRAWS)]
    with no_peft_forward(monkeypatch):
        actual = [run(fused, with_stranger(call, stranger)) for call in calls]
    oracle, eager = ([run(model, weightless(call)) for call in calls] for model in (double, stock))
    for name in eager[0]:
        if name == "weights":
            assert all(each[name][SPOILT, 1] == 0 for each in actual)
            for some in (oracle, eager):
                for each in some:
                    each[name][SPOILT, 1] = 0
        assert_close_as_eager(*([each[name] for each in some] for some in (actual, oracle, eager)), name)

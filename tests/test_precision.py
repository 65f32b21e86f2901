"""Precisions that people train in: scaled losses, overflow, adapters in any dtype, a model moved once it is patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from oracle import assert_close_as_eager
from peft_layers import (
    assert_parity,
    cast_adapters,
    layer_of,
    lora_model,
    no_peft_forward,
    run,
    signed,
    tiny_llama,
    tokens,
)
from torch import Tensor, nn
from torch.amp import GradScaler

import fastpeft

METHODS = {"lora": {}, "dora": {"use_dora": True}}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def scaled_steps(model: peft.PeftModel, batches: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The losses of a training in ``dtype`` with scaled losses, and the scale after each step."""
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for ids in batches:
        with torch.autocast("cpu", dtype):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses += [loss.detach().float(), torch.tensor(scaler.get_scale())]
    return losses


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_with_scaled_losses(dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = tiny_llama(init_lora_weights=False, **METHODS[method])
    exact, fused = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    fastpeft.patch(fused)
    batches = [tokens() for _ in range(6)]
    with no_peft_forward(monkeypatch):
        found = scaled_steps(fused, batches, dtype)
    expected, oracle = scaled_steps(stock, batches, dtype), steps_in_float64(exact, batches)
    assert found[1::2] == expected[1::2]
    assert_close_as_eager(torch.stack(found[::2]), torch.stack(oracle), torch.stack(expected[::2]), "losses")


def steps_in_float64(model: peft.PeftModel, batches: list[Tensor]) -> list[Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@methods
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_float16_cannot_hold_is_infinite_and_the_step_is_left_out(method: str, backend: str) -> None:
    """As in PEFT: the scaler sees it, lowers its scale and keeps the weights."""
    model = lora_model(nn.Linear(16, 12, dtype=torch.float16), torch.float16, **METHODS[method])
    fastpeft.patch(model, backend=backend)
    layer = layer_of(model)
    x = torch.full((4, 16), 250.0, dtype=torch.float16)
    with torch.no_grad():
        layer.base_layer.weight.fill_(30.0)
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.weight.fill_(1000.0)
        assert layer(x).isinf().all()  # 250 * 30 * 16 or, of length 1000, 250 * 1000 * 4
    small = torch.ones(4, 16, dtype=torch.float16)
    layer.base_layer.weight.data.fill_(0.5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for factor in (A, B):
        factor.data = factor.data.float()
    before = A.detach().clone()
    optimizer = torch.optim.SGD([A, B], lr=1.0)
    scaler = GradScaler("cpu", init_scale=2.0**24)
    scaler.scale(layer(small).float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**24 and torch.equal(A, before)


@pytest.mark.parametrize("adapters", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_in_any_dtype(base: torch.dtype, adapters: torch.dtype) -> None:
    """Results and gradients have the dtypes of PEFT's, and are as close as PEFT's with adapters in the base's dtype."""
    stock = lora_model(nn.Linear(24, 16, dtype=base), adapters)
    fused, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    eager = cast_adapters(copy.deepcopy(stock), base)
    fastpeft.patch(fused)
    x, dy = signed(40, 24).to(base), signed(40, 16).to(base)
    found, in_pefts = run(fused, x, dy), run(stock, x, dy)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in in_pefts.items()}
    oracle, expected = run(exact, x.double(), dy.double()), run(eager, x, dy)
    for name in found:
        assert_close_as_eager(found[name], oracle[name], expected[name], name)


MOVES: dict[str, tuple[Callable[[nn.Module], Any], torch.dtype]] = {
    "to bfloat16": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16 and float": (lambda model: model.bfloat16().float(), torch.float32),
    "to cpu": (lambda model: model.to("cpu"), torch.float32),
    "through the meta device's shapes": (lambda model: model.to_empty(device="cpu"), torch.float32),
}


@methods
@pytest.mark.parametrize("move", MOVES)
def test_a_model_moved_after_it_was_patched(move: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model(nn.Linear(24, 16), **METHODS[method])
    fastpeft.patch(model)
    x = signed(9, 24)
    model(x)  # DoRA's norm is kept from here on
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moved, dtype = MOVES[move][0](model), MOVES[move][1]
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()})
    assert moved is model
    fastpeft.unpatch(stock := copy.deepcopy(model))
    assert_parity(stock, lambda: signed(9, 24).to(dtype), monkeypatch)
    with no_peft_forward(monkeypatch), torch.no_grad():
        assert model(x.to(dtype)).dtype == dtype
        fresh = copy.deepcopy(stock)
        fastpeft.patch(fresh)
        assert torch.equal(model(x.to(dtype)), fresh(x.to(dtype)))


@methods
def test_only_the_adapters_change_their_dtype(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model(nn.Linear(24, 16, dtype=torch.bfloat16), torch.bfloat16, **METHODS[method])
    fastpeft.patch(model)
    model(signed(9, 24).bfloat16())
    cast_adapters(model, torch.float32)
    with no_peft_forward(monkeypatch):
        y = model(signed(9, 24).bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

"""VeRA's layers, fused: a method that only makes other A and B of what it learns is one reader and one row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import assert_close_as_eager
from peft_layers import TARGETS, layer_of, no_peft_forward, signed, tiny_llama_base, tokens, train
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastpeft

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
K, N = 72, 96
STEPS = 20


def vera_model(base: nn.Module, **config: Any) -> peft.PeftModel:
    """VeRA around ``base`` alone, whose vectors are random, so that the adapter weighs as much as the base."""
    settings = {"r": 12, "target_modules": ["0"], "d_initial": 0.1, "vera_dropout": 0.0}
    model = peft.get_peft_model(nn.Sequential(base), peft.VeraConfig(**(settings | config)))
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def results(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = layer_of(model)(x)
    grads = torch.autograd.grad(y, [x, *learned.values()], dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(["x", *learned], grads, strict=True))


def assert_as_close_as_peft(model: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, a model of one layer is as close to float64 as PEFT's is under autocast, in the dtypes of PEFT's."""
    layer = layer_of(model)
    shapes = [(33, size) for size in (layer.in_features, layer.out_features)]
    exact, fused = copy.deepcopy(model).double(), copy.deepcopy(model)
    assert fastpeft.patch(fused).left_to_peft == {}
    found: list[list[dict[str, Tensor]]] = [[], [], []]
    for _ in range(4):
        x, dy = signed(*shapes[0]).to(dtype), signed(*shapes[1])
        found[1].append(results(exact, x.double(), dy.double()))
        with torch.autocast("cpu", dtype, enabled=dtype != F32):
            found[2].append(results(model, x, dy))
        with no_peft_forward(monkeypatch):
            found[0].append(results(fused, x, dy))
    for name, like in results(model, x, dy).items():
        assert found[0][-1][name].dtype == like.dtype, name
        assert_close_as_eager(*([result[name] for result in some] for some in found), name)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layer", ["linear", "conv1d", "no_bias"])
def test_as_close_to_float64_as_peft(layer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = Conv1D(N, K) if layer == "conv1d" else nn.Linear(K, N, bias=layer != "no_bias")
    model = vera_model(base.to(dtype), fan_in_fan_out=layer == "conv1d")
    assert any("vera_lambda_d" in name for name, p in model.named_parameters() if p.requires_grad)
    assert_as_close_as_peft(model, dtype, monkeypatch)


def test_two_adapters_and_one_of_other_layers() -> None:
    torch.manual_seed(0)
    model = vera_model(nn.Linear(K, N))
    model.add_adapter("second", peft.VeraConfig(r=12, target_modules=["0"], inference_mode=True))
    layer_of(model).set_adapter(["default", "second", "elsewhere"])
    x = torch.randn(5, K)
    stock = model(x)
    assert len(fastpeft.patch(model).fused) == 1
    torch.testing.assert_close(model(x), stock)


def test_dropout_follows_the_mode() -> None:
    torch.manual_seed(0)
    model = vera_model(nn.Linear(K, N), vera_dropout=0.5)
    stock, x = model.eval()(torch.ones(4, K)), torch.ones(4, K)
    fastpeft.patch(model)
    torch.testing.assert_close(model(x), stock)
    assert not torch.allclose(model.train()(x), stock)


@pytest.mark.parametrize("state", ["merged", "disabled", "rank of other dtypes"])
def test_what_is_left_to_peft(state: str) -> None:
    torch.manual_seed(0)
    model = vera_model(nn.Linear(K, N))
    layer, x = layer_of(model), torch.randn(5, K)
    if state == "merged":
        layer.merge()
    elif state == "disabled":
        layer.enable_adapters(False)
    else:
        layer.vera_lambda_b["default"].data = layer.vera_lambda_b["default"].data.double()
    stock = model(x)
    assert len(fastpeft.patch(model).left_to_peft) == 1
    assert torch.equal(model(x), stock)


def test_merge_and_unmerge_are_pefts() -> None:
    torch.manual_seed(0)
    model, x = vera_model(nn.Linear(K, N)), torch.randn(5, K)
    fastpeft.patch(model)
    before = model(x)
    layer_of(model).merge()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    layer_of(model).unmerge()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_trained_then_saved_and_reloaded_in_plain_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = peft.VeraConfig(r=8, d_initial=0.5, **TARGETS)
    stock = peft.get_peft_model(tiny_llama_base(), config)
    base = copy.deepcopy(stock).unload()
    double, fused = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    assert len(fastpeft.patch(fused).fused) == 6
    batches = [tokens() for _ in range(4)] * (STEPS // 4)
    with no_peft_forward(monkeypatch):
        losses = train(fused, batches)
    assert_close_as_eager(losses, train(double, batches), train(stock, batches), "loss curve")
    assert losses[-4:].mean() < losses[:4].mean()

    fused.eval().save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids, double_reloaded = tokens(), copy.deepcopy(reloaded).double()
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (fused, double_reloaded, reloaded)]
    assert_close_as_eager(*logits, "logits")


def test_enable_fuses_vera_and_unpatch_gives_pefts_class_back() -> None:
    with fastpeft.enabled():
        model = vera_model(nn.Linear(K, N))
    assert type(layer_of(model)).__name__ == "FusedVeraLinear"
    assert "vera.Linear" in repr(model) and "fused by fastpeft" in repr(model)
    fastpeft.unpatch(model)
    assert type(layer_of(model)) is peft.tuners.vera.layer.Linear
    assert (
        type(
            layer_of(
                fastpeft.get_peft_model(nn.Sequential(nn.Linear(K, N)), peft.VeraConfig(r=4, target_modules=["0"]))
            )
        ).__name__
        == "FusedVeraLinear"
    )

"""Methods and variants of PEFT that make an A and a B of what they learn: each is one reader and one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft_layers import layer_of
from test_peft_vera import assert_as_close_as_peft
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastpeft

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
K, N = 64, 96
CONFIGS: dict[str, Callable[..., Any]] = {
    "delora": lambda p, **rest: peft.DeloraConfig(r=8, module_dropout=p, **rest),
    "tinylora": lambda p, **rest: peft.TinyLoraConfig(r=4, u=5, tinylora_dropout=p, **rest),
    "unilora": lambda p, **rest: peft.UniLoraConfig(r=4, theta_d_length=512, unilora_dropout=p, **rest),
    "vblora": lambda p, **rest: peft.VBLoRAConfig(
        r=4, num_vectors=16, vector_length=32, vblora_dropout=p, init_vector_bank_bound=0.5, **rest
    ),
    "mica": lambda p, **rest: peft.LoraConfig(r=8, init_lora_weights="mica", lora_dropout=p, **rest),
    "kasa": lambda p, **rest: peft.LoraConfig(r=8, kasa_config=peft.KasaConfig(), lora_dropout=p, lora_alpha=4, **rest),
}
LINEAR_ALONE = ("delora", "kasa")  # PEFT has them for no Conv1D


def model_of(method: str, base: nn.Module, p: float = 0.0) -> peft.PeftModel:
    """Around ``base`` alone; what it learns is random, so that the adapter weighs as much as the base."""
    torch.manual_seed(0)
    config = CONFIGS[method](p, target_modules=["0"])
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = isinstance(base, Conv1D)
    model = peft.get_peft_model(nn.Sequential(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lambda" not in name and "logits" not in name:
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


@pytest.mark.parametrize(("layer", "dtype"), [("linear", F32), ("linear", BF16), ("linear", F16), ("conv1d", F32)])
@pytest.mark.parametrize("method", CONFIGS)
def test_as_close_to_float64_as_peft(
    method: str, layer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layer == "conv1d" and method in LINEAR_ALONE:
        with pytest.raises((TypeError, ValueError)):
            model_of(method, Conv1D(N, K))
        return
    model = model_of(method, (Conv1D(N, K) if layer == "conv1d" else nn.Linear(K, N)).to(dtype))
    assert_as_close_as_peft(model, dtype, monkeypatch)


@pytest.mark.parametrize("method", CONFIGS)
def test_dropout_merging_and_another_adapter(method: str) -> None:
    model, x = model_of(method, nn.Linear(K, N), p=0.5), torch.randn(5, K)
    layer = layer_of(model)
    stock = model.eval()(x)
    assert len(fastpeft.patch(model).fused) == 1
    torch.testing.assert_close(model(x), stock)
    dropped = model.train()(x)
    assert not torch.allclose(dropped, stock)
    layer.set_adapter(["default", "elsewhere"])
    torch.testing.assert_close(model.eval()(x), stock)
    layer.merge()
    torch.testing.assert_close(model(x), stock, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    layer.enable_adapters(False)
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    fastpeft.unpatch(model)
    assert type(layer).__module__.startswith("peft.")


@pytest.mark.parametrize("method", CONFIGS)
def test_enable_and_get_peft_model_fuse_it(method: str) -> None:
    with fastpeft.enabled():
        made = model_of(method, nn.Linear(K, N))
    config = CONFIGS[method](0.0, target_modules=["0"])
    for model in (made, fastpeft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)):
        assert type(layer_of(model)).__module__ == "fastpeft.peft.layers"


def test_what_is_left_to_peft() -> None:
    model = model_of("vblora", nn.Linear(K, N))
    with torch.no_grad():
        layer_of(model).vblora_logits_A["default"].fill_(torch.inf)
    report = fastpeft.patch(model)
    assert "cannot be put together: Found infinity" in str(report)
    with pytest.raises(RuntimeError, match="infinity"):
        model(torch.randn(2, K))
    model = model_of("kasa", nn.Linear(K, N))
    layer_of(model)._lora_kasa_truncation_deferred.add("default")
    assert "has yet to cut its base weight" in str(fastpeft.patch(model))

"""AdaLoRA's layers, fused: PEFT's results, its rank allocation and its orthogonal regularisation."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from oracle import assert_close_as_eager
from peft.tuners.adalora.layer import SVDLinear as PeftSVDLinear
from peft_layers import (
    TARGETS,
    adalora_model,
    assert_parity,
    layer_of,
    no_peft_forward,
    share_masks,
    signed,
    tiny_llama_base,
    tokens,
    train,
    weigh_as_the_base,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.peft.layers import FusedSVDLinear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
K, N = 72, 96
STEPS = 20


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F16, F16), (F32, BF16)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("layer", ["linear", "conv1d", "rank1"])
def test_one_adapter(
    layer: str, dtype: torch.dtype, adapter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = (Conv1D(N, K) if layer == "conv1d" else nn.Linear(K, N)).to(dtype)
    config = {"init_r": 2, "target_r": 1} if layer == "rank1" else {"fan_in_fan_out": layer == "conv1d"}
    assert_parity(adalora_model(base, adapter_dtype, **config), lambda: signed(33, K).to(dtype), monkeypatch)


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast(dtype: torch.dtype, autocast: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adalora_model(nn.Linear(K, N, dtype=dtype))
    assert_parity(model, lambda: signed(33, K).to(dtype), monkeypatch, autocast=autocast)


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 9, K), (0, K)], ids=str)
def test_shapes_of_x(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_parity(adalora_model(nn.Linear(K, N, bias=False)), lambda: signed(*shape), monkeypatch)


def test_two_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adalora_model(nn.Linear(K, N))
    settings = {"init_r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["0"], "total_step": 10}
    model.add_adapter("second", peft.AdaLoraConfig(**settings, inference_mode=True))
    weigh_as_the_base(model, "second")
    layer_of(model).set_adapter(["default", "second"])
    assert_parity(model, lambda: signed(33, K), monkeypatch)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)])
def test_dropout_with_the_same_masks(
    dtype: torch.dtype, adapter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adalora_model(nn.Linear(K, N, dtype=dtype), adapter_dtype, lora_dropout=0.25)
    assert_parity(share_masks(model, monkeypatch).train(), lambda: signed(3, 11, K).to(dtype), monkeypatch)


def adalora_llama() -> peft.PeftModel:
    """AdaLoRA on :func:`tiny_llama_base`; 6 ranks a layer go down to 3 on average within the 20 steps."""
    schedule = {"tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": STEPS}
    config = peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=12, orth_reg_weight=0.5, **schedule, **TARGETS)
    return peft.get_peft_model(tiny_llama_base(), config)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_trained_with_its_ranks_allocated_then_saved_and_reloaded_in_plain_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = adalora_llama()
    base = copy.deepcopy(stock).unload()
    double, fused = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    assert len(fastpeft.patch(fused).fused) == 6
    batches = [tokens() for _ in range(4)] * (STEPS // 4)
    with no_peft_forward(monkeypatch):
        losses = train(fused, batches)
    assert_close_as_eager(losses, train(double, batches), train(stock, batches), "loss curve")
    kept = fused.peft_config["default"].rank_pattern
    assert kept == stock.peft_config["default"].rank_pattern
    assert sum(sum(ranks) for ranks in kept.values()) == 3 * 6

    fused.eval()
    fused.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert any(type(module) is PeftSVDLinear for module in reloaded.modules())
    ids, double_reloaded = tokens(), copy.deepcopy(reloaded).double()
    report = fastpeft.patch(again := copy.deepcopy(reloaded))
    assert all("has rank 0" in reason for reason in report.left_to_peft.values())
    for model in (fused, again):
        assert_close_as_eager(logits(model, ids), logits(double_reloaded, ids), logits(reloaded, ids), "logits")


def test_enable_fuses_adalora_and_unpatch_gives_pefts_class_back() -> None:
    with fastpeft.enabled():
        model = adalora_llama()
    assert sum(type(module) is FusedSVDLinear for module in model.modules()) == 6
    assert "SVDLinear" in repr(model) and "fused by fastpeft" in repr(model)
    assert str(fastpeft.explain(model)).startswith("6 × cpu runs it")
    fastpeft.unpatch(model)
    assert sum(type(module) is PeftSVDLinear for module in model.modules()) == 6
    assert type(layer_of(adalora_model(nn.Linear(K, N)))) is PeftSVDLinear


def test_adapter_names_raise_as_in_peft() -> None:
    model = adalora_model(nn.Linear(K, N))
    x = torch.randn(2, K)
    with pytest.raises(TypeError) as stock:
        layer_of(model)(x, adapter_names=["default", "default"])
    fastpeft.patch(model)
    with pytest.raises(TypeError, match=r"adapter_names") as fused:
        layer_of(model)(x, adapter_names=["default", "default"])
    assert str(fused.value) == str(stock.value)


@pytest.mark.parametrize("state", ["rank 0", "E of another dtype", "merged"])
def test_what_is_left_to_peft(state: str) -> None:
    model = adalora_model(nn.Linear(K, N))
    layer = layer_of(model)
    match state:
        case "rank 0":
            layer.update_layer("default", 0, 9, config=model.peft_config["default"])
            reason = "has rank 0"
        case "E of another dtype":
            layer.lora_E["default"].data = layer.lora_E["default"].data.double()
            reason = "has weights of torch.float32 and torch.float32 and torch.float64"
        case _:
            layer.merge()
            reason = "its adapters are merged into the base weight"
    report = fastpeft.patch(model)
    assert report.fused == [] and reason in str(report)


def test_convolutions_are_left_to_peft() -> None:
    config = peft.AdaLoraConfig(target_modules=["0"], total_step=10)
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(3, 5, 3)), config)
    assert "SVDConv2d is no class that fastpeft fuses" in str(fastpeft.patch(model))

"""PEFT models over bitsandbytes' 4-bit layers: fused in place, whichever class PEFT wrapped them in."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from oracle import assert_close_as_eager
from peft_layers import layer_of, move_magnitudes, run, signed
from torch import nn

import fastpeft
from fastpeft import nf4
from fastpeft.peft import FusedForward

K, N = 72, 96
BF16, F32 = torch.bfloat16, torch.float32


def quantized(dtype: torch.dtype, compute_dtype: torch.dtype | None = None, **settings: Any) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(K, N, compute_dtype=compute_dtype, **({"quant_type": "nf4"} | settings))
    linear.load_state_dict(nn.Linear(K, N).to(dtype).state_dict())
    return linear.to("cpu")


def four_bit_model(base: bnb.nn.Linear4bit, loaded_in_4bit: bool = True, **config: Any) -> peft.PeftModel:
    """PEFT around ``base`` alone; without ``loaded_in_4bit`` it takes its class for dense layers."""
    sequential = nn.Sequential(base)
    sequential.is_loaded_in_4bit = loaded_in_4bit
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["0"]} | config
    model = peft.get_peft_model(sequential, peft.LoraConfig(**settings)).train()
    move_magnitudes(model, "default")
    return model


def dense_twin(model: peft.PeftModel, dtype: torch.dtype) -> peft.PeftModel:
    """The same adapters over the weight that the 4 bits stand for in ``dtype``, everything in float64."""
    layer = layer_of(model)
    base, config = layer.base_layer, model.peft_config["default"]
    dense = nn.Linear(K, N)
    dense.weight.data = nf4.from_bitsandbytes(base.weight, base.weight.quant_state).dequantize(dtype).float()
    dense.bias.data = base.bias.detach().float()
    twin = peft.get_peft_model(nn.Sequential(dense), copy.deepcopy(config)).train()
    twin.load_state_dict({name: t for name, t in model.state_dict().items() if "lora_" in name}, strict=False)
    return twin.double()


def assert_parity(model: peft.PeftModel, dtype: torch.dtype, x_dtype: torch.dtype, autocast: bool) -> None:
    stock, fused, double = copy.deepcopy(model), copy.deepcopy(model), dense_twin(model, dtype)
    report = fastpeft.patch(fused)
    assert report.left_to_peft == {} and isinstance(layer_of(fused), FusedForward)
    names = {"y", "x"} | {name for name, p in model.named_parameters() if p.requires_grad}
    oracle, eager, actual = [], [], []
    for _ in range(4):
        x, dy = signed(33, K).to(x_dtype), signed(33, N)
        oracle.append(run(double, x.double(), dy.double()))
        with torch.autocast("cpu", dtype, enabled=autocast or dtype == BF16):
            eager.append(run(stock, x, dy))
        with torch.autocast("cpu", dtype, enabled=autocast):
            actual.append(run(fused, x, dy))
    for name in names:
        assert actual[0][name].dtype == eager[0][name].dtype, name
        assert_close_as_eager(*([r[name] for r in results] for results in (actual, oracle, eager)), name)


@pytest.mark.parametrize("loaded_in_4bit", [True, False])
@pytest.mark.parametrize("use_dora", [False, True], ids=["qlora", "qdora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"quant_type": "fp4", "compress_statistics": False}, {"quant_storage": BF16}],
    ids=["nf4", "fp4", "bfloat16_storage"],
)
@pytest.mark.parametrize(("dtype", "x_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_parity(
    dtype: torch.dtype, x_dtype: torch.dtype, settings: dict[str, Any], use_dora: bool, loaded_in_4bit: bool
) -> None:
    model = four_bit_model(quantized(dtype, dtype, **settings), loaded_in_4bit, use_dora=use_dora)
    kind = "peft.tuners.lora.bnb" if loaded_in_4bit else "peft.tuners.lora.layer"
    assert type(layer_of(model)).__module__ == kind
    assert_parity(model, dtype, x_dtype, autocast=False)


def test_under_autocast() -> None:
    assert_parity(four_bit_model(quantized(F32, BF16)), BF16, F32, autocast=True)


def test_the_compute_dtype_is_settled_as_bitsandbytes_does() -> None:
    model = four_bit_model(quantized(F32))
    fastpeft.patch(model)
    base = layer_of(model).base_layer
    assert not base.compute_type_is_set
    layer_of(model)(torch.randn(3, K, dtype=BF16))
    assert base.compute_type_is_set and base.compute_dtype == BF16


def test_evaluation_repacks_nothing_and_training_goes_on() -> None:
    model = four_bit_model(quantized(BF16, BF16))
    before = layer_of(model).base_layer.weight.data.clone()
    fastpeft.patch(model)
    x = torch.randn(3, K, dtype=BF16)
    with torch.no_grad():
        evaluated = layer_of(model.eval())(x)
    assert torch.equal(layer_of(model).base_layer.weight.data, before)
    assert torch.equal(layer_of(model.train())(x), evaluated)


def test_a_repacked_weight_is_left_to_peft() -> None:
    model = four_bit_model(quantized(BF16, BF16))
    state = layer_of(model).base_layer.weight.quant_state
    state.packing_format_for_cpu = True
    report = fastpeft.patch(model)
    assert report.fused == [] and "repacked in place" in str(report)


@pytest.mark.parametrize("change", ["no quant_state", "wrong size"])
def test_a_weight_that_cannot_be_read_is_left_to_peft(change: str) -> None:
    model = four_bit_model(quantized(BF16, BF16))
    base = layer_of(model).base_layer
    if change == "no quant_state":
        base.weight.quant_state, base.quant_state = None, None
    else:
        base.weight.quant_state.shape = torch.Size((N, K + 2))
    report = fastpeft.patch(model)
    assert report.fused == []
    assert ("not quantized yet" if change == "no quant_state" else "packed must hold") in str(report)


def test_a_quant_state_that_sharding_dropped_is_found_on_the_module() -> None:
    model = four_bit_model(quantized(BF16, BF16))
    base = layer_of(model).base_layer
    base.quant_state, base.weight.quant_state = base.weight.quant_state, None
    assert fastpeft.patch(model).left_to_peft == {}


def test_enable_fuses_four_bit_layers_and_unpatch_gives_pefts_class_back() -> None:
    with fastpeft.enabled():
        model = four_bit_model(quantized(BF16, BF16))
    assert isinstance(layer_of(model), FusedForward)
    assert "Linear4bit" in repr(model) and "fused by fastpeft" in repr(model)
    assert str(fastpeft.explain(model)).startswith("1 × native runs it")
    fastpeft.unpatch(model)
    assert type(layer_of(model)).__module__ == "peft.tuners.lora.bnb"


def test_eight_bit_layers_are_left_to_peft() -> None:
    sequential = nn.Sequential(bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False))
    sequential.is_loaded_in_8bit = True
    model = peft.get_peft_model(sequential, peft.LoraConfig(r=4, target_modules=["0"]))
    report = fastpeft.patch(model)
    assert report.fused == [] and "Linear8bitLt" in str(report)

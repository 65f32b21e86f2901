"""PEFT models over bitsandbytes' 4-bit layers: fused in place, whichever class PEFT wrapped them in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from oracle import assert_close_as_eager
from peft_layers import (
    TARGETS,
    draws_needed,
    layer_of,
    move_magnitudes,
    run,
    signed,
    tiny_llama_base,
    tokens,
    train,
    weigh_as_the_base,
)
from torch import nn

import fastpeft
from fastpeft import four_bit
from fastpeft.experiments.four_bit import to_four_bit
from fastpeft.peft.layers import FusedForward

K, N = 72, 96
BF16, F32 = torch.bfloat16, torch.float32
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {},
    "qdora": {"use_dora": True},
    "qadalora": {"init_r": 4, "target_r": 2, "total_step": 10},
}


def quantized(dtype: torch.dtype, compute_dtype: torch.dtype | None = None, **settings: Any) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(K, N, compute_dtype=compute_dtype, **({"quant_type": "nf4"} | settings))
    linear.load_state_dict(nn.Linear(K, N).to(dtype).state_dict())
    return linear.to("cpu")


def four_bit_model(base: bnb.nn.Linear4bit, loaded_in_4bit: bool = True, **config: Any) -> peft.PeftModel:
    """PEFT around ``base`` alone; without ``loaded_in_4bit`` it takes its class for dense layers."""
    sequential = nn.Sequential(base)
    sequential.is_loaded_in_4bit = loaded_in_4bit
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["0"]} | config
    if "total_step" in config:
        model = peft.get_peft_model(sequential, peft.AdaLoraConfig(**settings)).train()
        weigh_as_the_base(model, "default")
    else:
        model = peft.get_peft_model(sequential, peft.LoraConfig(**settings)).train()
        move_magnitudes(model, "default")
    return model


def dense_twin(model: peft.PeftModel, dtype: torch.dtype) -> peft.PeftModel:
    """The same adapters over the weight that the 4 bits stand for in ``dtype``, everything in float64."""
    layer = layer_of(model)
    base, config = layer.base_layer, model.peft_config["default"]
    dense = nn.Linear(K, N)
    dense.weight.data = four_bit.from_bitsandbytes(base.weight, base.weight.quant_state).dequantize(dtype).float()
    dense.bias.data = base.bias.detach().float()
    twin = peft.get_peft_model(nn.Sequential(dense), copy.deepcopy(config)).train()
    adapter = {name: p for name, p in model.named_parameters() if ".base_layer." not in name}
    twin.load_state_dict(adapter, strict=False)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in adapter and adapter[name].requires_grad)
    return twin.double()


def assert_parity(model: peft.PeftModel, dtype: torch.dtype, x_dtype: torch.dtype, autocast: bool) -> None:
    stock, fused, double = copy.deepcopy(model), copy.deepcopy(model), dense_twin(model, dtype)
    report = fastpeft.patch(fused)
    assert report.left_to_peft == {} and isinstance(layer_of(fused), FusedForward)
    names = {"y", "x"} | {name for name, p in model.named_parameters() if p.requires_grad}
    oracle, eager, actual = [], [], []
    for _ in range(max(4, draws_needed(model, 33))):
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
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"quant_type": "fp4", "compress_statistics": False}, {"quant_storage": BF16}],
    ids=["nf4", "fp4", "bfloat16_storage"],
)
@pytest.mark.parametrize(("dtype", "x_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_parity(
    dtype: torch.dtype, x_dtype: torch.dtype, settings: dict[str, Any], method: str, loaded_in_4bit: bool
) -> None:
    model = four_bit_model(quantized(dtype, dtype, **settings), loaded_in_4bit, **METHODS[method])
    assert type(layer_of(model)).__module__.endswith(".bnb" if loaded_in_4bit else ".layer")
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


@pytest.mark.parametrize("change", ["data", "code", "absmax of statistics", "blocksize", "repacked"])
def test_what_was_read_of_a_weight_is_dropped_when_it_changes(change: str) -> None:
    model = four_bit_model(quantized(BF16, BF16))
    fastpeft.patch(model)
    layer, x = layer_of(model), torch.randn(3, K, dtype=BF16)
    base, before = layer.base_layer, layer(x)
    assert torch.equal(layer(x), before)
    state = base.weight.quant_state
    match change:
        case "data":
            base.weight.data = ~base.weight.data
        case "code":
            state.code = -state.code
        case "absmax of statistics":
            state.state2.absmax = 2 * state.state2.absmax
        case "blocksize":
            state.blocksize, state.absmax = 128, state.absmax[::2].contiguous()
        case _:
            state.packing_format_for_cpu = True
            assert "repacked in place" in str(fastpeft.explain(model))
            return
    after = layer(x)
    assert not torch.equal(after, before)
    again = copy.deepcopy(model)
    fastpeft.unpatch(again)
    assert "_fastpeft_four_bit" not in vars(layer_of(again))
    fastpeft.patch(again)
    assert torch.equal(layer_of(again)(x), after)


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
    assert str(fastpeft.explain(model)).startswith("1 × cpu runs it")
    fastpeft.unpatch(model)
    assert type(layer_of(model)).__module__ == "peft.tuners.lora.bnb"


def four_bit_llama(method: str, decoded: bool = False) -> peft.PeftModel:
    """A tiny Llama in NF4 with adapters on q, v and down; ``decoded``: the same weights, dense, in float64.

    64 and 128 wide: of other widths bitsandbytes itself decodes wrongly on some processors.
    """
    torch.manual_seed(0)
    base = to_four_bit(tiny_llama_base(64, 128), lambda name: name.endswith("_proj"), decoded=decoded)
    config = {"r": 4, "lora_alpha": 8} | TARGETS | METHODS[method]
    if method == "qadalora":
        schedule = {"init_r": 6, "target_r": 3, "tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": 20}
        model = peft.get_peft_model(base, peft.AdaLoraConfig(**(config | schedule)))
    else:
        model = peft.get_peft_model(base, peft.LoraConfig(**config))
    return model.double() if decoded else model


@pytest.mark.parametrize("method", METHODS)
def test_twenty_training_steps_then_saved_and_reloaded_in_plain_peft(method: str, tmp_path: Path) -> None:
    stock, fused, double = four_bit_llama(method), four_bit_llama(method), four_bit_llama(method, decoded=True)
    double.load_state_dict({n: p for n, p in stock.named_parameters() if "lora_" in n}, strict=False)
    assert len(fastpeft.patch(fused).fused) == 6
    torch.manual_seed(1)
    batches = [tokens() for _ in range(4)] * 5
    losses = train(fused, batches)
    assert_close_as_eager(losses, train(double, batches), train(stock, batches), "loss curve")
    assert losses[-4:].mean() < losses[:4].mean()

    fused.save_pretrained(tmp_path)
    reloaded = {decoded: four_bit_llama(method, decoded).unload() for decoded in (False, True)}
    ids, logits = tokens(), {}
    for decoded, base in reloaded.items():
        model = peft.PeftModel.from_pretrained(base, tmp_path)
        with torch.no_grad():
            logits[decoded] = (model.double() if decoded else model).eval()(input_ids=ids).logits
    with torch.no_grad():
        actual = fused.eval()(input_ids=ids).logits
    assert_close_as_eager(actual, logits[True], logits[False], "logits")

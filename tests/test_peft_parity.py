"""A fused PEFT layer computes what PEFT computes: forward, every gradient, result dtype."""

from __future__ import annotations

import random
from typing import Any

import peft
import pytest
import torch
from peft_layers import add_adapter, assert_parity, layer_of, lora_model, no_peft_forward, share_masks, signed
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastpeft

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F16, F16), (F32, BF16)]
K, N = 72, 96
DORA = {"use_dora": True}

per_dtype = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)

lora_and_dora = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(random.Random(request.node.name).getrandbits(32))


def linear(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def several(dtype: torch.dtype, adapter_dtype: torch.dtype, **config: Any) -> peft.PeftModel:
    """Adapters ``default`` (r 4), ``second`` (r 7), ``third`` (r 1), all active, all trained; ``third`` is heavy."""
    model = lora_model(linear(dtype), adapter_dtype, **config)
    for name, rank in (("second", 7), ("third", 1)):
        add_adapter(model, name, adapter_dtype, r=rank, **config)
    model.base_model.set_adapter(["default", "second", "third"])
    return model


@per_dtype
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 1},
        {"r": 65, "use_rslora": True},
        {"lora_bias": True},
        {"lora_dropout": 0.0},
        DORA,
        DORA | {"r": 1},
        DORA | {"r": 65, "use_rslora": True},
    ],
    ids=["plain", "rank1", "rslora", "lora_bias", "identity_dropout", "dora", "dora_rank1", "dora_rslora"],
)
def test_one_adapter(
    dtype: torch.dtype, adapter_dtype: torch.dtype, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora_model(linear(dtype), adapter_dtype, **config)
    assert_parity(model, lambda: signed(33, K).to(dtype), monkeypatch)


@per_dtype
@lora_and_dora
def test_conv1d(
    use_dora: bool, dtype: torch.dtype, adapter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora_model(Conv1D(N, K).to(dtype), adapter_dtype, fan_in_fan_out=True, use_dora=use_dora)
    assert_parity(model, lambda: signed(3, 11, K).to(dtype), monkeypatch)


@per_dtype
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, DORA], ids=["plain", "lora_bias", "dora"])
def test_several_adapters(
    dtype: torch.dtype, adapter_dtype: torch.dtype, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_parity(several(dtype, adapter_dtype, **config), lambda: signed(33, K).to(dtype), monkeypatch)


def mixed_batch(
    tail: tuple[int, ...], dtype: torch.dtype, adapter_dtype: torch.dtype, monkeypatch: Any, **config: Any
) -> None:
    names = ["third", "__base__", "default", "second", "default", "__base__", "unheard-of", "third"] * 4
    model = several(dtype, adapter_dtype, **config)
    assert_parity(model, lambda: signed(len(names), *tail, K).to(dtype), monkeypatch, adapter_names=names)


@per_dtype
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}], ids=["plain", "lora_bias"])
def test_mixed_batch(
    dtype: torch.dtype, adapter_dtype: torch.dtype, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed_batch((3,), dtype, adapter_dtype, monkeypatch, **config)


@pytest.mark.parametrize("tail", [(), (2, 3)], ids=["2d", "4d"])
def test_mixed_batch_of_other_dimensions(tail: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    mixed_batch(tail, F32, F32, monkeypatch)


def test_mixed_batch_for_the_base_alone_is_the_base_layer() -> None:
    model = several(F32, F32)
    fastpeft.patch(model)
    x = torch.randn(4, K)
    layer = layer_of(model)
    assert torch.equal(layer(x, adapter_names=["__base__"] * 4), layer.base_layer(x))


LAYOUTS = {
    "vector": lambda: signed(K),
    "one_token": lambda: signed(1, K),
    "3d": lambda: signed(2, 9, K),
    "transposed": lambda: signed(K, 33).t(),
    "permuted": lambda: signed(9, 4, K).transpose(0, 1),
    "every_second_column": lambda: signed(33, 2 * K)[:, ::2],
    "expanded": lambda: signed(1, K).expand(33, K),
    "no_token": lambda: signed(0, K),
    "no_batch": lambda: signed(4, 0, K),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts_of_x(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_parity(lora_model(linear(dtype)), lambda: LAYOUTS[layout]().to(dtype), monkeypatch)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"vector"}))  # of a vector, PEFT's DoRA makes [1, N]
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts_of_x_with_dora(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_parity(lora_model(linear(dtype), **DORA), lambda: LAYOUTS[layout]().to(dtype), monkeypatch)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    dtype, adapter_dtype = draw.choice(DTYPES)
    in_features, out_features = draw.randint(64, 200), draw.randint(64, 200)
    base = nn.Linear(in_features, out_features, bias=draw.random() < 0.5, dtype=dtype)
    config = {"r": draw.randint(1, 40), "use_rslora": draw.random() < 0.5}
    config |= draw.choice([{}, {"lora_bias": True}, DORA, DORA])
    model = lora_model(base, adapter_dtype, **config)
    M = draw.randint(1, 70)
    assert_parity(model, lambda: signed(M, in_features).to(dtype), monkeypatch)


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("config", [{"lora_bias": True}, DORA], ids=["lora_bias", "dora"])
def test_autocast(
    config: dict[str, Any], dtype: torch.dtype, autocast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_parity(several(dtype, F32, **config), lambda: signed(33, K).to(dtype), monkeypatch, autocast=autocast)


@lora_and_dora
def test_autocast_takes_an_input_of_another_dtype(use_dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_parity(lora_model(linear(BF16), use_dora=use_dora), lambda: signed(33, K), monkeypatch, autocast=BF16)


@lora_and_dora
@pytest.mark.parametrize(("dtype", "bias_dtype"), [(BF16, F32), (F32, BF16)])
def test_autocast_takes_a_trained_bias_of_another_dtype(
    dtype: torch.dtype, bias_dtype: torch.dtype, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = linear(dtype)
    base.bias.data = base.bias.data.to(bias_dtype)
    model = lora_model(base, use_dora=use_dora, bias="all")
    assert layer_of(model).base_layer.bias.requires_grad
    assert_parity(model, lambda: signed(33, K), monkeypatch, autocast=BF16)


@pytest.mark.parametrize("scaling", [torch.tensor(0.75), torch.tensor([0.75]), 2], ids=["0d", "1d", "int"])
@pytest.mark.parametrize("config", [{"lora_bias": True}, DORA], ids=["lora_bias", "dora"])
def test_scaling_may_be_a_tensor_and_may_change(
    config: dict[str, Any], scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora_model(linear(F32), **config)
    layer_of(model).scaling["default"] = scaling
    assert_parity(model, lambda: signed(33, K), monkeypatch)
    layer_of(model).scale_layer(3.0)
    assert_parity(model, lambda: signed(33, K), monkeypatch)


@lora_and_dora
def test_every_parameter_decides_on_its_own_gradient(use_dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("lora_A", "lora_B", "base_layer.weight", "base_layer.bias", *["lora_magnitude_vector"] * use_dora):
        model = lora_model(linear(F32), use_dora=use_dora)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted in name)
        assert_parity(model, lambda: signed(33, K), monkeypatch)


def test_adapters_of_other_layers_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model(linear(F32))
    layer_of(model).set_adapter(["elsewhere", "default"])
    assert_parity(model, lambda: signed(33, K), monkeypatch)


@lora_and_dora
def test_adapter_weights_of_any_strides(use_dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model(linear(F32), use_dora=use_dora)
    for module in (layer_of(model).lora_A["default"], layer_of(model).lora_B["default"]):
        module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    assert_parity(model, lambda: signed(33, K), monkeypatch)


@lora_and_dora
@pytest.mark.parametrize(
    "make", [lambda dtype, *args, **config: lora_model(linear(dtype), *args, **config), several], ids=["one", "several"]
)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)])
def test_dropout_with_the_same_masks(
    make: Any, dtype: torch.dtype, adapter_dtype: torch.dtype, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = share_masks(make(dtype, adapter_dtype, lora_dropout=0.25, use_dora=use_dora), monkeypatch).train()
    assert_parity(model, lambda: signed(3, 11, K).to(dtype), monkeypatch)


@lora_and_dora
@pytest.mark.parametrize("layer_trains", [False, True])
@pytest.mark.parametrize("dropout_trains", [False, True])
def test_dropout_asks_whom_peft_asks(
    dropout_trains: bool, layer_trains: bool, use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = share_masks(lora_model(linear(F32), lora_dropout=0.5, use_dora=use_dora), monkeypatch)
    layer_of(model).train(layer_trains)
    layer_of(model).lora_dropout.train(dropout_trains)
    assert_parity(model, lambda: signed(33, K), monkeypatch)


def dropout_alone(p: float) -> peft.PeftModel:
    """The layer computes ``dropout(x)`` and nothing else: no base, ``A`` and ``B`` the identity, scaling 1."""
    model = lora_model(nn.Linear(64, 64, bias=False), r=64, lora_alpha=64, lora_dropout=p)
    with torch.no_grad():
        layer_of(model).base_layer.weight.zero_()
        for module in (layer_of(model).lora_A["default"], layer_of(model).lora_B["default"]):
            module.weight.copy_(torch.eye(64))
    fastpeft.patch(model)
    return model.train()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_keeps_and_scales_as_often_as_it_says(p: float) -> None:
    x = torch.ones(1000, 64, requires_grad=True)
    y = layer_of(dropout_alone(p))(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    kept = y != 0
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * deviation
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=2**-16 / (1 - p), atol=0)
    assert torch.equal(dx, y)


def test_dropout_follows_torchs_seed() -> None:
    layer, x = layer_of(dropout_alone(0.5)), torch.ones(8, 64)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(layer(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(layer(x), layer(x))


def test_dropout_is_a_matter_of_the_dropout_module() -> None:
    model, x = dropout_alone(0.5), torch.ones(8, 64)
    layer = layer_of(model)
    assert torch.equal(model.eval()(x), x)
    layer.lora_dropout["default"].train()
    assert not torch.equal(layer(x), x)
    layer.train()
    layer.lora_dropout["default"].p = 0.0
    assert torch.equal(layer(x), x)


def test_each_adapter_draws_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dropout_alone(0.5)
    add_adapter(model, "second", r=64, lora_alpha=64, lora_dropout=0.5)
    layer = layer_of(model)
    layer.set_adapter(["default", "second"])
    with torch.no_grad():
        for module in (layer.lora_A["second"], layer.lora_B["second"]):
            module.weight.copy_(torch.eye(64))
    with no_peft_forward(monkeypatch):
        y = layer(torch.ones(1000, 64))
    assert y.unique().tolist() == [0.0, 2.0, 4.0]

"""``fastpeft.nn.LoRALinear`` without PEFT: it computes the equation, shares the base's weight, refuses bad numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import assert_close_as_eager
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.nn import LoRALinear


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def equation(layer: LoRALinear, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """``x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ`` in plain torch in ``dtype``, and its gradients."""
    leaves = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in leaves.items()}
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    bias = None if layer.bias is None else layer.bias.to(dtype)
    linear = nn.functional.linear
    u = linear(leaves["x"], leaves["lora_A"])
    y = linear(leaves["x"], weight.to(dtype), bias) + linear(u, leaves["lora_B"]) * (layer.alpha / layer.r)
    return {"y": y} | gradients(y, leaves)


def gradients(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


@pytest.mark.parametrize("base", [nn.Linear(72, 96), nn.Linear(72, 96, bias=False), Conv1D(96, 72)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["float32_adapter", "same_adapter"])
def test_computes_the_equation(base: nn.Module, dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    base = copy.deepcopy(base).to(dtype)
    layer = LoRALinear.from_linear(base, r=5, alpha=7.5, adapter_dtype=adapter_dtype or dtype)
    nn.init.uniform_(layer.lora_B, -0.5, 0.5)
    x = torch.randn(3, 11, 72, dtype=dtype, requires_grad=True)
    y = layer(x)
    actual = {"y": y} | gradients(y, {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    oracle, eager = equation(layer, x, torch.float64), equation(layer, x, dtype)
    for name, result in actual.items():
        assert result.dtype == (dtype if name in ("x", "y") else adapter_dtype or dtype)
        assert_close_as_eager(result, oracle[name], eager[name], name)


def test_fresh_layer_computes_what_its_base_did() -> None:
    linear, x = nn.Linear(72, 96), torch.randn(33, 72)
    layer = LoRALinear.from_linear(linear, r=4)
    assert_close_as_eager(layer(x), copy.deepcopy(linear).double()(x.double()), linear(x))
    assert layer.scaling == 1.0 and layer.lora_A.abs().sum() > 0


def test_base_is_shared_and_frozen() -> None:
    linear = nn.Linear(8, 12)
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight.data_ptr() == linear.weight.data_ptr() and layer.bias.data_ptr() == linear.bias.data_ptr()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert linear.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]


def test_dropout_in_training_alone() -> None:
    layer = LoRALinear.from_linear(nn.Linear(64, 64, bias=False), r=64, alpha=64, dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(64))
        layer.lora_B.copy_(torch.eye(64))
    x = torch.ones(100, 64)
    first, again = (layer(x) for _ in range(2) if torch.manual_seed(1))
    assert first.unique().tolist() == [0.0, 2.0] and torch.equal(first, again)
    assert not torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), x)


def test_copies_and_repr() -> None:
    layer = LoRALinear.from_linear(nn.Linear(8, 12), r=4, alpha=8, dropout=0.1)
    nn.init.normal_(layer.lora_B)
    layer.eval()
    x = torch.randn(5, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert repr(layer) == "LoRALinear(in_features=8, out_features=12, bias=True, r=4, alpha=8, dropout=0.1)"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be a rank of at least 1, got 0"),
        ({"r": 2, "alpha": float("nan")}, ValueError, "alpha must be finite, got nan"),
        ({"r": 2, "dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"r": 2, "dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"r": 2, "adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be a floating dtype, got torch.int8"),
        ({"r": 2, "backend": "abacus"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LoRALinear.from_linear(nn.Linear(8, 12), **settings)(torch.ones(1, 8))


def test_base_of_another_class() -> None:
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear or a Conv1D, got Embedding"):
        LoRALinear.from_linear(nn.Embedding(4, 4), r=2)


def test_wrong_input_names_the_argument() -> None:
    layer = LoRALinear.from_linear(nn.Linear(8, 12), r=4)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., K=8\], got \[5, 9\]"):
        layer(torch.ones(5, 9))
    with pytest.raises(TypeError, match=r"x must have the dtype of weight, torch\.float32, got torch\.bfloat16"):
        layer(torch.ones(5, 8, dtype=torch.bfloat16))

"""``fastpeft.nn``'s layers without PEFT: they compute the equation, share the base's weight, refuse bad numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import assert_close_as_eager
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.nn import DoRALinear, LoRALinear

each_layer = pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def equation(layer: LoRALinear, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """``x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ``, or DoRA's as in PEFT, in plain torch in ``dtype``, and its gradients."""
    leaves = {"x": x, **dict(layer.named_parameters())}
    del leaves["weight"]
    leaves.pop("bias", None)
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in leaves.items()}
    weight = (layer.weight.t() if layer.fan_in_fan_out else layer.weight).to(dtype)
    bias = 0 if layer.bias is None else layer.bias.to(dtype)
    scaling, A, B = layer.alpha / layer.r, leaves["lora_A"], leaves["lora_B"]
    linear = nn.functional.linear
    y, delta = linear(leaves["x"], weight) + bias, linear(linear(leaves["x"], A), B) * scaling
    if isinstance(layer, DoRALinear):
        c = leaves["lora_magnitude_vector"] / torch.linalg.vector_norm(weight + scaling * (B @ A), dim=1).detach()
        delta = (c - 1) * (y - bias) + c * delta
    y = y + delta
    return {"y": y} | gradients(y, leaves)


def trained(layer: LoRALinear) -> Any:
    """``layer`` with a ``lora_B`` and a magnitude as training might leave them."""
    nn.init.uniform_(layer.lora_B, -0.5, 0.5)
    if isinstance(layer, DoRALinear):
        with torch.no_grad():
            layer.lora_magnitude_vector *= 0.75 + torch.rand_like(layer.lora_magnitude_vector) / 2
    return layer


def gradients(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


@pytest.mark.parametrize("base", [nn.Linear(72, 96), nn.Linear(72, 96, bias=False), Conv1D(96, 72)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["float32_adapter", "same_adapter"])
@each_layer
def test_computes_the_equation(
    kind: type[LoRALinear], base: nn.Module, dtype: torch.dtype, adapter_dtype: torch.dtype | None
) -> None:
    base = copy.deepcopy(base).to(dtype)
    layer = trained(kind.from_linear(base, r=5, alpha=7.5, adapter_dtype=adapter_dtype or dtype))
    x = torch.randn(3, 11, 72, dtype=dtype, requires_grad=True)
    y = layer(x)
    actual = {"y": y} | gradients(y, {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad})
    oracle, eager = equation(layer, x, torch.float64), equation(layer, x, dtype)
    for name, result in actual.items():
        assert result.dtype == (dtype if name in ("x", "y") else adapter_dtype or dtype)
        assert_close_as_eager(result, oracle[name], eager[name], name)


@each_layer
@pytest.mark.parametrize("make", [nn.Linear, lambda K, N: Conv1D(N, K)], ids=["Linear", "Conv1D"])
def test_fresh_layer_computes_what_its_base_did(make: Any, kind: type[LoRALinear]) -> None:
    linear, x = make(72, 96), torch.randn(33, 72)
    layer = kind.from_linear(linear, r=4)
    assert_close_as_eager(layer(x), copy.deepcopy(linear).double()(x.double()), linear(x))
    assert layer.scaling == 1.0 and layer.lora_A.abs().sum() > 0


@each_layer
def test_base_is_shared_and_frozen(kind: type[LoRALinear]) -> None:
    linear = nn.Linear(8, 12)
    layer = kind.from_linear(linear, r=4)
    adapter = ["lora_A", "lora_B", *["lora_magnitude_vector"] * (kind is DoRALinear)]
    assert layer.weight.data_ptr() == linear.weight.data_ptr() and layer.bias.data_ptr() == linear.bias.data_ptr()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == adapter
    assert linear.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias", *adapter]


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


@each_layer
def test_copies_and_repr(kind: type[LoRALinear]) -> None:
    layer = trained(kind.from_linear(nn.Linear(8, 12), r=4, alpha=8, dropout=0.1)).eval()
    x = torch.randn(5, 8)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.lora_A *= 2  # is seen by its owner alone
        assert not torch.equal(twin(x), expected) and torch.equal(layer(x), expected)
    assert repr(layer) == f"{kind.__name__}(in_features=8, out_features=12, bias=True, r=4, alpha=8, dropout=0.1)"


def test_magnitude_starts_as_the_norm() -> None:
    linear = nn.Linear(72, 96)
    layer = DoRALinear.from_linear(linear, r=4)
    norms = (torch.linalg.vector_norm(linear.weight.to(dtype), dim=1) for dtype in (torch.float64, torch.float32))
    assert_close_as_eager(layer.lora_magnitude_vector, *norms, "magnitude")
    assert torch.equal(layer.lora_magnitude_vector, layer.weight_norm())
    assert (
        DoRALinear.from_linear(linear, r=4, adapter_dtype=torch.bfloat16).lora_magnitude_vector.dtype == torch.bfloat16
    )


CHANGES: dict[str, Any] = {
    "load_state_dict": lambda layer, source: layer.load_state_dict(source.state_dict()),
    "assigned": lambda layer, source: layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=True),
    "data": lambda layer, source: [
        setattr(p, "data", q.data.clone()) for p, q in zip(layer.parameters(), source.parameters(), strict=True)
    ],
    "written to data": lambda layer, source: [
        p.data.copy_(q) for p, q in zip(layer.parameters(), source.parameters(), strict=True)
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_norm_follows_every_change_of_the_weights(change: str) -> None:
    layer, source = (trained(DoRALinear.from_linear(nn.Linear(72, 96), r=4)) for _ in range(2))
    x = torch.randn(33, 72)
    assert not torch.equal(layer(x), source(x))
    CHANGES[change](layer, source)
    assert torch.equal(layer(x), source(x))
    layer.alpha = source.alpha = 3.0
    assert torch.equal(layer(x), copy.deepcopy(source)(x))
    layer.double()
    assert layer.weight_norm().dtype == layer(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_compiles_as_one_graph(dropout: float) -> None:
    layer = trained(DoRALinear.from_linear(nn.Linear(24, 24), r=4, dropout=dropout))
    x = torch.randn(5, 24, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        results = []
        for run in (compiled, layer):
            torch.manual_seed(4)
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *list(layer.parameters())[2:]])])
        for graph, eager in zip(*results, strict=True):
            assert torch.equal(graph, eager)
        with torch.no_grad():
            layer.lora_A *= 2


def test_row_of_norm_zero_is_named() -> None:
    linear = nn.Linear(8, 12)
    with torch.no_grad():
        linear.weight[7] = 0
    layer = DoRALinear.from_linear(linear, r=4)
    with pytest.raises(ValueError, match=r"must be finite, and is nan in row 7: magnitude 0\.0, norm 0\.0"):
        layer(torch.ones(1, 8))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be a rank of at least 1, got 0"),
        ({"r": 2, "alpha": float("nan")}, ValueError, "alpha must be finite, got nan"),
        ({"r": 2, "dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"r": 2, "dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"r": 2, "adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be float64, .* got torch.int8"),
        ({"r": 2, "backend": "abacus"}, ValueError, "backend must be None or one of"),
    ],
)
@each_layer
def test_bad_settings(kind: type[LoRALinear], settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind.from_linear(nn.Linear(8, 12), **settings)(torch.ones(1, 8))


def test_base_of_another_class() -> None:
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear or a Conv1D, got Embedding"):
        LoRALinear.from_linear(nn.Embedding(4, 4), r=2)


def test_wrong_input_names_the_argument() -> None:
    layer = LoRALinear.from_linear(nn.Linear(8, 12), r=4)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., K=8\], got \[5, 9\]"):
        layer(torch.ones(5, 9))
    with pytest.raises(TypeError, match=r"x must have the dtype of weight, torch\.float32, got torch\.bfloat16"):
        layer(torch.ones(5, 8, dtype=torch.bfloat16))

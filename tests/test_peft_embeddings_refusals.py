"""What of embeddings is left to PEFT, and that PEFT's own forward then runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft_layers import layer_of, lora_model
from test_peft_embeddings import BF16, DORA, F32, D, V, drawn, embedding_model, several
from torch import Tensor, nn

import fastpeft

REASONS: dict[str, tuple[dict[str, Any], Callable[[Any], object], str]] = {
    "disabled": ({}, lambda layer: layer.enable_adapters(False), "its adapters are disabled"),
    "merged": (DORA, lambda layer: layer.merge(), "its adapters are merged into the base weight"),
    "elsewhere": ({}, lambda layer: layer.set_adapter([]), "none of the active adapters is in this layer"),
    "max_norm": (
        DORA,
        lambda layer: setattr(layer.base_layer, "max_norm", 1.0),
        "its base layer has a max_norm, by which each call changes the weights",
    ),
    "embed_scale": (
        {},
        lambda layer: setattr(layer.base_layer, "embed_scale", torch.ones(1, 1)),
        "its base layer has an embed_scale that is not one constant number",
    ),
    "tensor_parallel": (
        {},
        lambda layer: setattr(layer, "tp_layer", object()),
        "a tensor-parallel plan shares its rows out",
    ),
    "containers": (
        {},
        lambda layer: layer._modules.update(lora_embedding_A=type("Wrapped", (nn.ParameterDict,), {})()),
        "its adapter 'default' lies in containers that are wrapped",
    ),
    "scaling": (
        DORA,
        lambda layer: layer.scaling.update(default=torch.ones(D)),
        "its adapter 'default' has a scaling that is not one constant number",
    ),
    "dtypes": (
        {},
        lambda layer: layer.lora_embedding_B.update({"default": nn.Parameter(torch.ones(D, 4, dtype=BF16))}),
        "its adapter 'default' has weights of torch.float32 and torch.bfloat16",
    ),
    "variant": (
        {},
        lambda layer: layer.lora_variant.update(default=Variant()),
        "its adapter 'default' is a Variant, neither LoRA nor DoRA",
    ),
    "hooked_magnitude": (
        DORA,
        lambda layer: layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None),
        "its adapter 'default' keeps its magnitude in a peft.tuners.lora.dora.DoraEmbeddingLayer, or in a module with "
        "a hook or a forward of its own",
    ),
    "weight": (
        DORA,
        lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(V, D, dtype=torch.int8), False)),
        "its adapter 'default' has DoRA, and its base layer's weight is torch.int8",
    ),
    "no_parameter": (
        DORA,
        lambda layer: nn.utils.parametrizations.weight_norm(layer.base_layer),
        "its adapter 'default' has DoRA, and its base layer's weight is no Parameter",
    ),
    "float64": (
        DORA,
        lambda layer: layer.lora_embedding_A.double() and layer.lora_embedding_B.double(),
        "its adapter 'default' has DoRA, and is torch.float64 where the base weight is torch.float32",
    ),
    "norm_of_0": (
        DORA,
        lambda layer: (layer.base_layer.weight.data[:, 3].zero_(), layer.lora_embedding_B["default"].data[3].zero_()),
        "its adapter 'default' has a row whose norm is 0, or a magnitude that is not finite",
    ),
}


class Variant:
    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor) -> Tensor:
        return 2 * result


@pytest.mark.parametrize("name", REASONS)
def test_what_is_left_to_peft(name: str) -> None:
    config, change, reason = REASONS[name]
    model = embedding_model(F32, F32, **config)
    change(layer_of(model))
    stock, ids = copy.deepcopy(model), drawn()
    assert fastpeft.patch(model).left_to_peft == {"base_model.model.0": reason}
    assert f"left to PEFT: {reason}" in repr(model)
    try:
        expected = stock(ids)
    except (RuntimeError, TypeError) as error:  # PEFT's error is PEFT's to raise
        with pytest.raises(type(error)):
            model(ids)
    else:
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=0, equal_nan=True)


def test_a_replaced_norm_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedding_model(F32, F32, **DORA)
    fastpeft.patch(model)
    monkeypatch.setattr(
        peft.tuners.lora.dora.DoraEmbeddingLayer, "get_weight_norm", lambda self, weight, *_, **__: weight.new_ones(D)
    )
    (reason,) = fastpeft.explain(model).verdicts.values()
    assert reason.endswith("has DoRA, and peft.tuners.lora.dora.DoraEmbeddingLayer.get_weight_norm was replaced")
    stock = copy.deepcopy(model)
    fastpeft.unpatch(stock)
    ids = drawn()
    assert torch.equal(model(ids), stock(ids))


def test_a_mixed_batch_is_pefts() -> None:
    model = several(F32, F32, {}, {})
    ids, names = drawn(3, 11), ["default", "__base__", "second"]
    expected = layer_of(model)(ids, adapter_names=names)
    fastpeft.patch(model)
    assert torch.equal(layer_of(model)(ids, adapter_names=names), expected)
    dora = embedding_model(F32, F32, **DORA)
    fastpeft.patch(dora)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        layer_of(dora)(drawn(1, 3), adapter_names=["default"])


def test_sparse_gradients_raise_as_in_peft() -> None:
    model = lora_model(nn.Embedding(V, D, sparse=True))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="transpositions between sparse and dense dimensions"):
            model(drawn()).sum().backward()
        assert fastpeft.patch(model).left_to_peft == {}

"""Plain layers are run in one step, to the bits of the longer way; what has anything else takes the longer way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft_layers import adalora_model, layer_of, lora_model
from torch import nn

import fastpeft
from fastpeft.peft.layers import read_layer
from fastpeft.peft.plain import read_plain

X = torch.ones(1, 48)
Change = Callable[[Any, pytest.MonkeyPatch], object]


def plain_layer(dtype: torch.dtype = torch.float32, make: Callable[..., nn.Module] = lora_model, **config: Any) -> Any:
    torch.manual_seed(0)
    model = make(nn.Linear(48, 32).to(dtype), **config)
    fastpeft.patch(model)
    return layer_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_it_gives_the_bits_of_the_longer_way(
    method: str, dtype: torch.dtype, training: bool, dropout: float, tokens: int
) -> None:
    make = adalora_model if method == "adalora" else lora_model
    config = {"use_dora": True} if method == "dora" else {}
    layer = plain_layer(dtype, make, lora_dropout=dropout, **config).train(training)
    x = torch.randn(tokens, 48, dtype=dtype, requires_grad=True)
    results = []
    for operands in (read_plain(layer, x), read_layer(layer, ["default"], x)):
        assert operands is not None and not isinstance(operands, str)
        torch.manual_seed(7)
        y = layer._run(operands, x)
        learned = [p for p in layer.parameters() if p.requires_grad]
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, *learned))))
    assert all(map(torch.equal, *results))


class Own(nn.Parameter):
    pass


def hook(*_: Any) -> None:
    pass


def other_base(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.base_layer.__class__ = type("Own", (nn.Linear,), {})


def add_second(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.update_layer("second", 4, lora_alpha=4, config=peft.LoraConfig(r=4))
    layer.set_adapter(["default", "second"])


def give_bias(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.lora_A["default"].bias = nn.Parameter(torch.zeros(8))


def as_attribute(layer: Any, patch: pytest.MonkeyPatch) -> None:
    weight = layer.lora_B["default"].weight.detach()
    del layer.lora_B["default"].weight
    layer.lora_B["default"].weight = weight


def as_integers(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.base_layer.weight = nn.Parameter(torch.ones(32, 48, dtype=torch.int32), requires_grad=False)


CHANGES: dict[str, Change] = {
    "merged": lambda layer, _: layer.merge(),
    "disabled": lambda layer, _: layer.enable_adapters(False),
    "two active": add_second,
    "hook on the base": lambda layer, _: layer.base_layer.register_forward_hook(hook),
    "hook before A": lambda layer, _: layer.lora_A["default"].register_forward_pre_hook(hook),
    "hook behind B": lambda layer, _: layer.lora_B["default"].register_full_backward_hook(hook),
    "hook on the dropout": lambda layer, _: layer.lora_dropout["default"].register_forward_hook(hook),
    "forward of its own": lambda layer, _: setattr(layer.base_layer, "forward", lambda x: x),
    "another base": other_base,
    "another dropout": lambda layer, _: layer.lora_dropout.update({"default": nn.AlphaDropout(0.1)}),
    "dropout drops all": lambda layer, _: layer.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "bias in A": give_bias,
    "scaling a tensor": lambda layer, _: layer.scaling.update(default=torch.tensor(2.0)),
    "a base of integers": as_integers,
    "weights of a subclass": lambda layer, _: setattr(layer.base_layer, "weight", Own(torch.ones(32, 48))),
    "bias of another dtype": lambda layer, _: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(32).half())),
    "adapters of two dtypes": lambda layer, _: layer.lora_A["default"].half(),
    "weight an attribute": as_attribute,
    "casting switched off": lambda layer, _: setattr(layer, "cast_input_dtype_enabled", False),
    "a variant": lambda layer, _: layer.lora_variant.update(default=object()),
    "linear layers changed": lambda layer, patch: patch.setattr(nn.Linear, "forward", lambda self, x: x),
    "peft changed": lambda layer, patch: patch.setattr(layer.peft_class, "forward", lambda self, x: x),
}


class OtherVariant(DoraLinearVariant):
    pass


class OtherMagnitude(DoraLinearLayer):
    pass


def other_magnitude(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.lora_magnitude_vector["default"].__class__ = OtherMagnitude


def integer_magnitude(layer: Any, patch: pytest.MonkeyPatch) -> None:
    magnitude = nn.Parameter(torch.ones(32, dtype=torch.int32), requires_grad=False)
    layer.lora_magnitude_vector["default"].weight = magnitude


def norm_of_zero(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.base_layer.weight.data[3] = 0
    layer.lora_B["default"].weight.data[3] = 0


CHANGES_OF_DORA: dict[str, Change] = {
    "another variant": lambda layer, _: layer.lora_variant.update(default=OtherVariant()),
    "another magnitude": other_magnitude,
    "a hook on the magnitude": lambda layer, _: layer.lora_magnitude_vector["default"].register_forward_hook(hook),
    "a magnitude of integers": integer_magnitude,
    "a magnitude that is not finite": lambda layer, _: layer.lora_magnitude_vector["default"].weight.data.fill_(
        float("inf")
    ),
    "a row of norm 0": norm_of_zero,
    "the norm changed": lambda _, patch: patch.setattr(DoraLinearLayer, "get_weight_norm", None),
    "dora changed": lambda _, patch: patch.setattr(DoraLinearVariant, "forward", None),
}


@pytest.mark.parametrize("change", CHANGES_OF_DORA)
def test_dora_that_is_not_plain_takes_the_longer_way(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = plain_layer(use_dora=True)
    assert read_plain(layer, X) is not None
    with monkeypatch.context() as patch:
        CHANGES_OF_DORA[change](layer, patch)
        assert read_plain(layer, X) is None


CHANGES_OF_ADALORA: dict[str, Change] = {
    **{
        name: CHANGES[name]
        for name in ("merged", "disabled", "hook on the base", "hook on the dropout", "another base")
    },
    **{name: CHANGES[name] for name in ("dropout drops all", "weights of a subclass", "casting switched off")},
    **{name: CHANGES[name] for name in ("linear layers changed", "peft changed", "bias of another dtype")},
    "E of another dtype": lambda layer, _: layer.lora_E.update({"default": nn.Parameter(torch.ones(8, 1).half())}),
    "no ranks left": lambda layer, _: layer.lora_A.update({"default": nn.Parameter(torch.ones(0, 48))}),
    "wrapped": lambda layer, _: setattr(layer.lora_B, "__class__", type("Own", (nn.ParameterDict,), {})),
    "scaling a tensor": CHANGES["scaling a tensor"],
}


@pytest.mark.parametrize("change", CHANGES_OF_ADALORA)
def test_adalora_that_is_not_plain_takes_the_longer_way(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = plain_layer(make=adalora_model)
    assert read_plain(layer, X) is not None
    with monkeypatch.context() as patch:
        CHANGES_OF_ADALORA[change](layer, patch)
        assert read_plain(layer, X) is None


def test_plain_dora_drops_nothing_in_an_evaluation_of_the_layer_alone() -> None:
    layer = plain_layer(use_dora=True, lora_dropout=0.5)
    layer.training = False  # its dropout goes on
    operands = read_plain(layer, X)
    assert operands is not None and list(operands.adapters.dropout_p) == [0.0]
    layer.training = True
    operands = read_plain(layer, X)
    assert operands is not None and list(operands.adapters.dropout_p) == [0.5]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_takes_the_longer_way(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = plain_layer(lora_dropout=0.1)
    assert read_plain(layer, X) is not None
    with monkeypatch.context() as patch:
        CHANGES[change](layer, patch)
        assert read_plain(layer, X) is None


def test_a_hook_on_all_modules_takes_the_longer_way() -> None:
    layer = plain_layer()
    handle = nn.modules.module.register_module_forward_hook(hook)
    assert read_plain(layer, X) is None
    handle.remove()
    assert read_plain(layer, X) is not None


def test_a_layer_that_is_traced_or_transformed_takes_the_longer_way() -> None:
    layer, x = plain_layer(), torch.randn(3, 48)
    seen: list[object] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(read_plain(layer, X))
        return x * 2

    torch.jit.trace(look, x, check_trace=False)
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    assert seen == [None, None, None]

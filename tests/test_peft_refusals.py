"""What cannot be fused goes to PEFT: PEFT's result comes out to the bit, and report and explain say why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import peft.helpers
import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft_layers import add_adapter, layer_of, lora_model
from torch import Tensor, nn

import fastpeft


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class OtherDropout(nn.Dropout):
    """A dropout module alike."""


class OtherTensor(Tensor):
    """A tensor subclass, as quantizers and parallelisms use them."""


class Wrapper(nn.Module):
    """A module around another one, as FSDP puts it."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return self._modules["wrapped"] if name == "wrapped" else getattr(self._modules["wrapped"], name)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.wrapped(x)


class WrappedDict(nn.ModuleDict):
    """A container of another class."""


def other_parameter(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().as_subclass(OtherTensor))


def own_forward(module: nn.Module) -> None:
    """As accelerate does it: an attribute of the instance."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def double(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return 2 * output


def double_first(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (2 * args[0],)


def set_adapter_weight(layer: Any) -> None:
    layer.lora_B["default"].weight = other_parameter(layer.lora_B["default"].weight)


def set_adapter_bias(layer: Any) -> None:
    layer.lora_A["default"].bias = nn.Parameter(torch.randn(4))


def set_container(layer: Any) -> None:
    layer.lora_A = WrappedDict(layer.lora_A)


def wrap(layer: Any) -> None:
    layer.lora_A["default"] = Wrapper(layer.lora_A["default"])


def set_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = OtherDropout(0.0)


def drop_everything(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(1.0)


def set_scaling(value: Any) -> Callable[[Any], None]:
    return lambda layer: layer.scaling.update(default=value)


ADAPTER_HOOK = "'default' has a module with a hook or a forward"
STATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "disabled": (lambda layer: layer.enable_adapters(False), "its adapters are disabled"),
    "merged": (lambda layer: layer.merge(), "merged into the base weight"),
    "other adapter": (lambda layer: layer.set_adapter("elsewhere"), "none of the active adapters"),
    "containers": (set_container, "lies in containers that are wrapped"),
    "adapter class": (wrap, "consists of test_peft_refusals.Wrapper and torch.nn.modules.linear.Linear"),
    "adapter hook": (lambda layer: layer.lora_A["default"].register_forward_hook(double), ADAPTER_HOOK),
    "adapter pre-hook": (lambda layer: layer.lora_B["default"].register_forward_pre_hook(double_first), ADAPTER_HOOK),
    "adapter forward": (lambda layer: own_forward(layer.lora_B["default"]), ADAPTER_HOOK),
    "dropout hook": (lambda layer: layer.lora_dropout["default"].register_forward_hook(double), ADAPTER_HOOK),
    "dropout class": (set_dropout, "has test_peft_refusals.OtherDropout for dropout"),
    "dropout of everything": (drop_everything, "drops everything (p = 1.0)"),
    "adapter weight": (set_adapter_weight, "has weights of Parameter and OtherTensor"),
    "adapter bias": (set_adapter_bias, "has a bias in lora_A"),
    "scaling with gradient": (set_scaling(torch.tensor(2.0, requires_grad=True)), "not one constant number"),
    "scaling vector": (set_scaling(torch.rand(12)), "not one constant number"),
}


def gradients(model: nn.Module, y: Tensor) -> list[Tensor | None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), trained, allow_unused=True)) if y.requires_grad else []


def assert_left_to_peft(model: nn.Module, reason: str, **kwargs: Any) -> None:
    """The state is the report's reason and explain's, and what comes out is PEFT's."""
    report = fastpeft.patch(model)
    (stated,) = report.left_to_peft.values()
    assert reason in stated
    assert report.fused == [] and str(report).startswith("fused: 0, left to PEFT: 1\n1 × ")
    assert reason in str(fastpeft.explain(model)) and reason in str(model)
    x = torch.randn(5, 8)
    results = []
    for undo in (lambda model: None, fastpeft.unpatch):
        undo(model)
        torch.manual_seed(1)
        y = layer_of(model)(x, **kwargs)
        results.append([y, *gradients(model, y)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)  # None is close to None


@pytest.mark.parametrize("state", STATES)
def test_state_that_cannot_be_fused(state: str) -> None:
    prepare, reason = STATES[state]
    model = lora_model(nn.Linear(8, 12))
    prepare(layer_of(model))
    assert_left_to_peft(model, reason)


def test_hook_on_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert_left_to_peft(lora_model(nn.Linear(8, 12)), "a hook on all modules is registered")
    finally:
        handle.remove()


@pytest.mark.parametrize("part", ["base_layer.bias", "lora_B.default.weight"])
def test_mixed_dtypes_are_for_autocast_alone_as_in_peft(part: str) -> None:
    model = lora_model(nn.Linear(8, 12))
    parameter = layer_of(model).get_parameter(part)
    parameter.data = parameter.data.bfloat16()
    if part == "lora_B.default.weight":
        with torch.autocast("cpu", torch.bfloat16):
            assert_left_to_peft(model, "has weights of torch.float32 and torch.bfloat16")
    else:
        (reason,) = fastpeft.patch(copy.deepcopy(model)).left_to_peft.values()
        assert reason == "its base layer's weight is torch.float32 and its bias torch.bfloat16, without autocast"
    fastpeft.patch(model)
    with pytest.raises(RuntimeError, match="dtype"):
        layer_of(model)(torch.randn(5, 8))


def test_input_casting_switched_off_raises_as_in_peft() -> None:
    model = lora_model(nn.Linear(8, 12, dtype=torch.bfloat16))
    fastpeft.patch(model)
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    layer_of(model)(x)
    with peft.helpers.disable_input_dtype_casting(model):
        assert "casting the input is switched off" in str(fastpeft.explain(model))
        with pytest.raises(RuntimeError, match="dtype"):
            layer_of(model)(x)


@pytest.mark.parametrize("autocast", [False, True])
def test_input_of_another_dtype_raises_as_in_peft(autocast: bool) -> None:
    model = lora_model(nn.Linear(8, 12))
    fastpeft.patch(model)
    x = torch.randn(5, 8, dtype=torch.float64 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(RuntimeError, match="dtype"):
        layer_of(model)(x)


def test_another_variant_of_lora() -> None:
    model = lora_model(nn.Linear(8, 12), velora_config=peft.VeloraConfig())
    variant = type(layer_of(model).lora_variant["default"]).__name__
    assert_left_to_peft(model, f"'default' is a {variant}, neither LoRA nor DoRA")


class OtherDora(DoraLinearLayer):
    """A module for the magnitude that is not known exactly."""


def magnitude_of(layer: Any) -> DoraLinearLayer:
    return layer.lora_magnitude_vector["default"]


def set_magnitude_class(layer: Any) -> None:
    magnitude_of(layer).__class__ = OtherDora


def set_magnitude(layer: Any) -> None:
    magnitude_of(layer).weight = other_parameter(magnitude_of(layer).weight)


def set_dora_bias(layer: Any) -> None:
    """Through its config PEFT refuses it; the layer computes with it, also in the norm."""
    layer.lora_B["default"].bias = nn.Parameter(torch.randn(12))


def set_zero_row(layer: Any) -> None:
    with torch.no_grad():
        layer.base_layer.weight[7] = layer.lora_B["default"].weight[7] = 0


def set_nan(layer: Any) -> None:
    with torch.no_grad():
        magnitude_of(layer).weight[7] = torch.nan


MAGNITUDE_HOOK = "lora.dora.DoraLinearLayer, or in a module with a hook or a forward of its own"
NOT_FINITE = "'default' has a row whose norm is 0, or a magnitude that is not finite"
DORA_STATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "merged": (lambda layer: layer.merge(), "merged into the base weight"),
    "adapter hook": (lambda layer: layer.lora_A["default"].register_forward_hook(double), ADAPTER_HOOK),
    "bias in lora_B": (set_dora_bias, "'default' has DoRA and a bias in lora_B"),
    "magnitude hook": (lambda layer: magnitude_of(layer).register_forward_hook(double), MAGNITUDE_HOOK),
    "magnitude forward": (lambda layer: own_dora_forward(magnitude_of(layer)), MAGNITUDE_HOOK),
    "magnitude class": (set_magnitude_class, "keeps its magnitude in a test_peft_refusals.OtherDora"),
    "magnitude": (set_magnitude, "'default' has a magnitude that is a OtherTensor on cpu"),
    "zero row": (set_zero_row, NOT_FINITE),
    "nan": (set_nan, NOT_FINITE),
}


def own_dora_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


@pytest.mark.parametrize("state", DORA_STATES)
def test_state_of_dora_that_cannot_be_fused(state: str) -> None:
    prepare, reason = DORA_STATES[state]
    model = lora_model(nn.Linear(8, 12), use_dora=True)
    prepare(layer_of(model))
    assert_left_to_peft(model, reason)
    rows = layer_of(model)(torch.ones(1, 8)).isnan().any(0)
    assert rows.nonzero().flatten().tolist() == ([7] if reason == NOT_FINITE else [])


@pytest.mark.parametrize("first_has_dora", [False, True])
def test_dora_and_lora_together(first_has_dora: bool) -> None:
    model = lora_model(nn.Linear(8, 12), use_dora=first_has_dora)
    add_adapter(model, "second", use_dora=not first_has_dora)
    model.base_model.set_adapter(["default", "second"])
    assert_left_to_peft(model, "DoRA and LoRA adapters are active together")


@pytest.mark.parametrize("off", [nn.Module.eval, lambda dropout: setattr(dropout, "p", 0.0)], ids=["eval", "p=0"])
def test_several_dora_adapters_one_of_which_alone_drops_nothing(off: Callable[[nn.Module], Any]) -> None:
    model = lora_model(nn.Linear(8, 12), use_dora=True, lora_dropout=0.5)
    add_adapter(model, "second", use_dora=True, lora_dropout=0.5)
    model.base_model.set_adapter(["default", "second"])
    assert fastpeft.patch(model).left_to_peft == {}
    off(layer_of(model).lora_dropout["second"])
    assert_left_to_peft(model, "several DoRA adapters are active, and dropout is switched off in one of them alone")


def test_layer_is_fused_once_its_state_allows() -> None:
    model = lora_model(nn.Linear(8, 12))
    layer = layer_of(model)
    layer.merge()
    assert fastpeft.patch(model).fused == []
    layer.unmerge()
    assert list(fastpeft.patch(model).fused) == ["base_model.model.0"]
    assert "fused by fastpeft" in repr(layer)


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "extra keyword": lambda layer: layer(torch.ones(5, 8), alora_offsets=None),
    "adapter_names None": lambda layer: layer(torch.ones(5, 8), adapter_names=None),
    "meta": lambda layer: layer.to("meta")(torch.empty(5, 8, device="meta")),
    "nested": lambda layer: torch.cat(
        layer(torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged)).unbind()
    ),
    "vmap": lambda layer: torch.func.vmap(layer)(torch.ones(3, 5, 8)),
    "functional gradient": lambda layer: torch.func.grad(lambda x: layer(x).square().sum())(torch.ones(5, 8)),
    "forward derivative": lambda layer: torch.func.jvp(layer, (torch.ones(5, 8),), (torch.ones(5, 8),))[1],
    "derivative in the adapter": lambda layer: torch.func.grad(
        lambda A: torch.func.functional_call(layer, {"lora_A.default.weight": A}, torch.ones(5, 8)).square().sum()
    )(layer.lora_A["default"].weight.detach()),
    "mixed batch of one vector": lambda layer: layer(torch.ones(8), adapter_names=["default", "__base__"] * 4),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_call_that_cannot_be_fused(use_dora: bool, call: str) -> None:
    base = nn.Linear(8, 8 if "vector" in call else 12)
    model = lora_model(base, use_dora=use_dora)
    results = []
    for prepare in (lambda model: None, fastpeft.patch):
        model = copy.deepcopy(model)
        prepare(model)
        results.append(outcome(CALLS[call], layer_of(model)))
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], Exception):
        assert str(results[0]) == str(results[1])
    else:
        assert results[0].device == results[1].device
        assert results[0].is_meta or torch.equal(*results)


def outcome(call: Callable[[Any], Tensor], layer: Any) -> Tensor | Exception:
    try:
        return call(layer)
    except (RuntimeError, ValueError, IndexError) as error:
        return error


def test_vector_gets_the_shape_that_pefts_dora_gives_it() -> None:
    model = lora_model(nn.Linear(8, 12), use_dora=True)
    expected = layer_of(model)(torch.ones(8))
    fastpeft.patch(model)
    assert expected.shape == (1, 12)
    assert torch.equal(layer_of(model)(torch.ones(8)), expected)


def test_mixed_batch_raises_what_peft_raises() -> None:
    model = lora_model(nn.Linear(8, 12))
    fastpeft.patch(model)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer_of(model)(torch.randn(4, 8), adapter_names=["default"])
    layer_of(model).merge()
    with pytest.raises(ValueError, match="merged adapters"):
        layer_of(model)(torch.randn(1, 8), adapter_names=["default"])
    dora = lora_model(nn.Linear(8, 12), use_dora=True)
    assert fastpeft.patch(dora).left_to_peft == {}
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        layer_of(dora)(torch.randn(1, 8), adapter_names=["default"])


_LORA = "peft.tuners.lora.layer"
OTHER_LAYERS = {
    "MultiheadAttention": (
        nn.MultiheadAttention(8, 2),
        {},
        f"{_LORA}.MultiheadAttention is no class that fastpeft fuses",
    ),
    "ParamWrapper": (
        nn.Linear(8, 8),
        {"target_parameters": ["0.weight"]},
        "its base layer is a torch.nn.modules.linear.Linear, no experts of transformers'",
    ),
}


@pytest.mark.parametrize("kind", OTHER_LAYERS)
def test_other_lora_layers(kind: str) -> None:
    base, config, reason = OTHER_LAYERS[kind]
    settings = {"r": 2, "target_modules": [] if config else ["0"]} | config
    model = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(**settings))
    report = fastpeft.patch(model)
    assert report.left_to_peft["base_model.model.0"] == reason
    assert report.fused == []


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(target_modules=["0"]),
        peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    ],
    ids=["loha", "ia3"],
)
def test_other_methods(config: peft.PeftConfig) -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 12)), config)
    expected = model(torch.ones(5, 8))
    report = fastpeft.patch(model)
    assert list(report.left_to_peft) == ["base_model.model.0"] and report.fused == []
    assert torch.equal(model(torch.ones(5, 8)), expected)

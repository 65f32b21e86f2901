"""Experts that PEFT has to run: each reason is the report's and explain's, and what comes out is PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft_experts import HIDDEN, draw, fused_calls, fused_experts, moe, run, wrappers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import fastpeft
from fastpeft.backends.cpu import CpuBackend
from fastpeft.peft import experts

EXPERTS_ONLY = {"target_modules": []}


class OtherTensor(Tensor):
    """Another library's weight."""


class OtherWrapper(ParamWrapper):
    """Of no class that fastpeft knows."""


class OtherExperts(Qwen3MoeExperts):
    """Inherits all, and may do anything."""


@use_experts_implementation
class OwnForward(nn.Module):
    """Is not transformers'."""

    def forward(self, *call: Tensor) -> Tensor:
        return 2 * Qwen3MoeExperts.forward.__wrapped__(self, *call)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def experts_of(wrapper: Any) -> Any:
    return wrapper.get_base_layer()


def set_class(kind: type[Any]) -> Callable[[Any], None]:
    return lambda wrapper: setattr(experts_of(wrapper), "__class__", kind)


def set_weight(change: Callable[[Tensor], Any]) -> Callable[[Any], None]:
    def prepare(wrapper: Any) -> None:
        experts_of(wrapper).gate_up_proj = change(experts_of(wrapper).gate_up_proj)

    return prepare


def parametrize(wrapper: Any) -> None:
    nn.utils.parametrize.register_parametrization(experts_of(wrapper), "gate_up_proj", nn.Identity())


def other_parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().as_subclass(OtherTensor), requires_grad=False)


def set_implementation(name: str) -> Callable[[Any], None]:
    return lambda wrapper: setattr(experts_of(wrapper).config, "_experts_implementation", name)


def set_own_interface(wrapper: Any) -> None:
    """It chooses elsewhere what it runs."""

    class OwnInterface(nn.Module):
        forward = Qwen3MoeExperts.forward.__wrapped__

    set_class(use_experts_implementation(OwnInterface, experts_interface=ExpertsInterface()))(wrapper)


def set_own_forward(wrapper: Any) -> None:
    set_class(OwnForward)(wrapper)
    set_implementation("eager")(wrapper)


def set_scaling(value: Any) -> Callable[[Any], None]:
    return lambda wrapper: wrapper.scaling.update(default=value)


def inner(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda wrapper: change(wrapper.base_layer)


def disable(wrapper: Any) -> None:
    wrapper.enable_adapters(False)
    wrapper.base_layer.enable_adapters(False)


def set_others(wrapper: Any) -> None:
    wrapper.set_adapter("elsewhere")
    wrapper.base_layer.set_adapter("elsewhere")


class Containers(nn.ModuleDict):
    """Another library's."""


def set_containers(wrapper: Any) -> None:
    wrapper.lora_A = Containers(wrapper.lora_A)


def cast_B(wrapper: Any) -> None:
    wrapper.lora_B["default"].weight.data = wrapper.lora_B["default"].weight.data.bfloat16()


def set_adapter_weight(wrapper: Any) -> None:
    wrapper.lora_A["default"].weight = other_parameter(wrapper.lora_A["default"].weight)


STATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "disabled": (disable, "its adapters are disabled"),
    "merged": (lambda wrapper: wrapper.merge(), "its adapters are merged into the base weight"),
    "merged inside": (inner(lambda wrapper: wrapper.merge()), "its adapters are merged into the base weight"),
    "other adapter": (set_others, "none of the active adapters is in this layer"),
    "one expert": (lambda wrapper: setattr(wrapper, "num_experts", 1), "there is one expert alone"),
    "hook inside": (
        inner(lambda wrapper: wrapper.register_forward_hook(double)),
        "a wrapper inside it has a hook or a forward of its own",
    ),
    "class inside": (
        inner(lambda wrapper: setattr(wrapper, "__class__", OtherWrapper)),
        "a wrapper inside it is a test_peft_experts_refusals.OtherWrapper",
    ),
    "hook on the experts": (
        lambda wrapper: experts_of(wrapper).register_forward_hook(double),
        "its experts have a hook or a forward of their own",
    ),
    "class": (set_class(OtherExperts), "its base layer is a test_peft_experts_refusals.OtherExperts, no experts of"),
    "interface": (set_own_interface, "its base layer is a test_peft_experts_refusals.set_own_interface"),
    "own forward": (set_own_forward, "its experts run test_peft_experts_refusals.OwnForward's own forward"),
    "implementation": (set_implementation("doubled"), "its experts run as 'doubled'"),
    "expert parallel": (
        lambda wrapper: setattr(experts_of(wrapper), "_is_expert_parallel", True),
        "its experts are spread over processes",
    ),
    "norm": (
        lambda wrapper: vars(experts_of(wrapper)).update(has_post_expert_norm=True, post_expert_norm=torch.square),
        "its experts have a norm at their end",
    ),
    "parametrized": (parametrize, "its base layer is a "),
    "no parameter": (
        set_weight(lambda weight: None),
        "its experts' gate_up_proj is no Parameter: it is parametrized, a replica or a shard",
    ),
    "another library's weight": (set_weight(other_parameter), "its experts' gate_up_proj is a OtherTensor"),
    "meta": (
        set_weight(lambda weight: nn.Parameter(weight.to("meta"), requires_grad=False)),
        "its experts' gate_up_proj is on the meta device",
    ),
    "float8": (
        set_weight(lambda weight: nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)),
        "its experts' gate_up_proj is torch.float8_e4m3fn",
    ),
    "trained": (set_weight(lambda weight: weight.requires_grad_()), "its experts' gate_up_proj is trained itself"),
    "containers": (set_containers, "its adapters lie in containers that are wrapped"),
    "adapter's weight": (set_adapter_weight, "its adapter 'default' has weights of OtherTensor and Parameter"),
    "adapter's dtypes": (cast_B, "its adapter 'default' has weights of torch.float32 and torch.bfloat16"),
    "scaling": (set_scaling(torch.ones(2)), "its adapter 'default' has a scaling that is not one constant number"),
    "twice": (inner(lambda wrapper: setattr(wrapper, "parameter_name", "down_proj")), "two wrappers adapt the same"),
    "a bias": (lambda wrapper: setattr(wrapper, "parameter_name", "act_fn"), "it adapts act_fn, which is no stack of"),
}
# PEFT raises there, or leaves its own parametrization behind.
NO_RESULT = (
    "one expert",
    "no parameter",
    "meta",
    "float8",
    "scaling",
    "twice",
    "a bias",
    "parametrized",
    "adapter's dtypes",
)


def doubled(module: Any, *call: Tensor) -> Tensor:
    return 2 * ALL_EXPERTS_FUNCTIONS["batched_mm"](module, *call)


@pytest.mark.parametrize("state", STATES)
def test_state_that_cannot_be_fused(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ExpertsInterface._global_mapping, "doubled", doubled)
    prepare, reason = STATES[state]
    model = moe(**EXPERTS_ONLY)
    for wrapper in wrappers(model):
        prepare(wrapper)
    report = fastpeft.patch(model)
    assert report.fused == [] and all(stated.startswith(reason) for stated in report.left_to_peft.values())
    assert len(report.left_to_peft) == 2
    assert f"PEFT: {reason}" in str(fastpeft.explain(model)) and reason in repr(wrappers(model)[0])
    if state in NO_RESULT:
        return
    call, results = draw(), []
    for undo in (lambda model: None, fastpeft.unpatch):
        undo(model)
        results.append(run(model, call))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(result, results[1][name]) for name, result in results[0].items())


def test_float64_with_one_parameter_adapted() -> None:
    model = moe(**EXPERTS_ONLY, target_parameters=["experts.down_proj"]).double()
    set_implementation("eager")(wrappers(model)[0])
    (reason,) = set(fastpeft.patch(model).left_to_peft.values())
    assert reason == "its experts' gate_up_proj has no adapter, and torch no grouped products in float64"
    assert run(model, draw())["y"].dtype == torch.float64


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "names of adapters": lambda wrapper: wrapper(*draw()[:3], adapter_names=["default"] * 48),
    "by keyword": lambda wrapper: wrapper(
        draw()[0], **dict(zip(("top_k_index", "top_k_weights"), draw()[1:3], strict=True))
    ),
    "a lone argument": lambda wrapper: wrapper(draw()[0]),
    "meta": lambda wrapper: wrapper(*(each.to("meta") for each in draw()[:3])),
    "vmap": lambda wrapper: torch.func.vmap(lambda x: wrapper(x, *draw()[1:3]))(torch.ones(3, 48, HIDDEN)),
    "weights of all experts": lambda wrapper: wrapper(*draw()[:2], draw()[2].repeat(1, 2)),
}


@pytest.mark.parametrize("call", CALLS)
def test_call_that_cannot_be_fused(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = moe(**EXPERTS_ONLY)
    fused = copy.deepcopy(stock)
    assert fastpeft.patch(fused).left_to_peft == {}
    monkeypatch.setattr(type(wrappers(fused)[0]), "_run", lambda *args: pytest.fail("fused"))
    outcomes = []
    for model in (stock, fused):
        torch.manual_seed(1)
        try:
            outcomes.append(CALLS[call](wrappers(model)[0]))
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        assert outcomes[0].is_meta or torch.equal(*outcomes)


def test_experts_are_fused_again_once_their_state_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe(**EXPERTS_ONLY)
    model.merge_adapter()
    assert fastpeft.patch(model).fused == []
    model.unmerge_adapter()
    with fused_calls(monkeypatch) as seen:
        run(model, draw())
    assert len(seen) == 1 and len(fastpeft.patch(model).fused) == 2


def test_a_wrapper_around_a_fused_one_is_pefts_until_it_is_patched() -> None:
    model, call = moe(**EXPERTS_ONLY), draw()
    expected = run(model, call)
    for wrapper in wrappers(model):
        assert len(fastpeft.patch(wrapper.base_layer).fused) == 1
    assert [name.endswith("experts.base_layer") for name in fused_experts(model)] == [True, True]
    inside_alone = run(model, call)
    assert all(torch.equal(result, inside_alone[name]) for name, result in expected.items())
    assert fastpeft.patch(model).fused == fused_experts(model)


def doubled_result(result: Any) -> Any:
    if isinstance(result, tuple):  # the factors of an update
        return 2 * result[0], *result[1:]
    return 2 * result


@pytest.mark.parametrize("when", ["before the patch", "after it"])
@pytest.mark.parametrize("name", ["forward", "get_delta_weight", "get_delta_factors", "get_param"])
def test_a_function_of_pefts_that_another_library_replaced_runs(
    name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = getattr(ParamWrapper, name, None)
    if own is None:
        assert name == "get_delta_factors"  # PEFT 0.18 has none
        return
    model, call = moe(**EXPERTS_ONLY), draw()
    stock = copy.deepcopy(model)
    if when == "after it":
        fastpeft.patch(model)
    with monkeypatch.context() as patch:
        if name == "get_param":
            patch.setattr(ParamWrapper, name, lambda self: own(self))
        else:
            patch.setattr(ParamWrapper, name, lambda self, *args, **kwargs: doubled_result(own(self, *args, **kwargs)))
        (reason,) = set(fastpeft.patch(model).left_to_peft.values())
        assert reason == f"peft.tuners.lora.layer.ParamWrapper.{name} was replaced"
        expected, found = run(stock, call), run(model, call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert fastpeft.patch(model).left_to_peft == {}  # put back: fused again


def test_experts_without_kernels_on_a_gpu_are_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose backends say what they take; the CPU's stands in for the GPU here."""
    stock = moe(**EXPERTS_ONLY)
    call = draw()
    expected = run(stock, call)
    monkeypatch.setattr(experts, "_is_waited_for", lambda weight: True)
    fused = copy.deepcopy(stock)
    assert fastpeft.patch(fused).left_to_peft == {}
    monkeypatch.setattr(CpuBackend, "refuses", lambda self, *operands: "it is no GPU")
    assert "gate_up_proj has no kernels on a GPU (it runs on NVIDIA GPUs" in str(fastpeft.explain(fused))
    found = run(fused, call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

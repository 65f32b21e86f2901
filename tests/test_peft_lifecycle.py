"""A fused model lives the life of a PEFT model: trained, saved, merged, copied, unpatched."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import pytest
import torch
from oracle import assert_close_as_eager
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.model import LoraModel
from peft_layers import layer_of, lora_model, no_peft_forward, tiny_llama, tiny_llama_base, tokens, train
from torch import Tensor, nn

import fastpeft
from fastpeft.peft.layers import FusedLinear

lora_and_dora = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fused_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is FusedLinear]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@lora_and_dora
def test_twenty_training_steps_then_saved_and_reloaded_in_plain_peft(
    use_dora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = tiny_llama(use_dora=use_dora)
    base = copy.deepcopy(stock).unload()
    double, fused = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    assert len(fastpeft.patch(fused).fused) == 6
    batches = [tokens() for _ in range(4)] * 5
    with no_peft_forward(monkeypatch):
        losses = train(fused, batches)
    assert_close_as_eager(losses, train(double, batches), train(stock, batches), "loss curve")
    assert losses[-4:].mean() < losses[:4].mean()

    fused.eval()
    fused.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert fused_names(reloaded) == []
    ids, double_reloaded = tokens(), copy.deepcopy(reloaded).double()
    assert_close_as_eager(logits(fused, ids), logits(double_reloaded, ids), logits(reloaded, ids), "logits")


def test_state_dict_and_parameters_stay_pefts() -> None:
    model = tiny_llama()
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    fastpeft.patch(model)
    assert list(model.state_dict()) == state
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@lora_and_dora
def test_patch_twice_then_unpatch(use_dora: bool) -> None:
    model = tiny_llama(use_dora=use_dora)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    first, second = fastpeft.patch(model), fastpeft.patch(model)
    assert first == second and len(first.fused) == 6 and first.left_to_peft == {}
    assert str(first) == "fused: 6, left to PEFT: 0"
    logits(model, tokens())
    assert sum("_fastpeft_norms" in vars(module) for module in model.modules()) == 6 * use_dora
    fastpeft.unpatch(model)
    assert fused_names(model) == []
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert sum(type(module) is PeftLinear for module in model.modules()) == 6
    fastpeft.unpatch(model)


def test_report_groups_reasons() -> None:
    model = tiny_llama()
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            module.merge()
    report = fastpeft.patch(model)
    assert str(report).splitlines() == [
        "fused: 2, left to PEFT: 4",
        "4 × its adapters are merged into the base weight",
        "    " + ", ".join(list(report.left_to_peft)[:3]) + " and 1 more",
    ]


@pytest.mark.parametrize("function", [fastpeft.patch, fastpeft.unpatch, fastpeft.explain])
def test_what_is_no_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("model")


def test_patch_without_peft_layers() -> None:
    with pytest.raises(ValueError, match="model must hold at least one PEFT layer, got a Sequential without any"):
        fastpeft.patch(nn.Sequential(nn.Linear(2, 2)))


def test_unknown_backend_changes_nothing() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="backend must be None or one of"):
        fastpeft.patch(model, backend="abacus")
    assert fused_names(model) == []


def test_backend_that_refuses_a_layer_changes_nothing() -> None:
    model = tiny_llama().double()
    with pytest.raises(fastpeft.BackendRefusal, match=r"backend='cpu' cannot run .*q_proj: "):
        fastpeft.patch(model, backend="cpu")
    assert fused_names(model) == []


def test_backend_by_name_holds_for_every_call() -> None:
    model = lora_model(nn.Linear(8, 12))
    fastpeft.patch(model, backend="reference")
    by_name = layer_of(model)(torch.ones(5, 8))
    assert "reference: asked for by name" in str(fastpeft.explain(model))
    model.double()
    fastpeft.patch(model)
    layer_of(model).fastpeft_backend = "cpu"
    with pytest.raises(fastpeft.BackendRefusal):
        layer_of(model)(torch.ones(5, 8, dtype=torch.float64))
    assert by_name.shape == (5, 12)


def steps_of_life(model: peft.PeftModel, ids: Tensor) -> list[Tensor]:
    """The logits after each change that PEFT's users make to a model."""
    seen = []

    def look() -> None:
        seen.append(logits(model, ids))

    look()
    model.merge_adapter()
    look()
    model.unmerge_adapter()
    look()
    with model.disable_adapter():
        look()
    look()
    config = {"r": 3, "init_lora_weights": False, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model.add_adapter("second", peft.LoraConfig(**config))
    model.set_adapter("second")
    look()
    model.base_model.set_adapter(["default", "second"])
    look()
    seen.append(logits_of_mixed_batch(model, ids))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    look()
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        look()
    model.delete_adapter("default")
    model.set_adapter("second")
    look()
    return seen


def logits_of_mixed_batch(model: peft.PeftModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, adapter_names=["second", "default"]).logits


def test_life_of_adapters() -> None:
    stock, ids = tiny_llama(init_lora_weights=False).eval(), tokens()
    double, fused = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    with fastpeft.enabled():
        fastpeft.patch(fused)
        torch.manual_seed(1)
        actual = steps_of_life(fused, ids)
    assert len(fused_names(fused)) == 8
    torch.manual_seed(1)
    expected = steps_of_life(stock, ids)
    torch.manual_seed(1)
    oracle = steps_of_life(double, ids)
    for step, (a, o, e) in enumerate(zip(actual, oracle, expected, strict=True)):
        assert_close_as_eager(a, o, e, f"step {step}")
    fused = fused.merge_and_unload()
    assert fused_names(fused) == []


def steps_of_dora(model: peft.PeftModel, ids: Tensor) -> list[Tensor]:
    """The logits after each change to what DoRA's norm depends on."""
    seen = [logits(model, ids)]

    def look() -> None:
        seen.extend([logits(model, ids), logits(model, ids)])

    model.merge_adapter()
    look()
    model.unmerge_adapter()
    look()
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        look()
    look()
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "q_proj.base_layer" in name:
            parameter.data *= 0.75
    look()
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, {name: 1.25 * value for name, value in state.items()})
    look()
    config = {"r": 3, "init_lora_weights": False, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for rank in (3, 5):
        model.add_adapter("second", peft.LoraConfig(**config | {"r": rank}, use_dora=True))
        model.base_model.set_adapter(["default", "second"])
        look()
        model.set_adapter("default")
        model.delete_adapter("second")
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    look()
    return seen


def test_life_of_doras_norm() -> None:
    stock, ids = tiny_llama(init_lora_weights=False, use_dora=True).eval(), tokens()
    double, fused = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    assert len(fastpeft.patch(fused).fused) == 6
    results = []
    for model in (fused, double, stock):
        torch.manual_seed(1)
        results.append(steps_of_dora(model, ids))
    assert len(fused_names(fused)) == 6
    for step, (a, o, e) in enumerate(zip(*results, strict=True)):
        assert_close_as_eager(a, o, e, f"step {step}")
    merged = [model.merge_and_unload() for model in (fused, double, stock)]
    assert_close_as_eager(*(logits(model, ids) for model in merged), "merged")


@lora_and_dora
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_fused(
    copied: Callable[[nn.Module], nn.Module], use_dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(init_lora_weights=False, use_dora=use_dora), tokens()
    fastpeft.patch(model, backend="reference")
    twin = copied(model)
    assert fused_names(twin) == fused_names(model)
    with no_peft_forward(monkeypatch):
        assert torch.equal(logits(twin, ids), logits(model, ids))
    layers = (module for module in twin.modules() if type(module) is FusedLinear)
    assert {layer.fastpeft_backend for layer in layers} == {"reference"}


def test_get_peft_model() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = fastpeft.get_peft_model(tiny_llama_base(), config, backend="reference", adapter_name="mine")
    assert isinstance(model, peft.PeftModel) and list(model.peft_config) == ["mine"]
    assert len(fused_names(model)) == 2


def test_get_peft_model_with_another_method_changes_nothing() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"peft_config must be .* one of Lora, AdaLora, Vera, .* got IA3Config"):
        fastpeft.get_peft_model(base, peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert type(base[0]) is nn.Linear


def made_now() -> list[str]:
    """The fused layers of models made in three ways, none of which knows of fastpeft."""
    injected = nn.Sequential(nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), injected)
    mixed = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]), mixed=True)
    models = {"injected": injected, "mixed": mixed, "wrapped": lora_model(nn.Linear(4, 4))}
    return [name for name, model in models.items() if fused_names(model)]


EVERY_WAY = ["injected", "mixed", "wrapped"]


def test_enable_and_disable() -> None:
    create = LoraModel._create_new_module
    try:
        fastpeft.enable()
        fastpeft.enable()
        assert made_now() == EVERY_WAY
    finally:
        fastpeft.disable()
    assert made_now() == []
    assert LoraModel._create_new_module is create
    fastpeft.disable()


def test_enabled_may_be_nested_and_leaves_enable_alone() -> None:
    with fastpeft.enabled():
        with pytest.raises(KeyError), fastpeft.enabled():
            raise KeyError
        assert made_now() == EVERY_WAY
    assert made_now() == []
    try:
        fastpeft.enable()
        with fastpeft.enabled():
            pass
        assert made_now() == EVERY_WAY
    finally:
        fastpeft.disable()


def test_enabled_in_threads() -> None:
    first_is_in, second_is_out = threading.Event(), threading.Event()
    made: list[list[str]] = []

    def first() -> None:
        with fastpeft.enabled():
            first_is_in.set()
            second_is_out.wait()
            made.append(made_now())

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait()
    with fastpeft.enabled():
        pass
    second_is_out.set()
    thread.join()
    assert made == [EVERY_WAY] and made_now() == []


def test_enable_reaches_loading_and_later_adapters(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    base = tiny_llama().unload()
    with fastpeft.enabled():
        model = peft.PeftModel.from_pretrained(base, tmp_path)
        assert len(fused_names(model)) == 6
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    assert len(fused_names(model)) == 8

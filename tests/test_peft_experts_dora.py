"""DoRA on experts (``experts_dora``), which PEFT does not have: the numbers are those of dense weights run by
transformers' own experts, files keep the magnitudes, and nothing computes without them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from largest import Largest
from oracle import assert_close_as_eager
from peft.tuners.lora.layer import ParamWrapper
from peft_experts import (
    IMPLEMENTATIONS,
    KINDS,
    draw,
    fused_calls,
    fused_experts,
    in_four_bits,
    moe,
    moe_base,
    parameters_of,
    run,
    scaled,
    wrappers,
)
from peft_layers import tokens
from test_peft_experts import EXPERTS_ONLY, add, dtypes, in_float64, logits, set_implementation, train
from torch import Tensor, nn

import fastpeft
import fastpeft.peft.fused_experts as fused_experts_module
from fastpeft import norm_cache
from fastpeft.peft.experts_dora import GuardedParamWrapper
from fastpeft.peft.fused_experts import FusedParamWrapper

DRAWS = 36  # for the largest of errors that differ in size as the factors do
LIKE_PEFT = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def all_wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


class _DenseWeight(nn.Module):
    """``m (W + s B A) / ‖W + s B A‖`` for each expert and row, of each adapter on the result of those before it."""

    def __init__(self, wrapper: Any, names: list[str]) -> None:
        super().__init__()
        self.inputs = 1 if wrapper.get_base_layer().is_transposed else 2  # the dimension of K
        magnitudes = [wrapper.lora_magnitude_vector[name].weight for name in names]
        deltas = [ParamWrapper.get_delta_weight(wrapper, name) for name in names]
        self.adapters = list(zip(magnitudes, deltas, strict=True))

    def forward(self, weight: Tensor) -> Tensor:
        result = weight
        for magnitude, delta in self.adapters:
            norm = (weight + delta).detach().norm(dim=self.inputs, keepdim=True)
            result = magnitude.unsqueeze(self.inputs) / norm * (result + delta)
        return result.to(weight.dtype)


class DenseWrapper(ParamWrapper):
    """PEFT's own way, with DoRA's dense weight."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        dense = _DenseWeight(self, [name for name in active_adapters if name in self.lora_A])
        nn.utils.parametrize.register_parametrization(self.get_base_layer(), self.parameter_name, dense)
        try:
            with nn.utils.parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()


def by_dense_weights(model: Any) -> Any:
    """A copy that runs its experts so."""
    dense = copy.deepcopy(model)
    for wrapper in all_wrappers(dense):
        wrapper.__class__ = DenseWrapper
    return dense


def dora(model: Any) -> Any:
    """``model`` with magnitudes that have been trained."""
    fastpeft.patch(model, experts_dora=True)
    return with_trained_magnitudes(model)


def with_trained_magnitudes(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.875 + torch.rand_like(parameter) / 4
    return model


def all_dora(base: Any = None, **config: Any) -> Any:
    """DoRA on ``q_proj``, which is PEFT's, and on experts."""
    settings = {"r": 3, "use_dora": True, "target_modules": ["q_proj"]} | LIKE_PEFT
    settings |= {"target_parameters": parameters_of("Qwen3Moe")}
    with fastpeft.enabled(experts_dora=True):
        model = peft.get_peft_model(moe_base() if base is None else base, peft.LoraConfig(**(settings | config)))
    return with_trained_magnitudes(model)


def assert_parity(model: Any, monkeypatch: pytest.MonkeyPatch, autocast: torch.dtype | None = None) -> None:
    calls = [draw() for _ in range(DRAWS)]
    with fused_calls(monkeypatch) as seen:
        actual = [run(model, call, autocast) for call in calls]
    assert len(seen) == DRAWS
    dense = by_dense_weights(model)
    oracle, eager = ([run(each, call, autocast) for call in calls] for each in (in_float64(dense), dense))
    assert [list(each) for each in actual] == [list(each) for each in eager]
    assert sum("lora_magnitude_vector" in name for name in actual[0]) >= 1
    for name in eager[0]:
        assert_close_as_eager(*([result[name] for result in each] for each in (actual, oracle, eager)), name)


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_parity(dora(moe(kind, **EXPERTS_ONLY).to(dtype)), monkeypatch)


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_over_four_bits_it_has_the_bits_of_the_dense_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = map(dora, in_four_bits(moe(kind, **EXPERTS_ONLY)))
    packed.load_state_dict({n: p for n, p in dense.state_dict().items() if "lora_" in n}, strict=False)
    call = draw()
    with fused_calls(monkeypatch) as seen:
        found, expected = run(packed, call, None), run(dense, call, None)
    assert len(seen) == 2 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(RuntimeError, match="merged into experts in 4 bits"):
        packed.merge_adapter()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_implementations(implementation: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe(**EXPERTS_ONLY)
    set_implementation(model, implementation)
    assert_parity(dora(model), monkeypatch, autocast)


@pytest.mark.parametrize("alone", [0, 1], ids=["first", "second"])
def test_one_of_both_parameters_alone(alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe("GptOss", **EXPERTS_ONLY, target_parameters=[parameters_of("GptOss")[alone]])
    assert_parity(dora(model), monkeypatch)


def test_several_adapters_of_different_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe("GptOss", **EXPERTS_ONLY, rank_pattern={"experts.down_proj": 5})
    add(model, "second", "GptOss", target_modules=[], r=2, use_rslora=True)
    model.base_model.set_adapter(["default", "second"])
    assert_parity(dora(model), monkeypatch)


def test_at_first_nothing_changes() -> None:
    for low_precision in (False, True):
        model, call = moe(**EXPERTS_ONLY), draw()
        model = model.bfloat16() if low_precision else model
        fastpeft.patch(model)
        expected = run(model, call)
        fastpeft.patch(model, experts_dora=True)
        found = run(model, call)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        magnitudes = [w.lora_magnitude_vector["default"].weight for w in all_wrappers(model)]
        assert {m.dtype for m in magnitudes} == {torch.float32} and all(m.requires_grad for m in magnitudes)
        assert model.peft_config["default"].use_dora
        fastpeft.patch(model)  # what is there stays
        assert all(torch.equal(run(model, call)[name], tensor) for name, tensor in found.items())
        assert [w.lora_magnitude_vector["default"].weight for w in all_wrappers(model)] == magnitudes


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_twenty_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe(kind, **EXPERTS_ONLY, init_lora_weights=True)
    fastpeft.patch(model, experts_dora=True)
    dense = by_dense_weights(model)
    double, batches = in_float64(dense), [tokens() for _ in range(4)] * 5
    before = [w.lora_magnitude_vector["default"].weight.clone() for w in all_wrappers(model)]
    with fused_calls(monkeypatch):
        actual = train(model, batches)
    oracle, eager = train(double, batches), train(dense, batches)
    for name in actual:
        assert_close_as_eager(actual[name].float(), oracle[name], eager[name], name)
    assert actual["losses"][-4:].mean() < actual["losses"][:4].mean()
    after = [w.lora_magnitude_vector["default"].weight for w in all_wrappers(model)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_tensor_of_the_size_of_a_stack_is_made() -> None:
    model = dora(moe(**EXPERTS_ONLY))
    smallest = min(parameter.numel() for parameter in wrappers(model)[0].get_base_layer().parameters())
    with Largest() as made:
        run(model, draw(tokens=8))
    assert made.elements < smallest


def test_the_norm_is_kept_until_something_that_it_depends_on_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call, computed = dora(moe(**EXPERTS_ONLY)), draw(), []
    own = norm_cache._norm
    monkeypatch.setattr(norm_cache, "_norm", lambda *args: computed.append(args[1].shape) or own(*args))
    for expected in (2, 2):
        run(model, call)
        assert len(computed) == expected
    wrapper = wrappers(model)[0]
    for change in (
        lambda: wrapper.lora_B["default"].weight.data.mul_(2),
        lambda: wrapper.get_param().data.mul_(2),
        lambda: wrapper.scaling.update(default=3.0),
    ):
        change()
        before = len(computed)
        run(model, call)
        assert len(computed) == before + 1
    copied = copy.deepcopy(model)
    for w in wrappers(copied):
        w.__dict__.pop("_fastpeft_norms", None)  # the second block's has not run
    assert torch.equal(run(model, call)["y"], run(copied, call)["y"])


def test_with_dropout_on_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = dora(moe(**EXPERTS_ONLY)), draw()
    expected = run(model.eval(), call)
    fastpeft.patch(model, experts_dropout=0.5)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run(model, call).items())
    seen: list[tuple[list[float], bool]] = []
    own = fused_experts_module.dora_grouped_linear

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((kwargs["dropout_p"], kwargs["training"]))
        return own(*args, **kwargs)

    monkeypatch.setattr(fused_experts_module, "dora_grouped_linear", recording)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(run(model.train(), call))
    assert seen == [([0.5], True)] * 4
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert not torch.equal(found[0]["y"], expected["y"])


def test_experts_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dora(moe("GptOss", **EXPERTS_ONLY))
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    with fused_calls(monkeypatch):
        wrapper = wrappers(model)[0]
        wrapper.forward = torch.compile(wrapper.forward, backend="aot_eager", fullgraph=True)
        call = draw()
        for actual, expected in zip(run(model, call).values(), run(eager, call).values(), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_so(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, ids = dora(moe(**EXPERTS_ONLY)), tokens()
    twin = copied(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    assert [type(w) for w in all_wrappers(twin)] == [FusedParamWrapper, GuardedParamWrapper] * 2


def test_made_by_peft_while_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own DoRA on ``q_proj`` beside it."""
    model = all_dora()
    assert fastpeft.patch(model).left_to_peft == {} and len(fused_experts(model)) == 2
    with fused_calls(monkeypatch):
        actual = logits(scaled(model), tokens())
    dense = by_dense_weights(model)
    assert_close_as_eager(actual, *(logits(each, tokens()) for each in (in_float64(dense), dense)))
    assert {w.use_dora["default"] for w in all_wrappers(model)} == {True}


def test_peft_by_itself_refuses_the_configuration() -> None:
    config = peft.LoraConfig(use_dora=True, target_modules=[], target_parameters=parameters_of("Qwen3Moe"))
    with fastpeft.enabled(experts_dora=True):
        pass
    for context in (fastpeft.enabled(), fastpeft.enabled(experts_dora=False)):
        with context, pytest.raises(ValueError, match="ParamWrapper does not work with use_dora=True"):
            peft.get_peft_model(moe_base(), config)
    fastpeft.enable(experts_dora=True)
    try:
        assert len(fused_experts(peft.get_peft_model(moe_base(), config))) == 2
    finally:
        fastpeft.disable()
    with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora=True"):
        peft.get_peft_model(moe_base(), config)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", ["patched", "made by PEFT"])
def test_saved_and_loaded(kind: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    ids = tokens()
    model = (dora(moe(**EXPERTS_ONLY)) if kind == "patched" else scaled(all_dora())).eval()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora=True"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    settings: dict[str, Any] = {"low_cpu_mem_usage": low_cpu_mem_usage}
    with fastpeft.enabled(experts_dora=True):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path, **settings)
    assert torch.equal(logits(loaded, ids), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    state = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    assert sum(name.endswith("lora_magnitude_vector") for name in state) == (4 if kind == "patched" else 6)
    for name, parameter in loaded.named_parameters():
        if ".default." in name:
            parameter.data.zero_()
    assert not peft.set_peft_model_state_dict(loaded, state).unexpected_keys
    assert torch.equal(logits(loaded, ids), expected)


def test_of_several_adapters_each_is_loaded(tmp_path: Path) -> None:
    model, ids = dora(moe(**EXPERTS_ONLY)).eval(), tokens()
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)
    with pytest.raises(ValueError, match="use_dora"):
        copy.deepcopy(model).load_adapter(tmp_path, "second")
    with fastpeft.enabled(experts_dora=True):
        model.load_adapter(tmp_path, "second")
    with_trained_magnitudes(model)
    model.load_adapter(tmp_path, "second")
    assert not torch.equal(logits(model, ids), expected)
    model.set_adapter("second")
    assert torch.equal(logits(model, ids), expected)


def test_a_file_of_a_patched_model_is_loaded_into_another_patched_model(tmp_path: Path) -> None:
    model, ids = dora(moe(**EXPERTS_ONLY)).eval(), tokens()
    model.save_pretrained(tmp_path)
    twin = peft.get_peft_model(copy.deepcopy(model).unload(), peft.LoraConfig(**_experts_only(r=3, lora_alpha=6)))
    fastpeft.patch(twin, experts_dora=True)
    state = peft.utils.save_and_load.load_peft_weights(str(tmp_path), device="cpu")
    assert not peft.set_peft_model_state_dict(twin, state).unexpected_keys
    assert torch.equal(logits(twin.eval(), ids), logits(model, ids))


def _experts_only(**config: Any) -> dict[str, Any]:
    return {"target_modules": [], "target_parameters": parameters_of("Qwen3Moe")} | LIKE_PEFT | config


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_merged_weights_are_doras(kind: str, safe_merge: bool) -> None:
    model, ids = dora(moe(kind, **EXPERTS_ONLY)).eval(), tokens()
    dense = by_dense_weights(model)
    oracle, eager = logits(in_float64(dense), ids), logits(dense, ids)
    merged = copy.deepcopy(model)
    merged.merge_adapter(safe_merge=safe_merge)
    assert_close_as_eager(logits(merged, ids), oracle, eager, "merged")
    assert set(fastpeft.patch(merged).left_to_peft.values()) == {"its adapters are merged into the base weight"}
    merged.unmerge_adapter()
    assert fastpeft.patch(merged).left_to_peft == {}
    assert_close_as_eager(logits(merged, ids), oracle, eager, "unmerged")
    merged.merge_adapter()
    with merged.disable_adapter(), dense.disable_adapter(), (double := in_float64(dense)).disable_adapter():
        base = logits(double, ids)
        assert_close_as_eager(logits(merged, ids), base, logits(dense, ids) + (eager - oracle), "unmerged by PEFT")
    unloaded = model.merge_and_unload(safe_merge=safe_merge)
    assert_close_as_eager(logits(unloaded, ids), oracle, eager, "merged and unloaded")
    assert all_wrappers(unloaded) == []


def test_several_adapters_are_not_merged() -> None:
    model = moe(**EXPERTS_ONLY)
    add(model, "second", target_modules=[], r=2)
    dora(model)
    before = [w.get_param().clone() for w in all_wrappers(model)]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="experts_dora is merged by itself"):
            merge(adapter_names=["default", "second"])
    assert all(torch.equal(w.get_param(), b) for w, b in zip(all_wrappers(model), before, strict=True))
    model.merge_adapter(adapter_names=["second"])
    with pytest.raises(RuntimeError, match=r"experts_dora is merged by itself.*\['second', 'default'\]"):
        model.merge_adapter(adapter_names=["default"])


def test_merges_that_would_not_be_doras_are_refused() -> None:
    model = dora(moe(**EXPERTS_ONLY))
    before = [w.get_param().clone() for w in all_wrappers(model)]
    for wrapper in all_wrappers(model):
        for read in (wrapper.get_delta_weight, wrapper.get_delta_factors):
            with pytest.raises(RuntimeError, match="'default' has experts_dora: PEFT would compute"):
                read("default")
    with torch.no_grad():
        wrappers(model)[0].lora_magnitude_vector["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="cannot be merged: it has a row whose norm is 0, or a magnitude"):
        wrappers(model)[0].merge()
    assert all(torch.equal(w.get_param(), b) for w, b in zip(all_wrappers(model), before, strict=True))
    with torch.no_grad():
        wrappers(model)[0].lora_magnitude_vector["default"].weight[0, 0] = 0.0
    wrappers(model)[0].merge()
    with pytest.raises(RuntimeError, match="cannot be unmerged: a magnitude is 0"):
        wrappers(model)[0].unmerge()


def test_what_peft_would_have_to_run_raises() -> None:
    model, call = dora(moe(**EXPERTS_ONLY)), draw()
    hook = wrappers(model)[0].get_base_layer().register_forward_hook(lambda *_: None)
    for mode in (True, False):
        with pytest.raises(RuntimeError, match="experts_dora cannot be: PEFT has to run a call, as its experts have a"):
            run(model.train(mode), call)
    hook.remove()
    x, index, weights, _ = call
    with pytest.raises(RuntimeError, match=r"experts_dora cannot be: .* its arguments are others"):
        wrappers(model)[0](x, top_k_index=index, top_k_weights=weights)
    with model.disable_adapter():
        base = wrappers(model)[0](x, index, weights)
    assert torch.equal(base, wrappers(model)[0].get_base_layer()(x, index, weights))
    for wrapper in all_wrappers(model):  # PEFT's own path
        with pytest.raises(RuntimeError, match="has experts_dora"):
            ParamWrapper.forward(wrapper, x, index, weights)
    run(model, call)


def test_of_several_adapters_all_are_dora_or_none() -> None:
    model = dora(moe(**EXPERTS_ONLY))
    add(model, "second", target_modules=[], r=2)
    run(model, draw())
    model.set_adapter("second")
    assert fastpeft.patch(model).left_to_peft == {}
    run(model, draw())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RuntimeError, match=r"experts_dora cannot be: .* DoRA and LoRA adapters are active together"):
        run(model, draw())
    model.set_adapter("default")
    fastpeft.patch(model, experts_dora=True)
    model.base_model.set_adapter(["default", "second"])
    run(model, draw())


def test_it_is_refused_where_it_cannot_be_before_anything_changes() -> None:
    def assert_refused(model: Any, words: str, error: type[Exception] = ValueError, **option: Any) -> None:
        with pytest.raises(error, match=words):
            fastpeft.patch(model, **({"experts_dora": True} | option))
        assert fused_experts(model) == []
        assert not any(w.lora_magnitude_vector for w in all_wrappers(model))
        assert not model.peft_config["default"].use_dora

    assert_refused(moe(**EXPERTS_ONLY), "experts_dora must be True or False", TypeError, experts_dora=1)
    assert_refused(moe(), "'default', whose .*q_proj has LoRA without DoRA: its file says use_dora of all its layers")
    dense = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    assert_refused(dense, "experts_dora must be False for a model without experts")
    hooked = moe(**EXPERTS_ONLY)
    wrappers(hooked)[1].get_base_layer().register_forward_hook(lambda *_: None)
    assert_refused(hooked, "experts_dora cannot be: PEFT has to run .*1.mlp.experts, as its experts have a hook")
    empty = moe(**EXPERTS_ONLY)
    with torch.no_grad():
        wrappers(empty)[0].get_param()[1, 2] = 0
        wrappers(empty)[0].lora_B["default"].weight.zero_()
    assert_refused(empty, "'default' has a row of .*_proj whose norm is 0")
    model = moe(**EXPERTS_ONLY)
    with pytest.raises(ValueError, match="needs the configuration of adapter 'default'"):
        fastpeft.patch(model.base_model.model.model, experts_dora=True)
    with pytest.raises(TypeError, match="experts_dora must be True or False"):
        fastpeft.enable(experts_dora="yes")


def test_other_parameters_are_refused_while_enabled() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 4, 4))

    config = peft.LoraConfig(use_dora=True, target_modules=[], target_parameters=["layer.stack"])
    with (
        fastpeft.enabled(experts_dora=True),
        pytest.raises(ValueError, match=r"experts_dora cannot be on stack: its base layer is a .*no experts of"),
    ):
        peft.get_peft_model(nn.ModuleDict({"layer": Layer()}), config)


def test_unpatched_once_no_magnitude_is_left() -> None:
    model = dora(moe(**EXPERTS_ONLY))
    with pytest.raises(ValueError, match=r"model must have no DoRA on experts .* delete them before"):
        fastpeft.unpatch(model)
    assert len(fused_experts(model)) == 2
    model.delete_adapter("default")
    fastpeft.unpatch(model)
    assert {type(w) for w in all_wrappers(model)} == {ParamWrapper}
    x, index, weights, _ = draw()
    found = wrappers(model)[0](x, index, weights)
    assert torch.equal(found, wrappers(model)[0].get_base_layer()(x, index, weights))

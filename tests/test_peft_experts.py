"""Mixtures of experts that PEFT adapts are fused, give what PEFT gives, and live as PEFT's."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import pytest
import torch
from largest import Largest
from oracle import assert_close_as_eager
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.hotswap import hotswap_adapter
from peft_experts import (
    IMPLEMENTATIONS,
    KINDS,
    Call,
    draw,
    fused_calls,
    fused_experts,
    moe,
    moe_base,
    parameters_of,
    run,
    scaled,
    wrappers,
)
from peft_layers import tokens
from torch import Tensor, nn

import fastpeft
import fastpeft.peft.fused_experts as fused_experts_module
from fastpeft.peft.fused_experts import FusedParamWrapper

DRAWS = 12
EXPERTS_ONLY = {"target_modules": []}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def set_implementation(model: Any, name: str) -> None:
    model.base_model.model.set_experts_implementation(name)


def in_float64(model: peft.PeftModel) -> peft.PeftModel:
    """A copy; torch has no grouped products in float64."""
    double = copy.deepcopy(model).double()
    set_implementation(double, "eager")
    return double


def assert_parity(
    stock: peft.PeftModel,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Call] = draw,
    autocast: torch.dtype | None = None,
    other: peft.PeftModel | None = None,
) -> None:
    """Calls of the first block's experts, forward and backward: fused, they are as close to float64 as PEFT's. It is a
    copy that is fused, or an ``other`` model that stands for the same numbers."""
    double, fused = in_float64(stock), copy.deepcopy(stock) if other is None else other
    assert fastpeft.patch(fused).left_to_peft == {}
    calls = [make() for _ in range(DRAWS)]
    with fused_calls(monkeypatch) as seen:
        actual = [run(fused, call, autocast) for call in calls]
    assert len(seen) == DRAWS
    oracle, eager = ([run(model, call, autocast) for call in calls] for model in (double, stock))
    assert [{n: t.dtype for n, t in r.items()} for r in actual] == [{n: t.dtype for n, t in r.items()} for r in eager]
    for name in eager[0]:
        assert_close_as_eager(*([result[name] for result in each] for each in (actual, oracle, eager)), name)


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_parity(moe(kind, **EXPERTS_ONLY).to(dtype), monkeypatch)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_parity_with_each_implementation(kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = moe(kind, **EXPERTS_ONLY).to(dtype)
        set_implementation(model, implementation)
        assert_parity(model, monkeypatch)


@pytest.mark.parametrize("alone", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss", "NemotronH"])
def test_one_of_both_parameters_alone(kind: str, alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe(kind, **EXPERTS_ONLY, target_parameters=[parameters_of(kind)[alone]])
    assert_parity(model, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_leaves_at_most_routers_to_peft(kind: str) -> None:
    """Newer ones of PEFT take it for the experts of some models, too, and for their routers, which have no dropout."""
    model = peft.get_peft_model(moe_base(kind), peft.LoraConfig(r=2, target_modules="all-linear"))
    report, ids = fastpeft.patch(model), tokens()
    assert report.fused and all(re.match(r"its base layer is a \S+Router, no", r) for r in report.left_to_peft.values())
    if set(report.fused) & set(fused_experts(model)):
        assert fastpeft.patch(model, experts_dropout=0.5) == report
        first, second = (model.train()(input_ids=ids).logits for _ in range(2))
        assert torch.equal(first, second)  # B is 0 still
        first.sum().backward()


def test_several_adapters_of_different_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe("GptOss", **EXPERTS_ONLY, rank_pattern={"experts.down_proj": 5})
    add(model, "second", "GptOss", target_modules=[], r=2, use_rslora=True)
    model.base_model.set_adapter(["default", "second"])
    assert_parity(model, monkeypatch)


def test_adapters_of_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT makes them for a base in a low precision: it casts them to the base's dtype in each call."""
    base = moe_base().bfloat16()
    config = peft.LoraConfig(
        r=3, init_lora_weights=False, target_parameters=parameters_of("Qwen3Moe"), target_modules=[]
    )
    model = scaled(peft.get_peft_model(base, config))
    assert wrappers(model)[0].lora_A["default"].weight.dtype == torch.float32
    assert_parity(model, monkeypatch)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``grouped_mm`` computes in the weight's dtype all the same, the others in autocast's."""
    stock = moe(**EXPERTS_ONLY)
    set_implementation(stock, implementation)
    assert_parity(stock, monkeypatch, autocast=torch.bfloat16)


def test_no_tensor_of_the_size_of_a_stack_is_made() -> None:
    stock = moe(**EXPERTS_ONLY)
    fused = copy.deepcopy(stock)
    fastpeft.patch(fused)
    smallest = min(parameter.numel() for parameter in wrappers(stock)[0].get_base_layer().parameters())
    by_peft, by_us = Largest(), Largest()
    for model, made in ((stock, by_peft), (fused, by_us)):
        with made:
            run(model, draw(tokens=8))
    assert by_us.elements < smallest <= by_peft.elements


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_a_whole_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients through the router and, where a model has them, beside shared experts."""
    assert_trains_as_peft(moe(kind), 1, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = assert_trains_as_peft(moe(kind, init_lora_weights=True), 20, monkeypatch)
    assert losses[-4:].mean() < losses[:4].mean()


def assert_trains_as_peft(
    stock: peft.PeftModel, steps: int, monkeypatch: pytest.MonkeyPatch, other: peft.PeftModel | None = None
) -> Tensor:
    """The losses, and the last step's gradients."""
    double, fused = in_float64(stock), copy.deepcopy(stock) if other is None else other
    assert fastpeft.patch(fused).left_to_peft == {}
    assert len(fused_experts(fused)) == len(wrappers(stock))
    batches = ([tokens() for _ in range(4)] * 5)[:steps]
    with fused_calls(monkeypatch) as seen:
        actual = train(fused, batches)
    assert len(seen) == steps * len(wrappers(stock))
    oracle, eager = train(double, batches), train(stock, batches)
    for name in actual:
        assert_close_as_eager(actual[name].float(), oracle[name], eager[name], name)
    return actual["losses"]


def train(model: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    """The loss of each step, in float64 whatever the model's dtype, as transformers' own is float32 at most; and the
    gradients of the last. With AdamW's own ``eps`` an element whose gradient is nothing but rounding would take steps
    as long as any other's, and after some of them a single one would decide how two errors compare."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, eps=1e-3)
    losses = []
    for ids in batches:
        optimizer.zero_grad()
        predicted = model(input_ids=ids).logits[:, :-1].double()
        loss = nn.functional.cross_entropy(predicted.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.detach())
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return {"losses": torch.stack(losses), "the last step's gradients": gradients}


def steps_of_life(model: peft.PeftModel, ids: Tensor, folder: Path) -> list[Tensor]:
    """The logits after each change that PEFT's users make to a model."""
    seen = []

    def look() -> None:
        seen.append(logits(model, ids))

    look()
    model.merge_adapter()
    look()
    model.unmerge_adapter()
    look()
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        look()
    look()
    add(model, "second", r=2)
    model.set_adapter("second")
    look()
    model.base_model.set_adapter(["default", "second"])
    look()
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        look()
    model.delete_adapter("default")
    model.set_adapter("second")
    look()
    model.save_pretrained(folder)
    state = {name: 1.5 * value for name, value in peft.get_peft_model_state_dict(model, adapter_name="second").items()}
    peft.set_peft_model_state_dict(model, state, adapter_name="second")
    look()
    hotswap_adapter(model, str(folder / "second"), adapter_name="second", torch_device="cpu")
    look()
    return seen


def add(model: Any, name: str, kind: str = "Qwen3Moe", **config: Any) -> None:
    """Another adapter of the same parameters, as random as the first."""
    settings = {"init_lora_weights": False, "target_modules": ["q_proj"], "target_parameters": parameters_of(kind)}
    model.add_adapter(name, peft.LoraConfig(**(settings | config)))


def test_life_of_adapters(tmp_path: Path) -> None:
    stock, ids = moe().eval(), tokens()
    double, fused = in_float64(stock), copy.deepcopy(stock)
    assert fastpeft.patch(fused).left_to_peft == {}
    results = []
    for i, model in enumerate((fused, double, stock)):
        torch.manual_seed(0)
        results.append(steps_of_life(model, ids, tmp_path / str(i)))
    assert len(fused_experts(fused)) == 2 and fastpeft.patch(fused).left_to_peft == {}
    for step, (a, o, e) in enumerate(zip(*results, strict=True)):
        assert_close_as_eager(a, o, e, f"step {step}")
    assert [list(model.state_dict()) for model in (fused, double)] == [list(stock.state_dict())] * 2
    merged = [model.merge_and_unload() for model in (fused, double, stock)]
    assert_close_as_eager(*(logits(model, ids) for model in merged), "merged")
    assert not any(isinstance(module, ParamWrapper) for module in merged[0].modules())


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_saved_by_one_and_loaded_by_the_other(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ids = moe(kind).eval(), tokens()
    fused = copy.deepcopy(stock)
    keys = list(fused.state_dict())
    fastpeft.patch(fused)
    assert list(fused.state_dict()) == keys
    for saved, name in ((stock, "stock"), (fused, "fused")):
        saved.save_pretrained(tmp_path / name)
    bases = [copy.deepcopy(stock).unload() for _ in range(2)]
    with fastpeft.enabled(), fused_calls(monkeypatch) as seen:
        loaded = peft.PeftModel.from_pretrained(bases[0], tmp_path / "stock")
        assert torch.equal(logits(loaded, ids), logits(fused, ids))
    assert len(seen) == 4
    loaded = peft.PeftModel.from_pretrained(bases[1], tmp_path / "fused")
    assert fused_experts(loaded) == []
    assert torch.equal(logits(loaded, ids), logits(stock, ids))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_fused(copied: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = moe(), tokens()
    fastpeft.patch(model, backend="reference")
    twin = copied(model)
    assert fused_experts(twin) == fused_experts(model) != []
    with fused_calls(monkeypatch) as seen:
        assert torch.equal(logits(twin, ids), logits(model, ids))
    assert len(seen) == 4
    assert {wrapper.fastpeft_backend for wrapper in wrappers(twin)} == {"reference"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = moe(), tokens()
    model.enable_input_require_grads()
    fastpeft.patch(model)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train().zero_grad()
        with fused_calls(monkeypatch) as seen:
            model(input_ids=ids, labels=ids).loss.backward()
        assert len(seen) == 2 + 2 * checkpointing
        results.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_experts_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe("GptOss", **EXPERTS_ONLY)
    fastpeft.patch(model)
    eager, compiled = copy.deepcopy(model), model
    torch.compiler.reset()
    with fused_calls(monkeypatch):
        wrapper = wrappers(compiled)[0]
        wrapper.forward = torch.compile(wrapper.forward, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            call = draw()
            for actual, expected in zip(run(compiled, call).values(), run(eager, call).values(), strict=True):
                torch.testing.assert_close(actual, expected)


def test_patched_and_unpatched() -> None:
    model = moe()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    report = fastpeft.patch(model)
    assert report == fastpeft.patch(model) and str(report) == "fused: 4, left to PEFT: 0"
    assert fused_experts(model) == [name for name in report.fused if name.endswith(".experts")]
    assert "runs down_proj and gate_up_proj" not in str(fastpeft.explain(model))
    assert "runs gate_up_proj and down_proj of 4 experts" in str(fastpeft.explain(model))
    assert "fused by fastpeft" in repr(wrappers(model)[0])
    fastpeft.unpatch(model)
    assert {type(module) for module in model.modules() if isinstance(module, ParamWrapper)} == {ParamWrapper}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_wrappers_made_while_fastpeft_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT makes the inner one first; the outermost alone is fused."""
    with fastpeft.enabled():
        model = moe()
        assert len(fused_experts(model)) == 2
        add(model, "second", r=2)
        model.base_model.set_adapter(["default", "second"])
    assert {type(wrapper) for wrapper in wrappers(model)} == {FusedParamWrapper}
    assert {type(wrapper.base_layer) for wrapper in wrappers(model)} == {ParamWrapper}
    with fused_calls(monkeypatch) as seen:
        logits(model, tokens())
    assert len(seen) == 2


def test_a_backend_that_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise fastpeft.BackendRefusal("not today")

    model = moe(**EXPERTS_ONLY)
    monkeypatch.setattr("fastpeft.peft.experts.lora_grouped_linear", refuse)
    with pytest.raises(fastpeft.BackendRefusal, match=r"backend='cpu' cannot run .*experts: not today"):
        fastpeft.patch(model, backend="cpu")
    assert fused_experts(model) == []


def test_dropout_on_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT has none there. With the masks that were drawn, put into the place of dropout, it is LoRA's formula."""
    model, call = moe(**EXPERTS_ONLY), draw()
    fastpeft.patch(model)
    expected = run(model.eval(), call)
    fastpeft.patch(model, experts_dropout=0.5)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run(model, call).items())
    torch.manual_seed(1)
    first, second = run(model.train(), call), run(model, call)
    assert not torch.equal(first["y"], second["y"])
    torch.manual_seed(1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in run(model, call).items())
    seen: list[tuple[list[float], bool]] = []
    own = fused_experts_module.lora_grouped_linear

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((kwargs["dropout_p"], kwargs["training"]))
        return own(*args, **kwargs)

    monkeypatch.setattr(fused_experts_module, "lora_grouped_linear", recording)
    run(model, call)
    assert seen == [([0.5], True)] * 2
    with model.disable_adapter():  # nothing is dropped there: PEFT's
        run_base = wrappers(model)[0](*call[:3])
    assert run_base.isfinite().all()
    fastpeft.unpatch(model)
    fastpeft.patch(model)
    assert torch.equal(run(model, call)["y"], run(model, call)["y"])


def test_dropout_on_experts_is_refused_where_it_cannot_be() -> None:
    model = moe(**EXPERTS_ONLY)
    for wrong, error in ((1.0, ValueError), (-0.1, ValueError), ("half", TypeError)):
        with pytest.raises(error, match="experts_dropout"):
            fastpeft.patch(model, experts_dropout=wrong)
    dense = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="without experts"):
        fastpeft.patch(dense, experts_dropout=0.1)
    fastpeft.patch(model, experts_dropout=0.1)
    wrappers(model)[0].get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="its experts have a hook"):
        wrappers(model.train())[0](*draw()[:3])
    wrappers(model.eval())[0](*draw()[:3])

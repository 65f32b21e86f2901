"""Experts that bitsandbytes has packed into 4 bits, with PEFT's LoRA on them, which PEFT itself cannot run: fused, they
give what PEFT gives over the dense weights that the bits stand for."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from largest import Largest
from peft_experts import (
    IMPLEMENTATIONS,
    KINDS,
    draw,
    experts_of,
    fused_calls,
    fused_experts,
    in_four_bits,
    moe,
    moe_base,
    parameters_of,
    run,
    wrappers,
)
from peft_layers import tokens
from test_peft_experts import (
    EXPERTS_ONLY,
    assert_parity,
    assert_trains_as_peft,
    dtypes,
    logits,
    seeded,
    set_implementation,
    train,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastpeft

__all__ = ["seeded"]  # a fixture
GATED = [kind for kind in KINDS if kind != "NemotronH"]


@dtypes
@pytest.mark.parametrize("kind", GATED)
def test_parity(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = in_four_bits(moe(kind, **EXPERTS_ONLY).to(dtype))
    assert_parity(dense, monkeypatch, other=packed)


def test_parity_without_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = in_four_bits(moe("NemotronH", **EXPERTS_ONLY), ["up_proj", "down_proj"])
    assert_parity(dense, monkeypatch, other=packed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_parity_with_each_implementation_and_format(
    kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moe(kind, **EXPERTS_ONLY).bfloat16()
    set_implementation(model, implementation)
    for settings in ({}, {"quant_type": "fp4", "blocksize": 128, "compress_statistics": True}):
        packed, dense = in_four_bits(model, **settings)
        assert_parity(dense, monkeypatch, other=packed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = in_four_bits(moe(**EXPERTS_ONLY))
    for model in (packed, dense):
        set_implementation(model, implementation)
    assert_parity(dense, monkeypatch, autocast=torch.bfloat16, other=packed)


@pytest.mark.parametrize("adapted", [0, 1, None], ids=["first", "second", "both"])
@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_one_of_both_adapted_or_packed(
    kind: str, parameters: list[str], adapted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = parameters_of(kind) if adapted is None else [parameters_of(kind)[adapted]]
    packed, dense = in_four_bits(moe(kind, **EXPERTS_ONLY, target_parameters=targets), parameters)
    assert_parity(dense, monkeypatch, other=packed)


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = in_four_bits(moe(init_lora_weights=True))
    losses = assert_trains_as_peft(dense, 20, monkeypatch, packed)
    assert losses[-4:].mean() < losses[:4].mean()


def test_a_model_loaded_in_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers packs the linear layers and leaves the experts; PEFT turns all that is not packed into float32."""
    moe_base().bfloat16().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.bfloat16)
    assert {type(p) for module in experts_of(base) for p in module.parameters()} == {nn.Parameter}
    targets = packed_in_place(base)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), config).train()
    report = fastpeft.patch(model)
    assert len(report.fused) == 4 and report.left_to_peft == {}
    with fused_calls(monkeypatch):
        losses = train(model, [tokens()] * 6)["losses"]
    assert losses.diff().max() < 0


def packed_in_place(base: nn.Module) -> list[str]:
    """The whole names of the experts' parameters, which bitsandbytes packs."""
    names = [name for name, module in base.named_modules() if module in experts_of(base)]
    for name in names:
        for parameter in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(base.get_submodule(name), parameter, compress_statistics=True)
    return [f"{name}.{parameter}" for name in names for parameter in ("gate_up_proj", "down_proj")]


def test_nothing_dense_is_made() -> None:
    packed, _ = in_four_bits(moe(**EXPERTS_ONLY))
    fastpeft.patch(packed)
    x, index, weights, dy = draw(tokens=8)
    with Largest() as largest:
        wrappers(packed)[0](x, index, weights).backward(dy)
    assert 0 < largest.elements < 4 * 24 * 32  # of down_proj


def test_peft_itself_cannot_train_them() -> None:
    """It leaves the inner wrapper's adapters out of the first call, and raises in the second."""
    packed, dense = in_four_bits(moe(**EXPERTS_ONLY))
    call, expected = draw(), run(dense, draw())
    try:
        found = [run(packed, call) for _ in range(2)]
    except RuntimeError:
        return
    assert any(result.keys() != expected.keys() for result in found)


def test_experts_that_are_packed_before_their_adapters_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT then finds them by their whole names alone."""
    base = moe_base()
    config = peft.LoraConfig(r=3, init_lora_weights=False, target_modules=[], target_parameters=packed_in_place(base))
    model = peft.get_peft_model(base, config)
    assert len(fastpeft.patch(model).fused) == len(fused_experts(model)) == 2
    with fused_calls(monkeypatch) as seen:
        found = run(model, draw())
    assert len(seen) == 1 and len(found) == 3 + 4


def test_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = in_four_bits(moe("GptOss", **EXPERTS_ONLY))
    fastpeft.patch(model)
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    with fused_calls(monkeypatch):
        wrapper = wrappers(model)[0]
        wrapper.forward = torch.compile(wrapper.forward, backend="aot_eager", fullgraph=True)
        call = draw()
        for actual, expected in zip(run(model, call).values(), run(eager, call).values(), strict=True):
            torch.testing.assert_close(actual, expected)


def test_adapters_that_were_trained_on_them_are_pefts(tmp_path: Path) -> None:
    packed, dense = in_four_bits(moe())
    fastpeft.patch(packed)
    ids = tokens()
    packed(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in packed.parameters() if p.requires_grad], lr=0.1).step()
    packed.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(dense.unload(), tmp_path)
    expected = {name: p for name, p in packed.named_parameters() if "lora_" in name}
    found = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert found.keys() == expected.keys() and all(torch.equal(p, expected[name]) for name, p in found.items())
    torch.testing.assert_close(logits(loaded, ids), logits(packed, ids))


def test_a_merge_is_refused_before_anything_is_changed() -> None:
    packed, _ = in_four_bits(moe(**EXPERTS_ONLY))
    fastpeft.patch(packed)
    call = draw()
    before = run(packed, call)
    for merge in (packed.merge_adapter, packed.merge_and_unload):
        with pytest.raises(RuntimeError, match="LoRA is neither merged into experts in 4 bits nor taken out"):
            merge()
    assert all(torch.equal(result, before[name]) for name, result in run(packed, call).items())


def test_what_was_merged_before_is_not_taken_out() -> None:
    model = moe(**EXPERTS_ONLY)
    model.merge_adapter()
    packed, _ = in_four_bits(model)
    assert set(fastpeft.patch(packed).left_to_peft.values()) == {"its adapters are merged into the base weight"}
    call = draw()[:3]
    assert torch.equal(wrappers(packed)[0](*call), experts_of(packed)[0](*call))
    with pytest.raises(RuntimeError, match="LoRA is neither merged into experts in 4 bits nor taken out"):
        packed.unmerge_adapter()


def test_without_adapters_they_are_transformers() -> None:
    packed, _ = in_four_bits(moe(**EXPERTS_ONLY))
    fastpeft.patch(packed)
    call = draw()[:3]
    expected, adapted = experts_of(packed)[0](*call), wrappers(packed)[0](*call)
    with packed.disable_adapter():
        assert torch.equal(wrappers(packed)[0](*call), expected) and not torch.allclose(adapted, expected)


def hook(wrapper: Any) -> None:
    experts_of(wrapper)[0].register_forward_hook(lambda *args: None)


def forward_of_the_class(wrapper: Any) -> None:
    experts = experts_of(wrapper)[0]
    type(experts).forward = lambda self, *call: call[0]


def second_parametrization(wrapper: Any) -> None:
    nn.utils.parametrize.register_parametrization(experts_of(wrapper)[0], "down_proj", nn.Identity())


def hooked_parametrization(wrapper: Any) -> None:
    experts_of(wrapper)[0].parametrizations.down_proj[0].register_forward_hook(lambda *args: None)


def repacked(wrapper: Any) -> None:
    experts_of(wrapper)[0].parametrizations.down_proj[0].quant_state.packing_format_for_cpu = True


def flat(wrapper: Any) -> None:
    state = experts_of(wrapper)[0].parametrizations.down_proj[0].quant_state
    state.shape = torch.Size((4 * state.shape[1], state.shape[2]))


STATES: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook": (hook, "its experts have a hook or a forward of their own"),
    "forward": (forward_of_the_class, "its experts have a hook or a forward of their own"),
    "another": (second_parametrization, "its experts' down_proj is no Parameter: it is parametrized"),
    "hooked": (hooked_parametrization, "its experts' down_proj is no Parameter: it is parametrized"),
    "repacked": (repacked, "its experts' down_proj in 4 bits cannot be read: weight was repacked in place"),
    "flat": (flat, r"its experts' down_proj in 4 bits cannot be read: their shape is \(128, 24\), of no stack"),
}


@pytest.mark.parametrize("state", STATES)
def test_what_cannot_be_fused_raises_and_says_why(state: str) -> None:
    prepare, reason = STATES[state]
    packed, _ = in_four_bits(moe(**EXPERTS_ONLY))
    for wrapper in wrappers(packed):
        prepare(wrapper)
    report = fastpeft.patch(packed)
    assert report.fused == [] and all(re.match(reason, stated) for stated in report.left_to_peft.values())
    with pytest.raises(RuntimeError, match=f"PEFT cannot run LoRA on experts in 4 bits, .*, as {reason}"):
        wrappers(packed)[0](*draw()[:3])


def test_a_backend_that_refuses_is_named() -> None:
    for targets in (parameters_of("Qwen3Moe"), ["experts.down_proj"]):
        packed, _ = in_four_bits(moe(**EXPERTS_ONLY, target_parameters=targets), ["gate_up_proj"])
        with pytest.raises(fastpeft.BackendRefusal, match=r"'cuda' cannot run .*experts"):
            fastpeft.patch(packed, backend="cuda")
        assert fused_experts(packed) == []
        fastpeft.patch(packed, backend="reference")
        assert "reference, asked for by name, runs gate_up_proj and down_proj of 4" in str(fastpeft.explain(packed))


def test_a_call_with_other_arguments_raises() -> None:
    packed, _ = in_four_bits(moe(**EXPERTS_ONLY))
    fastpeft.patch(packed)
    x, index, weights, _ = draw()
    with pytest.raises(RuntimeError, match="experts in 4 bits, and has to run a call, as its arguments are others"):
        wrappers(packed)[0](x, top_k_index=index, top_k_weights=weights)

"""``fastpeft.explain`` says which backend a layer runs on, why the others do not, or why PEFT runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft_layers import layer_of, lora_model, tiny_llama
from torch import nn

import fastpeft
from fastpeft import dispatch
from fastpeft.call import Adapters, Weight
from fastpeft.nn import DoRALinear, LoRALinear


def expected_verdict(weight: torch.Tensor, dora: bool = False) -> str:
    """Put together from what the backends themselves answer for this weight."""
    one = torch.empty(1, weight.shape[1], dtype=weight.dtype)
    A, B = torch.empty(2, weight.shape[1]), torch.empty(weight.shape[0], 2)
    reasons = dispatch.refusals(one, weight, [A, B])
    chosen = next(name for name, reason in reasons.items() if reason is None)
    words = {
        name: f"refuses: {why}" if why else "comes later in the order of preference" for name, why in reasons.items()
    }
    text = f"{chosen} runs it; " + "; ".join(f"{name} {word}" for name, word in words.items() if name != chosen)
    adapters = Adapters([A], [B], [weight[:, 0]] * dora, [1.0], [0.0])
    how = dispatch.named(chosen).describe(Weight.of(weight), adapters, weight.dtype)
    return f"{text}; {how}" if how else text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_layer_without_peft(kind: type[LoRALinear], dtype: torch.dtype) -> None:
    layer = kind.from_linear(nn.Linear(8, 12, dtype=dtype), r=2)
    explanation = fastpeft.explain(layer)
    expected = expected_verdict(layer.weight, kind is DoRALinear)
    assert explanation.verdicts == {kind.__name__: expected}
    assert str(explanation) == f"1 × {expected}\n    {kind.__name__}"


def test_the_cpus_refuses_float64_and_reference_takes_it() -> None:
    layer = LoRALinear.from_linear(nn.Linear(8, 12, dtype=torch.float64), r=2)
    assert str(fastpeft.explain(layer)).startswith("1 × reference runs it; cpu refuses: ")


def test_backend_asked_for_by_name() -> None:
    layer = LoRALinear.from_linear(nn.Linear(8, 12, dtype=torch.float64), r=2, backend="cpu")
    assert fastpeft.explain(layer).verdicts["LoRALinear"].startswith("cpu: asked for by name, and raises: ")
    layer.backend = "reference"
    assert fastpeft.explain(layer).verdicts["LoRALinear"] == "reference: asked for by name"


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_model_is_grouped(use_dora: bool) -> None:
    model = tiny_llama(use_dora=use_dora)
    fastpeft.patch(model)
    first = next(name for name in fastpeft.explain(model).verdicts if name.endswith("0.self_attn.q_proj"))
    model.get_submodule(first).merge()
    explanation = fastpeft.explain(model)
    assert len(explanation.verdicts) == 6
    weight = model.get_submodule(first).base_layer.weight
    others = [name for name in explanation.verdicts if name != first]
    assert str(explanation).splitlines() == [
        "1 × PEFT: its adapters are merged into the base weight",
        f"    {first}",
        f"5 × {expected_verdict(weight, use_dora)}",
        f"    {', '.join(others[:3])} and 2 more",
    ]


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_model_that_is_not_patched(use_dora: bool) -> None:
    model = lora_model(nn.Linear(8, 12), use_dora=use_dora)
    assert fastpeft.explain(model).verdicts == {
        "base_model.model.0": "PEFT: the layer is not patched; fastpeft.patch(model) would fuse it"
    }
    fastpeft.patch(model)
    layer = layer_of(model)
    assert fastpeft.explain(layer).verdicts == {"FusedLinear": expected_verdict(layer.base_layer.weight, use_dora)}


def test_autocast_decides_the_dtype() -> None:
    layer = LoRALinear.from_linear(nn.Linear(8, 12), r=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fastpeft.explain(layer).verdicts["LoRALinear"]
    assert inside == expected_verdict(layer.weight.bfloat16())


def test_nothing_to_explain() -> None:
    with pytest.raises(ValueError, match=r"layer_or_model must be or hold .*, got a Linear without any"):
        fastpeft.explain(nn.Linear(2, 2))


def test_does_not_import_peft() -> None:
    code = """
import sys, torch, fastpeft
print(fastpeft.explain(fastpeft.nn.LoRALinear.from_linear(torch.nn.Linear(8, 12), r=2)))
assert "peft" not in sys.modules and "transformers" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 × ")

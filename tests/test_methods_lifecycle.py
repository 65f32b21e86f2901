"""The handle on a method: on and off, merged, removed, saved and loaded, copied and pickled with its model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from methods_models import CONFIGS, MODELS, applied_to, logits, randomize, tiny_bert, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from fastpeft.methods import METHODS, Applied, BitFit, Houlsby, LoReFT, Pfeiffer, apply, load

every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{CONFIGS.index(config)}")
PAIRS = list(zip(cycle(MODELS), CONFIGS))  # each method on one of the models
every_pair = pytest.mark.parametrize(("kind", "config"), PAIRS, ids=[f"{kind}-{method.name}" for kind, method in PAIRS])


@every_pair
def test_disabled_it_computes_what_the_model_did(kind: str, config: Any) -> None:
    base, model, applied = applied_to(kind, config)
    own, changed = logits(base), logits(model)
    names = [name for name, _ in applied.named_parameters()]
    values = [id(parameter) for parameter in applied.parameters()]
    assert not torch.equal(own, changed)
    with applied.disabled():
        assert torch.equal(logits(model), own)
        with applied.disabled():
            pass
        assert torch.equal(logits(model), own)
        assert [name for name, _ in applied.named_parameters()] == names
        assert [id(parameter) for parameter in applied.parameters()] == values
    assert torch.equal(logits(model), changed)
    applied.disable()
    applied.disable()
    assert torch.equal(logits(model), own)
    applied.enable()
    assert torch.equal(logits(model), changed)
    with pytest.raises(KeyError), applied.disabled():
        raise KeyError
    assert torch.equal(logits(model), changed)


@every_config
def test_a_disabled_pass_leaves_a_waiting_backward_as_it_was(config: Any) -> None:
    """As in training with the own model as the reference, which lies between forward and backward."""
    _, model, applied = applied_to("bert", config)
    logits(model).sum().backward()
    expected = [parameter.grad for parameter in applied.parameters()]
    model.zero_grad()
    y = logits(model)
    with applied.disabled():
        logits(model)
    y.sum().backward()
    for parameter, grad in zip(applied.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


@every_pair
@pytest.mark.parametrize("enabled", [True, False])
def test_removed_it_leaves_the_model_as_it_was(kind: str, config: Any, enabled: bool) -> None:
    model = MODELS[kind]().eval()
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    attributes = vars(model).keys()
    applied = apply(model, config)
    assert list(state) == [name for name in model.state_dict() if "adapter" not in name and "loreft" not in name]
    randomize(applied)
    if not enabled:
        applied.disable()
    applied.remove()
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(logits(model), before)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == own
    assert not embedding.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert vars(model).keys() == attributes
    for call in (applied.enable, applied.remove, applied.merge, lambda: applied.save("nowhere")):
        with pytest.raises((RuntimeError, ValueError), match=r"was removed: this handle is of no|cannot be merged"):
            call()


def test_bitfit_merges() -> None:
    base, model, applied = applied_to("bert", BitFit())
    changed = logits(model)
    applied.disable()
    applied.merge()
    assert torch.equal(logits(model), changed)
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="bitfit was merged: this handle is of no more use"):
        applied.disable()
    apply(model, Houlsby())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Houlsby(), "houlsby cannot be merged: a bottleneck is not linear"),
        (Pfeiffer(), "pfeiffer cannot be merged: a bottleneck is not linear"),
        (LoReFT(), "loreft cannot be merged: it edits a block's output after the residual sum"),
    ],
)
def test_others_say_why_they_cannot_be_merged(config: Any, reason: str) -> None:
    applied = apply(tiny_bert(), config)
    with pytest.raises(ValueError, match=reason):
        applied.merge()
    applied.remove()


@every_pair
def test_saved_and_loaded_it_computes_the_same_bits(kind: str, config: Any, tmp_path: Path) -> None:
    base, model, applied = applied_to(kind, config)
    with applied.disabled():
        applied.save(tmp_path / "new" / "folder")
    again = load(base, tmp_path / "new" / "folder")
    assert again.config == config
    assert torch.equal(logits(base), logits(model))
    names = {name for name, _ in applied.named_parameters()}
    assert load_file(tmp_path / "new" / "folder" / "method.safetensors").keys() == names
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["method.json", "method.safetensors"]
    randomize(applied)
    applied.save(tmp_path / "new" / "folder")  # in the place of the old one
    again.remove()
    load(base, tmp_path / "new" / "folder")
    assert torch.equal(logits(base), logits(model))


def test_a_stop_while_saving_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, applied = applied_to("bert", Pfeiffer(2))
    applied.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomize(applied)

    def stop(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        applied.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def saved(folder: Path) -> Path:
    apply(tiny_bert(), Pfeiffer(2)).save(folder)
    return folder


def assert_refused(folder: Path, error: type[Exception], message: str, model: nn.Module | None = None) -> None:
    model = model or tiny_bert()
    names = list(model.state_dict())
    with pytest.raises(error, match=message):
        load(model, folder)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", FileNotFoundError, "none holds no method.json: no method was saved there")
    (saved(tmp_path) / "method.safetensors").unlink()
    assert_refused(tmp_path, FileNotFoundError, "holds no method.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "method.json is no JSON"),
        ("[]", "method.json must name a method, one of houlsby, pfeiffer, bitfit, loreft, got None"),
        ('{"method": "lora"}', "must name a method, one of houlsby, pfeiffer, bitfit, loreft, got 'lora'"),
        ('{"method": ["lora"]}', r"must name a method, one of houlsby, pfeiffer, bitfit, loreft, got \['lora'\]"),
        ('{"method": "houlsby", "rank": 3}', "does not hold the settings of houlsby: .*rank"),
        ('{"method": "houlsby", "bottleneck": 0}', "settings of houlsby: bottleneck must be at least 1, got 0"),
    ],
)
def test_broken_settings_are_named(text: str, message: str, tmp_path: Path) -> None:
    (saved(tmp_path) / "method.json").write_text(text)
    assert_refused(tmp_path, ValueError, message)


def test_broken_parameters_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path) / "method.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused(tmp_path, ValueError, "method.safetensors cannot be read")
    first, second, *_ = sorted(tensors)
    save_file({name: value for name, value in tensors.items() if name not in (first, second)}, path)
    assert_refused(tmp_path, ValueError, f"does not fit this model: it lacks parameter {first}, and 1 more")
    save_file(tensors | {"more": torch.zeros(1)}, path)
    assert_refused(tmp_path, ValueError, "does not fit this model: it has a foreign parameter more$")
    save_file(tensors | {first: torch.zeros(1, 2)}, path)
    assert_refused(tmp_path, ValueError, rf"{first} must have shape \[16, 2\]|{first} must have shape .*, got \[1, 2\]")


def test_the_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    assert_refused(saved(tmp_path), ValueError, "it lacks parameter model.layers.0", tiny_llama())


def test_the_snippet_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/methods.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    exec(compile(snippet, "methods.md", "exec"), {"torch": torch, "model": tiny_bert()})
    assert (tmp_path / "runs/houlsby/method.safetensors").is_file()


def test_settings_survive_json() -> None:
    for config in (*CONFIGS, BitFit(names=("query", "key"), layers=[1, 0], modules_to_save=["pooler"])):
        settings = json.loads(json.dumps(vars(config)))
        assert METHODS[config.name](**settings) == config


@every_pair
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_clone_is_a_model_of_its_own(kind: str, config: Any, clone: Any) -> None:
    _, model, applied = applied_to(kind, config)
    expected = logits(model)
    twin = clone(model)
    randomize(applied)  # nothing that the clone shows
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(model), expected)
    names = {name for name, parameter in twin.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in applied.named_parameters()}
    with pytest.raises(ValueError, match="is on the model already"):
        apply(twin, config)


@every_config
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_clone_with_its_handle(config: Any, clone: Any) -> None:
    base, model, applied = applied_to("bert", config)
    changed = logits(model)
    twin, handle = clone((model, applied))
    assert isinstance(handle, Applied)
    with handle.disabled():
        assert torch.equal(logits(twin), logits(base))
        assert torch.equal(logits(model), changed)
    handle.remove()
    assert torch.equal(logits(twin), logits(base))
    assert torch.equal(logits(model), changed)


def test_the_models_own_parameters_move_along() -> None:
    """Those that are outside of the model while the method is on it."""
    _, model, applied = applied_to("bert", BitFit())
    model.to(torch.bfloat16)
    applied.disable()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    applied.remove()
    assert logits(model).dtype == torch.bfloat16


def test_a_parameter_in_two_places_stays_one() -> None:
    model = tiny_bert()
    layers = model.bert.encoder.layer
    layers[1].output.dense.bias = layers[0].output.dense.bias
    applied = apply(model, BitFit(names=["output.dense"], modules_to_save=()))
    assert layers[1].output.dense.bias is layers[0].output.dense.bias
    assert sum("layer.0.output" in name or "layer.1.output" in name for name, _ in applied.named_parameters()) == 1
    applied.disable()
    assert layers[1].output.dense.bias is layers[0].output.dense.bias

"""What the methods beside PEFT's compute, against their formulas in plain PyTorch; what they train; their settings."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from methods_models import (
    ACTIVATIONS,
    BLOCKS,
    CONFIGS,
    IDS,
    MASK,
    MODELS,
    SHAPE,
    WIDTH,
    applied_to,
    computed,
    logits,
    orthonormal,
    plain,
    plain_bottleneck,
    randomize,
    tiny_bert,
    tiny_llama,
)
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

from fastpeft.experiments.four_bit import to_four_bit
from fastpeft.judge import allowed_error
from fastpeft.methods import METHODS, BitFit, Houlsby, LoReFT, Pfeiffer, apply
from fastpeft.methods.bottleneck import INIT_STD, Bottleneck
from fastpeft.methods.loreft import Edit

every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{CONFIGS.index(config)}")
every_model = pytest.mark.parametrize("kind", MODELS)


@every_model
@every_config
def test_a_model_computes_the_formula(kind: str, config: Any) -> None:
    """In float64: 1e-9 is far above what rounding makes of it, and far below what another formula does."""
    base, model, applied = applied_to(kind, config, torch.float64)
    values = dict(applied.named_parameters())
    assert {value.dtype for value in values.values()} == {torch.float64}
    found, true = computed(model, values), plain(base, kind, config, values)
    assert not torch.equal(true["logits"], logits(base))
    assert found.keys() == true.keys()
    for name, truth in true.items():
        torch.testing.assert_close(found[name], truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bottleneck_rounds_as_the_plain_formula_does(activation: str, dtype: torch.dtype) -> None:
    module = Bottleneck(48, 8, activation, beside=nn.Linear(2, 48)).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert_rounds_as(module, lambda h, p: plain_bottleneck(h, p, activation), dtype)


def test_an_edit_rounds_as_the_plain_formula_does() -> None:
    module = Edit(48, 4, None, beside=nn.Linear(2, 48))
    for parameter in module.parameters():
        nn.init.normal_(parameter)

    def formula(h: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        R = orthonormal(p["basis"])
        return h + (h @ p["source.weight"].T + p["source.bias"] - h @ R.T) @ R

    assert_rounds_as(module, formula, torch.float32)


def assert_rounds_as(module: nn.Module, formula: Any, dtype: torch.dtype) -> None:
    """Output and gradients, as one vector, against those of ``formula`` in float64 and in the same dtype."""
    h, dy = torch.randn(3, 20, 48).to(dtype), torch.randn(3, 20, 48).to(dtype)

    def results(function: Any, dtype: torch.dtype) -> torch.Tensor:
        x = h.to(dtype).requires_grad_()
        p = {name: value.detach().to(dtype).requires_grad_() for name, value in module.named_parameters()}
        y = function(x, p)
        grads = torch.autograd.grad(y, [x, *p.values()], dy.to(dtype))
        return torch.cat([result.detach().double().flatten() for result in (y, *grads)])

    found = results(lambda x, p: torch.func.functional_call(module, p, (x,)), dtype)
    eager, true = results(formula, dtype), results(formula, torch.float64)
    error, eager_error = ((result - true).norm().item() for result in (found, eager))
    assert error <= allowed_error(eager_error, true.norm().item(), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_has_the_derivative_of_its_formula(activation: str) -> None:
    module = Bottleneck(6, 3, activation, beside=nn.Linear(2, 6).double())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def function(h: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (h,))

    assert torch.autograd.gradcheck(function, (h, *module.parameters()))
    expected = plain_bottleneck(h, dict(module.named_parameters()), activation)
    torch.testing.assert_close(module(h), expected, rtol=1e-12, atol=1e-12)


def test_edit_has_the_derivative_of_its_formula() -> None:
    module = Edit(6, 3, None, beside=nn.Linear(2, 6).double())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def function(h: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (h,))

    assert torch.autograd.gradcheck(function, (h, *module.parameters()))


def test_the_rows_of_r_are_orthonormal_and_follow_the_basis() -> None:
    """Also where a plain QR decomposition turns a row round: its first column's first element changes its sign."""
    module = Edit(6, 3, None, beside=nn.Linear(2, 6).double())
    for sign in (1e-9, -1e-9):
        with torch.no_grad():
            nn.init.normal_(module.basis, generator=torch.Generator().manual_seed(1))
            module.basis[0, 0] = sign
        R = module.rotation()
        torch.testing.assert_close(R @ R.T, torch.eye(3, dtype=R.dtype), rtol=0, atol=1e-14)
        torch.testing.assert_close(R, orthonormal(module.basis), rtol=0, atol=1e-13)


@every_model
def test_a_fresh_edit_changes_nothing(kind: str) -> None:
    model = MODELS[kind]().eval()
    before = logits(model)
    for positions in ("all", "f1+l2"):
        applied = apply(model, LoReFT(rank=3, positions=positions))
        assert torch.equal(logits(model), before)
        applied.remove()


@pytest.mark.parametrize("method", [Houlsby, Pfeiffer])
def test_a_fresh_bottleneck_is_close_to_the_identity(method: Any) -> None:
    """|act(z)| ≤ |z|, no weight is above two standard deviations, the biases are zero."""
    model = tiny_llama().double().eval()
    before = logits(model)
    applied = apply(model, method(bottleneck=8))
    change = (logits(model) - before).norm() / before.norm()
    assert 0 < change < 1e-2
    for name, parameter in applied.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "adapter" in name:
            assert 0 < parameter.abs().max() <= 2 * INIT_STD
    h = torch.randn(5, WIDTH, dtype=torch.float64)
    adapter = model.get_submodule("model.layers.0.mlp.down_proj.adapter")
    bound = adapter.up.weight.norm() * adapter.down.weight.norm() * h.norm()
    assert (adapter(h) - h).norm() <= bound


@every_model
@every_config
def test_gradients_flow_to_what_is_trained_alone(kind: str, config: Any) -> None:
    _, model, applied = applied_to(kind, config)
    logits(model).sum().backward()
    trained = {id(parameter) for parameter in applied.parameters()}
    for parameter in model.parameters():
        assert parameter.requires_grad == (id(parameter) in trained)
        assert (parameter.grad is not None) <= (id(parameter) in trained)
    heads = {"bert": {"classifier.weight", "classifier.bias"}, "llama": {"score.weight"}}[kind]
    own = {name for name, _ in applied.named_parameters() if name not in heads}
    assert all(f"{('adapter', 'loreft', 'bias')[_index(config)]}" in name for name in own)
    assert heads <= {name for name, _ in applied.named_parameters()}


def _index(config: Any) -> int:
    return 0 if isinstance(config, (Houlsby, Pfeiffer)) else 1 if isinstance(config, LoReFT) else 2


@every_model
def test_the_counts_are_those_of_the_page(kind: str) -> None:
    d, r = WIDTH, 3
    counts = {
        Houlsby(r): 2 * BLOCKS * (2 * d * r + r + d),
        Pfeiffer(r): BLOCKS * (2 * d * r + r + d),
        LoReFT(r): BLOCKS * (2 * d * r + r),
        LoReFT(r, layers=(1,)): 2 * d * r + r,
    }
    for config, count in counts.items():
        model = MODELS[kind]()
        applied = apply(model, type(config)(**vars(config) | {"modules_to_save": ()}))
        assert sum(parameter.numel() for parameter in applied.parameters()) == count
    applied = apply(tiny_bert(), BitFit(layers=tuple(range(BLOCKS)), modules_to_save=()))
    assert sum(parameter.numel() for parameter in applied.parameters()) == BLOCKS * (7 * d + SHAPE["intermediate_size"])


def test_biases_are_chosen_by_name_and_block() -> None:
    def trained(**settings: Any) -> set[str]:
        applied = apply(tiny_bert(), BitFit(modules_to_save=[], **settings))
        return {name for name, _ in applied.named_parameters()}

    query = "bert.encoder.layer.{}.attention.self.query.bias".format
    assert trained(names=["query"]) == {query(0), query(1)}
    assert trained(names=["query"], layers=[1]) == {query(1)}
    middle = "bert.encoder.layer.0.intermediate.dense.bias"
    assert trained(names=("query", "intermediate.dense"), layers=(0,)) == {query(0), middle}
    everything = trained()
    assert everything == {name for name, _ in tiny_bert().named_parameters() if name.endswith("bias")}
    assert {"bert.embeddings.LayerNorm.bias", "bert.pooler.dense.bias"} <= everything
    assert all(".layer.0." in name for name in trained(layers=(0,)))


def test_heads() -> None:
    names = {name for name, _ in apply(tiny_bert(), Pfeiffer(2, modules_to_save=["pooler"])).named_parameters()}
    assert {name for name in names if "adapter" not in name} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    headless = LlamaModel(tiny_llama().config)
    assert all("adapter" in name for name, _ in apply(headless, Pfeiffer(2)).named_parameters())


@pytest.mark.parametrize("base", ["bfloat16", "float16", "nf4"])
@pytest.mark.parametrize("config", [Houlsby(4), LoReFT(2), LoReFT(2, "all")], ids=["houlsby", "loreft", "loreft-all"])
def test_float32_parameters_on_a_base_of_few_bits(base: str, config: Any) -> None:
    """What is added computes in its own dtype and answers in the base's; under autocast it computes in autocast's."""
    model = tiny_llama()
    if base == "nf4":
        to_four_bit(model, lambda name: name != "score")
    else:
        model.to(getattr(torch, base))
    dtype = logits(model).dtype
    applied = apply(model, config)
    added = [parameter for name, parameter in applied.named_parameters() if "score" not in name]
    assert {parameter.dtype for parameter in added} == {torch.float32}
    y = logits(model)
    assert y.dtype == dtype
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in added)
    with torch.autocast("cpu", torch.bfloat16):
        y = logits(model)
    y.sum().backward()
    assert y.isfinite().all()
    assert {parameter.grad.dtype for parameter in added} == {torch.float32}


def test_a_model_in_16_bits_with_its_method() -> None:
    """``model.to`` moves both; R is still made in float32."""
    model = tiny_llama()
    apply(model, LoReFT(2, "all"))
    model.to(torch.bfloat16)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
@every_config
def test_gradient_checkpointing_changes_nothing(config: Any, reentrant: bool) -> None:
    _, model, applied = applied_to("llama", config)
    model.train()
    values = dict(applied.named_parameters())
    plainly = computed(model, values)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if reentrant:  # torch.autograd.grad is not for this kind
        y = logits(model)
        (y * torch.linspace(1, 2, y.numel()).view_as(y)).sum().backward()
        again = {"logits": y} | {name: value.grad for name, value in values.items()}
    else:
        again = computed(model, values)
    assert all(torch.equal(again[name], value) for name, value in plainly.items())


def test_a_tuple_is_edited_in_its_first_place() -> None:
    edit = Bottleneck(4, 2, "relu", beside=nn.Linear(2, 4))
    h, other = torch.randn(3, 4), object()
    first, second = edit.hook(edit, (), (h, other))
    assert torch.equal(first, edit(h))
    assert second is other


def test_recorded_hidden_states_are_the_edited_ones() -> None:
    model = tiny_llama().eval()
    model(IDS, MASK, output_hidden_states=True)  # transformers puts its recording hooks first
    randomize(apply(model, LoReFT(2, "all")))
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    states = model(IDS, MASK, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], seen[0])


SETTINGS = [
    (Houlsby, {"bottleneck": 0}, ValueError, "bottleneck must be at least 1, got 0"),
    (Pfeiffer, {"bottleneck": 2.0}, TypeError, "bottleneck must be an integer, got 2.0"),
    (Houlsby, {"activation": "softmax"}, ValueError, "activation must be one of gelu, relu, silu, tanh, got 'softmax'"),
    (Houlsby, {"layers": ()}, ValueError, r"layers must name blocks, counted from 0, got \[\]"),
    (Houlsby, {"layers": [-1]}, ValueError, r"layers must name blocks, counted from 0, got \[-1\]"),
    (Houlsby, {"layers": [1, 1]}, ValueError, r"layers must name each block once, got \[1, 1\]"),
    (Houlsby, {"layers": 1}, TypeError, "layers must be a list of block numbers, or None, got 1"),
    (BitFit, {"names": "query"}, TypeError, "names must be a list of names, or None, got 'query'"),
    (BitFit, {"modules_to_save": "score"}, TypeError, "modules_to_save must be a list of names, or None, got 'score'"),
    (LoReFT, {"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    (LoReFT, {"rank": True}, TypeError, "rank must be an integer, got True"),
    *(
        (LoReFT, {"positions": text}, ValueError, "positions must be like 'f4.l4', 'f4', 'l4', or 'all', got ")
        for text in ("", "f0", "l-1", "f4l4", "l1+f1", "f1+f2", "first", 4)
    ),
]


@pytest.mark.parametrize(("method", "settings", "error", "message"), SETTINGS)
def test_settings_are_checked(method: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        method(**settings)


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])


def biasless() -> nn.Module:
    config = LlamaConfig(**vars(tiny_llama().config) | {"attention_bias": False})
    return LlamaForSequenceClassification(config)


REFUSALS = [
    (tiny_bert, Houlsby(layers=(2,)), "layers must be between 0 and 1, the model's last block, got 2"),
    (
        lambda: nn.Linear(3, 3),
        Houlsby(),
        r"model \(a Linear\) has no list of transformer blocks: none .* layer, layers",
    ),
    (Headless, Houlsby(), r"attention's output projection was not found in layers.0 \(a Sequential\); looked for att"),
    (Headless, Pfeiffer(), "the feed-forward's output projection was not found in layers.0 .* looked for output.dense"),
    (biasless, BitFit(), r"model \(a LlamaFor\w+\) has no biases for BitFit to train: no parameter is called bias"),
    (tiny_bert, BitFit(names=("query", "quarry")), "names must each stand for a bias, but none has 'quarry'"),
    (tiny_bert, LoReFT(rank=17), "rank must be at most the width of bert.encoder.layer.0, 16, got 17"),
    (tiny_bert, LoReFT(modules_to_save=("head",)), "modules_to_save names 'head', but the model has no module of"),
]


@pytest.mark.parametrize(("make", "config", "message"), REFUSALS)
def test_a_model_that_does_not_fit_is_refused_and_unchanged(make: Any, config: Any, message: str) -> None:
    model = make()
    names, before = list(model.state_dict()), copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        apply(model, config)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert vars(model).keys() == vars(before).keys()


def test_a_quantized_head_is_refused() -> None:
    model = tiny_llama()
    model.score = bnb.nn.Linear4bit(WIDTH, 2, bias=False)
    model.score.to("cpu")
    with pytest.raises(ValueError, match=r"score.weight is a Params4bit of torch.uint8 and cannot be trained"):
        apply(model, Pfeiffer())


def test_a_second_method_is_refused() -> None:
    model = tiny_bert()
    applied = apply(model, BitFit())
    with pytest.raises(ValueError, match="bitfit is on the model already: remove or merge it before houlsby is"):
        apply(model, Houlsby())
    applied.remove()
    apply(model, Houlsby())


def test_other_things_than_models_and_methods_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        apply("bert", Houlsby())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config must be the settings of a method, such as Houlsby\(\), got str"):
        apply(tiny_bert(), "houlsby")  # type: ignore[arg-type]


def test_methods_by_name() -> None:
    assert list(METHODS.items()) == [
        ("houlsby", Houlsby),
        ("pfeiffer", Pfeiffer),
        ("bitfit", BitFit),
        ("loreft", LoReFT),
    ]

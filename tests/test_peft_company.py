"""Fused layers in company: what other libraries do to PEFT's layers and classes works on, and the report is true."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from oracle import assert_close_as_eager
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.model import LoraModel
from peft_layers import assert_parity, layer_of, lora_model, signed, tiny_llama_base
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear

import fastpeft
from fastpeft.peft.layers import FusedForward

REPLACED = "its forward was replaced by another library"


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One entry for each fused call."""
    calls: list[None] = []
    run = FusedForward._run
    with monkeypatch.context() as patch:
        patch.setattr(FusedForward, "_run", lambda *args: calls.append(None) or run(*args))
        yield calls


def model_of(**config: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    return lora_model(nn.Linear(16, 16), **config)


@pytest.mark.parametrize("when", ["before the patch", "after it"])
@pytest.mark.parametrize("first", [True, False], ids=["seen first", "seen before"])
@pytest.mark.parametrize(
    ("owner", "name", "dora"),
    [
        (PeftLinear, "forward", False),
        (nn.Linear, "forward", False),
        (DoraLinearLayer, "get_weight_norm", True),
        (DoraLinearLayer, "forward", True),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(value)),
)
def test_a_function_replaced_for_its_whole_class_runs(
    owner: type[Any], name: str, dora: bool, first: bool, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, stock, model = torch.ones(3, 16), model_of(use_dora=dora), model_of(use_dora=dora)
    if not first:
        assert fastpeft.patch(model_of(use_dora=dora)).left_to_peft == {}
    own = getattr(owner, name)
    if when == "after it":
        fastpeft.patch(model)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(owner, name, lambda self, *args, **kwargs: own(self, *args, **kwargs) * 1.25)
        report = fastpeft.patch(model)
        assert torch.equal(model(x), stock(x))
    (reason,) = report.left_to_peft.values()
    assert reason.endswith(f"{owner.__module__}.{owner.__qualname__}.{name} was replaced")
    assert fastpeft.patch(model).left_to_peft == {}  # put back: fused again


def swapped_for_a_while(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: x
    layer.forward = forward


WAYS: dict[str, tuple[Callable[[Any], object], bool]] = {
    "accelerate's hook": (lambda layer: add_hook_to_module(layer, ModelHook()), True),
    "swapped for a while": (swapped_for_a_while, True),
    "replaced": (lambda layer: setattr(layer, "forward", lambda x: x * 2), False),
}


@pytest.mark.parametrize("when", ["before the patch", "after it"])
@pytest.mark.parametrize("way", WAYS)
def test_the_report_is_true_of_a_layer_whose_forward_was_touched(
    way: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (change, fused), model, x = WAYS[way], model_of(), torch.ones(2, 16)
    if when == "after it":
        fastpeft.patch(model)
    change(layer_of(model))
    report = fastpeft.patch(model)
    with counted(monkeypatch) as calls:
        y = model(x)
    assert bool(calls) == bool(report.fused) == fused
    verdict = fastpeft.explain(model).verdicts["base_model.model.0"]
    assert verdict.startswith("cpu runs it") if fused else verdict == f"PEFT: {REPLACED}"
    if fused:
        torch.testing.assert_close(y, model_of()(x))
        fastpeft.unpatch(model)
        assert torch.equal(model(x), model_of()(x))
    else:
        assert torch.equal(y, x * 2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_x_lora_s_layers_are_reported_as_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(tiny_llama_base(), peft.LoraConfig(r=4, **settings)).save_pretrained(tmp_path)
    base = tiny_llama_base()
    base.config.use_cache = False
    adapters = {"0": str(tmp_path), "1": str(tmp_path)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters)
    model = peft.get_peft_model(base, config)
    report = fastpeft.patch(model)
    assert report.fused == [] and set(report.left_to_peft.values()) == {REPLACED}
    with counted(monkeypatch) as calls:
        model(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert calls == []


class Clipped(nn.Module):
    """A wrapper around a layer that PEFT does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)


def test_what_another_library_made_of_pefts_factory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer() -> nn.Module:
        return peft.get_peft_model(
            nn.Sequential(Clipped()), peft.LoraConfig(r=4, target_modules=["0"])
        ).base_model.model[0]

    own = LoraModel.__dict__["_create_new_module"]
    fastpeft.enable()
    try:
        before = LoraModel._create_new_module

        def theirs(config: Any, name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
            return before(config, name, target.linear if isinstance(target, Clipped) else target, **kwargs)

        LoraModel._create_new_module = staticmethod(theirs)
        assert type(layer()).__name__ == "FusedLinear"
        with fastpeft.enabled():
            assert type(layer()).__name__ == "FusedLinear"
        assert type(layer()).__name__ == "FusedLinear"
        fastpeft.disable()
        assert type(layer()) is PeftLinear
        assert LoraModel._create_new_module is theirs
        with fastpeft.enabled():
            assert type(layer()).__name__ == "FusedLinear"
        assert LoraModel._create_new_module is theirs
    finally:
        fastpeft.disable()
        LoraModel._create_new_module = own


def test_weights_that_another_module_generates() -> None:
    torch.manual_seed(0)
    model, generator = model_of(), nn.Linear(5, 4 * 16 + 16 * 4)
    out, layer = generator(torch.ones(5)), layer_of(model)
    for part, weight in (
        (layer.lora_A["default"], out[:64].view(4, 16)),
        (layer.lora_B["default"], out[64:].view(16, 4)),
    ):
        del part.weight
        part.weight = weight
    gradients = []
    for patched in (False, True):
        if patched:
            assert fastpeft.patch(model).left_to_peft == {}
        y = model(torch.ones(3, 16))
        gradients.append(torch.autograd.grad(y.square().sum(), generator.weight, retain_graph=True)[0])
    torch.testing.assert_close(*gradients)


def float8_of(model: peft.PeftModel) -> peft.PeftModel:
    base = layer_of(model).base_layer
    base.weight.data, base.bias = base.weight.data.to(torch.float8_e4m3fn), None
    return model


def test_a_float8_base_is_called_as_it_is() -> None:
    model, x = float8_of(model_of()), signed(2, 16)
    exact = model_of().double()
    base = layer_of(exact).base_layer
    base.weight.data, base.bias = layer_of(model).base_layer.weight.double(), None
    with torch.autocast("cpu", torch.bfloat16):
        stock = model(x)
        assert fastpeft.patch(model).left_to_peft == {}
        assert_close_as_eager(model(x), exact(x.double()), stock)
    (reason,) = fastpeft.patch(float8_of(model_of(use_dora=True))).left_to_peft.values()
    assert reason == "its adapter 'default' has DoRA, and its base layer's weight is torch.float8_e4m3fn"


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_traced_model_is_pefts_and_loads_where_there_is_no_fastpeft(use_dora: bool, tmp_path: Path) -> None:
    model, x = model_of(use_dora=use_dora).eval(), torch.randn(5, 16)
    stock = model(x)
    fastpeft.patch(model)
    torch.jit.save(torch.jit.trace(model, (x,)), tmp_path / "model.pt")
    torch.save((x, stock.detach()), tmp_path / "expected.pt")
    code = f"""
import torch
x, y = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(torch.jit.load({str(tmp_path / "model.pt")!r})(x), y)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def four_bit_model() -> peft.PeftModel:
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    return peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))


@pytest.mark.parametrize("make", [lambda: model_of(use_dora=True), four_bit_model], ids=["dora", "qlora"])
def test_training_after_an_evaluation_under_inference_mode(make: Callable[[], peft.PeftModel]) -> None:
    gradients = []
    for patched in (False, True):
        model = make().train()
        x = torch.linspace(-1, 1, 3 * layer_of(model).in_features).view(3, -1)
        if patched:
            assert fastpeft.patch(model).left_to_peft == {}
        with torch.inference_mode():
            model(x)
        for _ in range(2):
            model(x).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


def test_a_4_bit_layer_pickles_its_weight_once() -> None:
    model = four_bit_model().train()
    model(torch.ones(2, 64))
    stock = len(pickle.dumps(model))
    fastpeft.patch(model)
    model(torch.ones(2, 64))
    dumped = pickle.dumps(model)
    assert len(dumped) < stock + 1000
    assert type(layer_of(pickle.loads(dumped))).__name__ == "FusedLinear"


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_batched_backward_passes(config: dict[str, Any]) -> None:
    x, found = torch.randn(5, 16), []
    for backend in ("cpu", "reference"):
        model = model_of(**config)
        fastpeft.patch(model, backend=backend)
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.manual_seed(1)
        y = model.train()(x.requires_grad_()).mean(0)
        batched = torch.autograd.grad(y, [x, *parameters], torch.eye(16), is_grads_batched=True, retain_graph=True)
        for i in range(16):
            single = torch.autograd.grad(y, [x, *parameters], torch.eye(16)[i], retain_graph=True)
            torch.testing.assert_close([grad[i] for grad in batched], list(single))
        found.append(batched)
    torch.testing.assert_close(*found)


def test_jacobians_that_torch_vectorizes() -> None:
    model, x = model_of(), torch.randn(5, 16)
    stock = torch.autograd.functional.jacobian(lambda x: model(x).mean(0), x)
    fastpeft.patch(model)
    torch.testing.assert_close(torch.autograd.functional.jacobian(lambda x: model(x).mean(0), x, vectorize=True), stock)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 16)], ids=str)
def test_an_output_may_be_changed_in_place(shape: tuple[int, ...], backend: str) -> None:
    x, gradients = torch.randn(shape), []
    for patched in (False, True):
        model = model_of()
        if patched:
            fastpeft.patch(model, backend=backend)
        nn.functional.relu_(model(x)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_input_changed_in_place_raises_and_says_what_to_do(backend: str) -> None:
    model, x = model_of(), torch.randn(4, 16)
    fastpeft.patch(model, backend=backend)
    y = model(x)
    x.relu_()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation(.|\n)*give the layer a clone"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["sparse", "mkldnn"])
def test_inputs_that_are_not_dense_are_pefts(kind: str) -> None:
    model, x = model_of(), torch.randn(4, 16)
    made: Tensor = x.to_sparse() if kind == "sparse" else x.to_mkldnn()
    outcomes = []
    for patched in (False, True):
        if patched:
            assert fastpeft.patch(model).left_to_peft == {}
        try:
            with torch.no_grad():
                outcomes.append(model(made).to_dense())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert torch.equal(*outcomes) if isinstance(outcomes[0], Tensor) else outcomes[0] == outcomes[1]


def test_forward_mode_differentiation_is_pefts() -> None:
    model, x = model_of(), torch.randn(4, 16)
    stock = torch.func.jvp(model, (x,), (x.cos(),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        fastpeft.patch(model)
        forward = torch.autograd.forward_ad.unpack_dual(model(dual))
    torch.testing.assert_close(torch.func.jvp(model, (x,), (x.cos(),)), stock)
    torch.testing.assert_close((forward.primal, forward.tangent), stock)


@pytest.mark.parametrize(
    "make", [model_of, lambda: model_of(use_dora=True), four_bit_model], ids=["lora", "dora", "qlora"]
)
def test_replicas_that_hold_tensors_where_layers_hold_parameters(make: Callable[[], peft.PeftModel]) -> None:
    """As ``torch.nn.parallel.replicate`` makes them: PEFT's forward runs."""
    outputs = []
    for patched in (False, True):
        model = make()
        if patched:
            fastpeft.patch(model)
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if isinstance(module, nn.ParameterDict) or parameter is None:
                    continue
                del module._parameters[name]
                module.__dict__[name] = parameter
        outputs.append(model(torch.linspace(-1, 1, 3 * layer_of(model).in_features).view(3, -1)))
    assert torch.equal(*outputs)


class Renamed(nn.Linear):
    """Another class with torch's forward, as transformers' ``EsmFoldLinear``."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [Renamed, FalconLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_classes_with_the_forward_of_torchs_linear_are_fused(
    kind: type[nn.Linear], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_parity(lora_model(kind(24, 24, bias=bias)), lambda: signed(9, 24), monkeypatch)


def test_a_class_with_another_forward_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        assert_parity(lora_model(Doubled(24, 24)), lambda: signed(9, 24), patch)
    model = lora_model(FalconLinear(24, 24), use_dora=True, lora_dropout=0.1)
    assert fastpeft.patch(model).left_to_peft == {}
    monkeypatch.setattr(FalconLinear, "forward", Doubled.forward)
    (reason,) = fastpeft.patch(model).left_to_peft.values()
    assert reason.endswith("FalconLinear.forward was replaced")


def test_the_report_is_true_of_the_meta_device() -> None:
    model = lora_model(nn.Linear(24, 24)).to("meta")
    (reason,) = fastpeft.patch(model).left_to_peft.values()
    assert "meta device" in reason
    assert model(torch.empty(3, 24, device="meta")).shape == (3, 24)


def test_the_report_says_what_holds_no_parameter() -> None:
    model = lora_model(nn.Linear(24, 24))
    base = layer_of(model).base_layer
    base.__dict__["weight"] = base._parameters.pop("weight")  # as torch.nn.parallel.replicate does
    (reason,) = fastpeft.patch(model).left_to_peft.values()
    assert reason == "its base layer's weight is no Parameter: the layer is parametrized, a replica or a shard"


def partitioned(module: nn.Module) -> None:
    """As DeepSpeed's ZeRO-3 treats what it takes for a leaf: what ``module`` holds is there within its forward and its
    backward, each time at another place, and NaN is what is left there afterwards."""
    parameters = list(module.parameters())
    kept = [p.detach().clone() for p in parameters]

    def gather(*_: Any) -> None:
        for parameter, whole in zip(parameters, kept, strict=True):
            parameter.data = whole.clone()

    def give_back(*_: Any) -> None:
        for parameter in parameters:
            parameter.data.fill_(torch.nan)
            parameter.data = torch.empty(0)

    give_back()
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(give_back)
    module.register_full_backward_pre_hook(gather)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_parameters_are_read_within_forward_and_backward_alone(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, found = torch.randn(5, 16), []
    for gathered in (False, True):
        model = model_of(**config).train()
        assert fastpeft.patch(model).left_to_peft == {}
        if gathered:
            partitioned(layer_of(model))
        torch.manual_seed(1)
        with counted(monkeypatch) as calls:
            for _ in range(2):
                y = model(x.clone().requires_grad_())
                y.square().sum().backward()
        assert len(calls) == 2
        found.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found)

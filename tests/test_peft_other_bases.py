"""Base layers whose weight fastpeft does not read: they are called as they are, and the adapters' part is one step."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft_layers import (
    adalora_model,
    add_adapter,
    assert_parity,
    layer_of,
    lora_model,
    no_peft_forward,
    share_masks,
    signed,
)
from test_peft_vera import vera_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft import norm_cache
from fastpeft.peft.layers import FusedForward

K, N = 64, 48
HERE = Path(__file__).parent
QUANTIZERS = HERE.parent / ".venv" / "quantizers"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class OtherLinear(nn.Linear):
    """A layer whose forward is not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).neg()


class OtherTensor(Tensor):
    """A tensor subclass, as quantizers and parallelisms use them."""


class Packed(nn.Module):
    """A quantizer's layer: bytes and scales, multiplied by a function of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scale.to(x.dtype)).t()


def eight_bit() -> nn.Module:
    return bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")


def set_weight(base: Any) -> None:
    base.weight = nn.Parameter(base.weight.detach().as_subclass(OtherTensor))


def set_bias(base: Any) -> None:
    base.bias = nn.Parameter(base.bias.detach().as_subclass(OtherTensor))


def own_forward(base: Any) -> None:
    """As accelerate does it: an attribute of the instance."""
    forward = base.forward
    base.forward = lambda x: 2 * forward(x)


def set_class(base: Any) -> None:
    base.__class__ = OtherLinear


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "class": (set_class, "its base layer is a test_peft_other_bases.OtherLinear"),
    "hook": (lambda base: base.register_forward_hook(lambda module, args, y: 2 * y), "has a hook or a forward"),
    "pre-hook": (lambda base: base.register_forward_pre_hook(lambda _, args: (2 * args[0],)), "has a hook"),
    "backward hook": (lambda base: base.register_full_backward_hook(lambda _, dx, dy: (2 * dx[0],)), "has a hook"),
    "backward pre-hook": (lambda base: base.register_full_backward_pre_hook(lambda _, dy: (2 * dy[0],)), "has a hook"),
    "forward": (own_forward, "has a hook or a forward of its own"),
    "weight": (set_weight, "its base layer's weight is a OtherTensor"),
    "bias": (set_bias, "its bias a OtherTensor"),
}
MODELS = {
    "lora": lora_model,
    "two adapters": lambda base: with_another(lora_model(base)),
    "lora_bias": lambda base: lora_model(base, lora_bias=True),
    "dropout": lambda base: lora_model(base, lora_dropout=0.3),
    "adalora": adalora_model,
    "vera": vera_model,
    "dora": lambda base: lora_model(base, use_dora=True),
}


def with_another(model: peft.PeftModel) -> peft.PeftModel:
    add_adapter(model, "other", r=3)
    model.base_model.set_adapter(["default", "other"])
    return model


def results(model: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """The layer's result, and the gradients of ``x`` and of what learns."""
    x = x.detach().requires_grad_()
    learned = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = layer_of(model)(x, **kwargs)
    dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, learned, dy, allow_unused=True)
    return [y, *(grad for grad in grads if grad is not None)]


def assert_as_peft(model: Any, monkeypatch: pytest.MonkeyPatch, x: Tensor, **kwargs: Any) -> None:
    """Fused, in float32, the layer gives what PEFT's own gives."""
    model = share_masks(model, monkeypatch) if hasattr(layer_of(model), "lora_dropout") else model
    stock = results(model, x, **kwargs)
    assert fastpeft.patch(model).left_to_peft == {}
    assert "multiplies by itself" in str(fastpeft.explain(model))
    with no_peft_forward(monkeypatch):
        fused = results(model, x, **kwargs)
    assert len(fused) == len(stock)
    torch.testing.assert_close(fused, stock)


# PEFT's AdaLoRA adds onto the base layer's result in place, and torch forbids it for some. DoRA reads the weight.
BY_PEFT = [
    (change, model)
    for change in CHANGES
    for model in MODELS
    if (model, "backward" in change) != ("adalora", True) and (model, change in ("weight", "bias")) != ("dora", True)
]


@pytest.mark.parametrize(("change", "model"), BY_PEFT)
def test_a_changed_base_is_called_as_it_is(change: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MODELS[model](nn.Linear(K, N))
    CHANGES[change][0](layer_of(made).base_layer)
    assert_as_peft(made, monkeypatch, signed(3, 7, K))


@pytest.mark.parametrize("base", ["Linear", "Conv1D"])
@pytest.mark.parametrize("change", CHANGES)
def test_dora_beside_a_changed_base(change: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weight is read, its norm is kept; in evaluation dropout is none."""
    linear = nn.Linear(K, N) if base == "Linear" else Conv1D(N, K)
    if (base, change) == ("Conv1D", "class"):
        linear.__class__ = type("OtherConv1D", (Conv1D,), {})
    else:
        CHANGES[change][0](linear)
    config = {"use_dora": True, "fan_in_fan_out": base == "Conv1D", "bias": "all"}
    model, x = lora_model(linear, lora_dropout=0.3, **config), signed(3, 7, K)
    if change in ("weight", "bias"):
        (reason,) = fastpeft.patch(lora_model(linear, **config)).left_to_peft.values()
        assert reason.startswith("its adapter 'default' has DoRA, and its base layer's") and "OtherTensor" in reason
        return
    (reason,) = fastpeft.patch(model).left_to_peft.values()
    assert reason.startswith("its adapter 'default' has DoRA with dropout, and its base layer")
    fastpeft.unpatch(model.eval())
    assert_as_peft(model, monkeypatch, x)
    kept = layer_of(model)._fastpeft_norms["default"]
    monkeypatch.setattr(norm_cache, "_norm", lambda *args: pytest.fail("the norm is computed again"))
    results(model, x)
    assert kept is layer_of(model)._fastpeft_norms["default"]


def test_dora_beside_four_bits_with_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    base = bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    base.register_forward_hook(lambda module, args, y: 2 * y)
    assert_as_peft(lora_model(base, use_dora=True), monkeypatch, signed(3, 7, K))


def on_meta(base: Any) -> None:
    base.register_forward_pre_hook(lambda module, args: None)  # as offloading does it
    base.weight = nn.Parameter(base.weight.to("meta"), requires_grad=False)


def made_by_a_hook(base: Any) -> None:
    weight = base.weight.detach()
    del base.weight
    base.register_forward_pre_hook(lambda module, args: setattr(module, "weight", 2 * weight))


def without_a_form_that_dequantizes(base: Any) -> None:
    base.register_buffer("W_q", base.weight.detach())
    del base.weight
    set_class(base)


def not_quantized(base: Any) -> None:
    base.weight = bnb.nn.Int8Params(base.weight.detach(), requires_grad=False)
    base.state = bnb.MatmulLtState()


UNREAD = {
    on_meta: "weight is on the meta device",
    made_by_a_hook: "its base layer's weight is no Parameter",
    without_a_form_that_dequantizes: "cannot be dequantized: 'OtherLinear' object has no attribute 'dequantize'",
    not_quantized: "its 8-bit base weight is not quantized yet",
}


@pytest.mark.parametrize("change", UNREAD, ids=lambda change: change.__name__)
def test_a_weight_that_dora_cannot_read_is_pefts(change: Callable[[Any], None]) -> None:
    model = lora_model(nn.Linear(K, N), use_dora=True)
    change(layer_of(model).base_layer)
    (reason,) = fastpeft.patch(model).left_to_peft.values()
    assert reason.startswith("its adapter 'default' has DoRA, and its") and UNREAD[change] in reason


def test_several_doras_beside_another_base_are_pefts() -> None:
    model = lora_model(OtherLinear(K, N), use_dora=True)
    add_adapter(model, "other", r=3, use_dora=True)
    model.base_model.set_adapter(["default", "other"])
    x = signed(5, K)
    stock = results(model, x)
    (reason,) = fastpeft.patch(model).left_to_peft.values()
    assert reason.startswith("several DoRA adapters are active, and its base layer is a")
    torch.testing.assert_close(results(model, x), stock, rtol=0, atol=0)


@pytest.mark.parametrize("loaded", [False, True], ids=["placed by hand", "loaded in 8 bits"])
def test_dora_over_eight_bits(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own layer raises in its second call on the CPU, since its first one gives the base another weight."""
    monkeypatch.setattr(nn.Sequential, "is_loaded_in_8bit", loaded, raising=False)
    stock, x = lora_model(eight_bit(), use_dora=True), signed(3, 7, K)
    torch.manual_seed(0)
    model = lora_model(eight_bit(), use_dora=True)
    model.load_state_dict(stock.state_dict())
    expected = results(stock, x)
    weight = layer_of(model).base_layer.weight
    assert fastpeft.patch(model).left_to_peft == {}
    with no_peft_forward(monkeypatch):
        for _ in range(3):
            torch.testing.assert_close(results(model, x), expected)
    assert layer_of(model).base_layer.weight is weight


@pytest.mark.parametrize("change", ["class", "hook"])
def test_a_mixed_batch_beside_a_changed_base(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model(nn.Linear(K, N), lora_bias=True)
    add_adapter(model, "other", r=3)
    CHANGES[change][0](layer_of(model).base_layer)
    names = ["other", "__base__", "default", "other"]
    assert_as_peft(model.eval(), monkeypatch, signed(4, 5, K), adapter_names=names)


@pytest.mark.parametrize("loaded", [False, True], ids=["placed by hand", "loaded in 8 bits"])
@pytest.mark.parametrize("method", ["lora", "dropout"])
def test_eight_bits_of_bitsandbytes(method: str, loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Sequential, "is_loaded_in_8bit", loaded, raising=False)
    model = MODELS[method](eight_bit())
    expected = "bnb" if loaded else "layer"
    assert type(layer_of(model)).__module__.endswith(expected)
    assert_as_peft(model, monkeypatch, signed(3, 7, K))
    fastpeft.unpatch(model)
    assert type(layer_of(model)).__module__.endswith(expected)


def test_adalora_over_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Sequential, "is_loaded_in_8bit", True, raising=False)
    model = adalora_model(eight_bit())
    assert type(layer_of(model)).__name__ == "SVDLinear8bitLt"
    assert_as_peft(model, monkeypatch, signed(3, 7, K))


@pytest.mark.parametrize("kind", [GPTQLoraLinear, AwqLoraLinear], ids=lambda kind: kind.__name__)
def test_packed_layers_of_gptq_and_awq(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's layer around a stand-in for the quantizer's, whose packages need a compiler or a GPU."""
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False)
    layer = kind(Packed(nn.Linear(K, N)), "default", config=config, r=4, lora_alpha=6)
    model = nn.Module()
    model.base_model = types.SimpleNamespace(model=[layer])
    model.layer = layer
    assert_as_peft(model, monkeypatch, signed(3, 7, K))


def test_layers_of_other_quantizers() -> None:
    """In a process of their own, since PEFT imports these libraries wherever it finds them."""
    paths = [str(QUANTIZERS), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "quantizers_suite.py")]
    done = subprocess.run(suite, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.search(r"\b11 passed", done.stdout), done.stdout + done.stderr


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(24, 16, 1), (2, 24, 9)),
    "2d": (nn.Conv2d(24, 16, 1), (2, 24, 5, 7)),
    "2d, no bias": (nn.Conv2d(24, 16, 1, bias=False), (1, 24, 4, 4)),
    "2d, no batch": (nn.Conv2d(24, 16, 1), (24, 5, 7)),
    "3d": (nn.Conv3d(24, 16, 1), (2, 24, 3, 4, 2)),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("model", ["lora", "two adapters", "dropout"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_single_places(
    kind: str, model: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strides included: who looks at the result as a view finds what PEFT gives."""
    base, shape = CONVOLUTIONS[kind]
    x = signed(*shape)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    made = MODELS[model](copy.deepcopy(base))
    if model == "dropout":  # no masks in common: PEFT's channels are not the last dimension
        for name in layer_of(made).lora_dropout:
            layer_of(made).lora_dropout[name] = nn.Dropout(0.0)
    stock = results(made, x)
    assert fastpeft.patch(made).left_to_peft == {}
    with no_peft_forward(monkeypatch):
        fused = results(made, x)
    torch.testing.assert_close(fused, stock)
    assert fused[0].stride() == stock[0].stride()


def test_a_convolution_drops_as_often_as_it_says() -> None:
    model = lora_model(nn.Conv2d(64, 16, 1, bias=False), lora_dropout=0.25)
    layer = layer_of(model)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(1.0)
    fastpeft.patch(model)
    kept = layer(torch.ones(2, 64, 16, 16)).mean() / (64 * 4 * layer.scaling["default"])
    assert abs(kept - 1) < 0.02  # six standard deviations of 32,768 elements


OTHER_CONVOLUTIONS = {
    "of neighbours": nn.Conv2d(24, 16, 3),
    "with a stride": nn.Conv2d(24, 16, 1, stride=2),
    "padded": nn.Conv2d(24, 16, 1, padding=1),
    "in groups": nn.Conv2d(24, 16, 1, groups=2),
}


@pytest.mark.parametrize("kind", OTHER_CONVOLUTIONS)
def test_other_convolutions_are_pefts(kind: str) -> None:
    model = lora_model(copy.deepcopy(OTHER_CONVOLUTIONS[kind]))
    x = signed(2, 24, 5, 5)
    stock = results(model, x)
    (reason,) = fastpeft.patch(model).left_to_peft.values()
    assert "consists of torch.nn.modules.conv.Conv2d and torch.nn.modules.conv.Conv2d" in reason
    torch.testing.assert_close(results(model, x), stock, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("loaded", [False, True], ids=["placed by hand", "loaded in 8 bits"])
def test_dtypes_are_pefts(
    dtype: torch.dtype, autocast: torch.dtype | None, use_dora: bool, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside 8 bits any dtype comes in; the adapters stay in float32."""
    monkeypatch.setattr(nn.Sequential, "is_loaded_in_8bit", loaded, raising=False)
    stock, model = (lora_model(eight_bit(), use_dora=use_dora) for _ in range(2))
    x = signed(5, K).to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        expected = [t.dtype for t in results(stock, x)]
        assert fastpeft.patch(model).left_to_peft == {}
        assert [t.dtype for t in results(model, x)] == expected


@pytest.mark.parametrize("loaded", [False, True], ids=["placed by hand", "loaded in 8 bits"])
def test_doras_dtype_under_autocast_of_a_gpu(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Sequential, "is_loaded_in_8bit", loaded, raising=False)
    stock, model = (lora_model(eight_bit(), use_dora=True) for _ in range(2))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type="cuda": device_type == "cuda")
    x = signed(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        expected = [t.dtype for t in results(stock, x)]
        assert fastpeft.patch(model).left_to_peft == {}
        assert [t.dtype for t in results(model, x)] == expected
    assert expected[0] == (torch.float32 if loaded else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_doras_error_beside_another_base(
    dtype: torch.dtype, autocast: torch.dtype | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = nn.Linear(K, N, bias=bias).to(dtype)
    set_class(base)
    model = lora_model(base, use_dora=True)
    assert_parity(model, lambda: signed(3, 7, K).to(dtype), monkeypatch, autocast)


def test_an_error_of_the_base_layer_comes_through() -> None:
    model = lora_model(OtherLinear(K, N))
    fastpeft.patch(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer_of(model)(torch.ones(2, K + 1))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_copy_and_a_compiled_model_call_their_own_base(use_dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model(OtherLinear(K, N), use_dora=use_dora)
    fastpeft.patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        layer_of(other).base_layer.weight.mul_(3)
    x = signed(5, K)
    assert not torch.allclose(other(x), model(x))
    calls = []
    run = FusedForward._run_beside_base
    monkeypatch.setattr(FusedForward, "_run_beside_base", lambda *args: calls.append(None) or run(*args))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert calls

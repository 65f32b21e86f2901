"""PEFT layers and a tiny Llama for the tests of the drop-in, and how one call of them is judged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import pytest
import torch
from oracle import Results, assert_close_as_eager
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft


def lora_model(base: nn.Module, adapter_dtype: torch.dtype = torch.float32, **config: Any) -> peft.PeftModel:
    """PEFT around ``base`` alone, ``lora_A`` and ``lora_B`` both random."""
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["0"]} | config
    model = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    move_magnitudes(model, "default")
    return cast_adapters(model, adapter_dtype)


def add_adapter(model: peft.PeftModel, name: str, adapter_dtype: torch.dtype = torch.float32, **config: Any) -> None:
    """Another adapter of the one layer of :func:`lora_model`, as random as the first; not active yet."""
    settings = {"r": 4, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["0"]} | config
    model.add_adapter(name, peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    move_magnitudes(model, name)
    cast_adapters(model, adapter_dtype)


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> Any:
    """``model`` with every adapter's parameters in ``dtype``."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


def move_magnitudes(model: nn.Module, adapter: str) -> None:
    """DoRA's magnitudes start as the norms, and the term with ``c - 1`` as 0; moves them away, as training does."""
    for name, parameter in model.named_parameters():
        if f"lora_magnitude_vector.{adapter}." in name:
            parameter.data *= 0.75 + torch.rand_like(parameter) / 2


def layer_of(model: nn.Module) -> Any:
    """The one LoRA layer of :func:`lora_model`."""
    return model.base_model.model[0]


def tiny_llama(**config: Any) -> peft.PeftModel:
    """Two blocks, 32 wide, random weights from torch's generator; LoRA on q, v and down."""
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(base, peft.LoraConfig(**(settings | config)))


def run(model: nn.Module, x: Tensor, dy: Tensor, **kwargs: Any) -> Results:
    """``y``, the gradient of ``x``, and of every parameter that asks for one, by name."""
    x = x.detach().requires_grad_()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    y = layer_of(model)(x, **kwargs)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype), allow_unused=True)
    named = zip(["x", *trained], grads, strict=True)
    return {"y": y.detach()} | {name: grad for name, grad in named if grad is not None}


@contextmanager
def no_peft_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a layer that goes to PEFT's own forward fails the test."""

    def forward(self: PeftLinear, *args: Any, **kwargs: Any) -> Tensor:
        pytest.fail(f"left to PEFT: {self}")

    with monkeypatch.context() as patch:
        patch.setattr(PeftLinear, "forward", forward)
        yield


def signed(*shape: int) -> Tensor:
    """Random signs and magnitudes within a factor of two: no long tails, so that no single rounding decides a test."""
    return (torch.rand(shape) / 2 + 0.5) * torch.randint(2, shape).mul(2).sub(1)


def assert_parity(
    model: peft.PeftModel,
    make_x: Callable[[], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    autocast: torch.dtype | None = None,
    **kwargs: Any,
) -> None:
    """Calls of ``model``'s layer, forward and backward: fused, they are as close to float64 as PEFT's own.

    Args:
        make_x: draws an input; as many as make up 32 tokens are judged together, as one sample. Of DoRA, at least
            four: all tokens share the error of a row's ``c``, so that they count for less.
        autocast: the dtype of an autocast region around the fused call and PEFT's. When None, PEFT still runs under
            autocast if its adapters are wider than the base, so that both compute in one dtype.
    """
    layer = layer_of(model)
    weight = layer.base_layer.weight
    wider = autocast is None and any(A.weight.dtype.itemsize > weight.dtype.itemsize for A in layer.lora_A.values())
    double_model, fused_model = copy.deepcopy(model).double(), copy.deepcopy(model)
    assert fastpeft.patch(fused_model).left_to_peft == {}

    def region(dtype: torch.dtype | None) -> Any:
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    oracle, eager, fused = [], [], []
    draws = max(4 if layer.lora_magnitude_vector else 1, 32 // max(1, make_x().shape[:-1].numel()))
    for _ in range(draws):
        x = make_x()
        dy = signed(*x.shape[:-1], layer.out_features)
        oracle.append(run(double_model, x.double(), dy.double(), **kwargs))
        with region(weight.dtype if wider else autocast):
            eager.append(run(model, x, dy, **kwargs))
        with region(autocast):
            stock_dtypes = {name: result.dtype for name, result in run(model, x, dy, **kwargs).items()}
            with no_peft_forward(monkeypatch):
                fused.append(run(fused_model, x, dy, **kwargs))
        assert {name: result.dtype for name, result in fused[-1].items()} == stock_dtypes
    for name in stock_dtypes:
        assert_close_as_eager(*([result[name] for result in results] for results in (fused, oracle, eager)), name)


def tokens(batch: Sequence[int] = (2, 12)) -> Tensor:
    """Random token ids for :func:`tiny_llama`."""
    return torch.randint(61, tuple(batch))

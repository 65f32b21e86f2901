"""PEFT layers and a tiny Llama for the tests of the drop-in, and how one call of them is judged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import pytest
import torch
from oracle import POOL, Results, assert_close_as_eager
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft
from fastpeft.dropout import dropout_keep, dropout_scale
from fastpeft.peft.fused import Fused


def lora_model(base: nn.Module, adapter_dtype: torch.dtype = torch.float32, **config: Any) -> peft.PeftModel:
    """PEFT around ``base`` alone, ``lora_A`` and ``lora_B`` both random."""
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["0"]} | config
    model = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(**settings), autocast_adapter_dtype=False)
    move_magnitudes(model, "default")
    return cast_adapters(model, adapter_dtype)


def add_adapter(model: peft.PeftModel, name: str, adapter_dtype: torch.dtype = torch.float32, **config: Any) -> None:
    """Another adapter of the one layer of :func:`lora_model`, as random as the first; not active yet."""
    settings = {"r": 4, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["0"]} | config
    model.add_adapter(name, peft.LoraConfig(**settings))
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


def adapter_dtype(layer: Any) -> torch.dtype:
    """The dtype of the layer's adapters."""
    return next(layer.lora_A.parameters()).dtype


def layer_of(model: nn.Module) -> Any:
    """The one LoRA layer of :func:`lora_model`."""
    return model.base_model.model[0]


def adalora_model(base: nn.Module, adapter_dtype: torch.dtype = torch.float32, **config: Any) -> peft.PeftModel:
    """:func:`lora_model` with AdaLoRA: 6 ranks, the second switched off as the allocation does it."""
    settings = {"init_r": 6, "lora_alpha": 9, "init_lora_weights": False, "target_modules": ["0"], "total_step": 10}
    config = peft.AdaLoraConfig(**(settings | config))
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    weigh_as_the_base(model, "default")
    return cast_adapters(model, adapter_dtype)


def weigh_as_the_base(model: nn.Module, adapter: str) -> None:
    """AdaLoRA's random matrices are standard normal; makes the adapter weigh as much as the base, and drops a rank."""
    layer = layer_of(model)
    layer.lora_A[adapter].data /= layer.in_features**0.5
    layer.lora_E[adapter].data[1] = 0


def tiny_llama_base(hidden_size: int = 32, intermediate_size: int = 48) -> LlamaForCausalLM:
    """Two blocks, random weights from torch's generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def tiny_llama(**config: Any) -> peft.PeftModel:
    """:func:`tiny_llama_base` with LoRA on q, v and down."""
    settings = {"r": 4, "lora_alpha": 8} | TARGETS
    return peft.get_peft_model(tiny_llama_base(), peft.LoraConfig(**(settings | config)))


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

    def by_peft(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        pytest.fail(f"left to PEFT: {self}")

    with monkeypatch.context() as patch:
        patch.setattr(Fused, "_by_peft", by_peft)
        yield


def share_masks(model: peft.PeftModel, monkeypatch: pytest.MonkeyPatch) -> peft.PeftModel:
    """PEFT's dropout and fastpeft's have one mask for each active adapter of the layer, the same in each call."""

    def forward(self: nn.Dropout, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = dropout_keep(torch.tensor(self.seed), x.shape[:-1].numel(), x.shape[-1], self.p)
        return x * keep.view(x.shape) * dropout_scale(self.p)

    layer = layer_of(model)
    seeds = [1234 + 99 * i for i, _ in enumerate(layer.active_adapters)]
    for name, seed in zip(layer.active_adapters, seeds, strict=True):
        layer.lora_dropout[name].seed = seed
    monkeypatch.setattr(nn.Dropout, "forward", forward)
    monkeypatch.setattr("fastpeft.dropout.dropout_seeds", lambda count, device: torch.tensor(seeds[:count]))
    return model


def signed(*shape: int) -> Tensor:
    """Random signs and magnitudes within a factor of two: no long tails, so that no single rounding decides a test."""
    return (torch.rand(shape) / 2 + 0.5) * torch.randint(2, shape).mul(2).sub(1)


def draws_needed(model: peft.PeftModel, tokens: int) -> int:
    """How many calls with ``tokens`` tokens are judged together, as one sample: as many as make up 32 tokens, and 32
    elements of the smallest gradient. Of DoRA, at least four: all tokens share the error of a row's ``c``, so that they
    count for less."""
    smallest = min((p.numel() for p in model.parameters() if p.requires_grad), default=POOL)
    at_least = 4 if layer_of(model).lora_magnitude_vector else 1
    return max(at_least, POOL // max(1, tokens), math.ceil(POOL / smallest))


def assert_parity(
    model: peft.PeftModel,
    make_x: Callable[[], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    autocast: torch.dtype | None = None,
    **kwargs: Any,
) -> None:
    """Calls of ``model``'s layer, forward and backward: fused, they are as close to float64 as PEFT's own.

    Args:
        make_x: draws an input; see :func:`draws_needed`.
        autocast: the dtype of an autocast region around the fused call and PEFT's. When None, PEFT still runs under
            autocast if its adapters are wider than the base, so that both compute in one dtype.
    """
    layer = layer_of(model)
    weight = layer.base_layer.weight
    wider = autocast is None and adapter_dtype(layer).itemsize > weight.dtype.itemsize
    double_model, fused_model = copy.deepcopy(model).double(), copy.deepcopy(model)

    def region(dtype: torch.dtype | None) -> Any:
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    with region(autocast):
        assert fastpeft.patch(fused_model).left_to_peft == {}
    oracle, eager, fused = [], [], []
    for _ in range(draws_needed(model, make_x().shape[:-1].numel())):
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


def train(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """The loss of each step, one step a batch; AdaLoRA's ranks are allocated after each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step, ids in enumerate(batches):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)

"""Every way in which PEFT starts an adapter, and every choice of layers: the model computes what PEFT's does, fused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from oracle import assert_close_as_eager
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils import loftq_utils
from peft_layers import TARGETS, no_peft_forward, tiny_llama_base, tokens
from test_peft_company import counted
from torch import nn

import fastpeft

Make = Callable[[nn.Module, dict[str, Any]], peft.PeftModel]


def plain(base: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    return peft.get_peft_model(base, peft.LoraConfig(**config))


def by_eva(base: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    """From the activations of some batches (Paischer et al., 2024)."""
    model = plain(base, config | {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)})
    peft.initialize_lora_eva_weights(model, [{"input_ids": tokens()} for _ in range(4)], show_progress_bar=False)
    return model


def by_corda(base: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    """From their covariances (Yang et al., 2024)."""
    made = peft.LoraConfig(**config, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    batches = [tokens((1, 24)) for _ in range(4)]

    def run() -> None:
        with torch.no_grad():
            for ids in batches:
                base(input_ids=ids)

    preprocess_corda(base, made, run_model=run)
    return peft.get_peft_model(base, made)


def by_loftq(base: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    """From what 4 bits lose (Li et al., 2023). PEFT computes it on a GPU alone: its words, with the CPU's name in that
    place."""
    words = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_layer, "loftq_init", words["loftq_init"])
        return plain(base, config | {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_bits=4)})


STARTS: dict[str, Make] = {
    kind: lambda base, config, kind=kind: plain(base, config | {"init_lora_weights": kind})
    for kind in (True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal")
} | {"eva": by_eva, "corda": by_corda, "loftq": by_loftq}
CHOICES: dict[str, tuple[dict[str, Any], int]] = {
    "rslora": ({"use_rslora": True}, 6),
    "rank and alpha patterns": ({"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 3}}, 6),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, 6),
    "layers_to_transform": ({"layers_to_transform": [1]}, 3),
    "exclude_modules": ({"exclude_modules": r".*0.*v_proj"}, 5),
    "all linear": ({"target_modules": "all-linear"}, 14),
    "lora_bias": ({"lora_bias": True}, 6),
    "trained biases": ({"bias": "lora_only"}, 6),
    "dora": ({"use_dora": True}, 6),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, 6),
}
CONFIG = {"r": 4, "lora_alpha": 8} | TARGETS


def assert_trains_as_peft(stock: peft.PeftModel, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss, and the gradient of each parameter that learns; each of so many layers is called fused."""
    ids = tokens((3, 16))
    double, fused = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    assert len(fastpeft.patch(fused).fused) == calls
    results = []
    for model in (double, stock):
        results.append(losses_and_gradients(model, ids))
    with no_peft_forward(monkeypatch), counted(monkeypatch) as seen:
        results.insert(0, losses_and_gradients(fused, ids))
    assert len(seen) == calls
    for name in results[0]:
        assert_close_as_eager(*([found[name]] for found in results), name)


def losses_and_gradients(model: peft.PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"logits": output.logits.detach()} | grads


@pytest.mark.parametrize("start", STARTS)
def test_a_start(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert_trains_as_peft(STARTS[start](tiny_llama_base(), CONFIG), 6, monkeypatch)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_of_layers(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    settings, calls = CHOICES[choice]
    model = plain(tiny_llama_base(), CONFIG | {"init_lora_weights": False} | settings)
    assert_trains_as_peft(model, calls, monkeypatch)


def test_target_parameters_of_other_layers_are_pefts_and_the_report_says_so() -> None:
    config = CONFIG | {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]}
    report = fastpeft.patch(plain(tiny_llama_base(), config))
    assert len(report.fused) == 2 and len(report.left_to_peft) == 2
    assert all("Linear, no experts of transformers'" in reason for reason in report.left_to_peft.values())

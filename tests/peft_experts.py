"""Tiny mixtures of experts for the tests of their drop-in, and how calls of their experts are made and counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from oracle import Results
from peft.tuners.lora.layer import ParamWrapper
from peft_layers import no_peft_forward, signed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastpeft.four_bit import from_bitsandbytes
from fastpeft.peft.fused_experts import FusedParamWrapper

HIDDEN = 32
EXPERTS = 4
PER_TOKEN = 2
_COMMON = {
    "vocab_size": 61,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": PER_TOKEN,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8},
    "Mixtral": {"num_local_experts": EXPERTS},
    "DeepseekV2": _DEEPSEEK,
    "DeepseekV3": _DEEPSEEK,
    "GptOss": {"num_local_experts": EXPERTS, "head_dim": 8},
    "Olmoe": {"num_experts": EXPERTS},
    "GraniteMoe": {"num_local_experts": EXPERTS},
    "NemotronH": {  # no gate
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "layers_block_type": ["moe", "attention"],
    },
}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def moe_base(kind: str = "Qwen3Moe") -> Any:
    """Two blocks, random weights from torch's generator."""
    config = getattr(transformers, f"{kind}Config")(**(_COMMON | KINDS[kind]))
    return AutoModelForCausalLM.from_config(config)


def parameters_of(kind: str) -> list[str]:
    """Those of the experts that are adapted."""
    return [f"experts.{'up_proj' if kind == 'NemotronH' else 'gate_up_proj'}", "experts.down_proj"]


def moe(kind: str = "Qwen3Moe", **config: Any) -> peft.PeftModel:
    """:func:`moe_base` with LoRA on its experts and on ``q_proj``, A and B random."""
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    settings |= {"target_modules": ["q_proj"], "target_parameters": parameters_of(kind)}
    model = peft.get_peft_model(moe_base(kind), peft.LoraConfig(**(settings | config)), autocast_adapter_dtype=False)
    return scaled(model)


def scaled(model: Any) -> Any:
    """``model`` whose experts' weights, which start small, weigh as much as their adapters."""
    for wrapper in wrappers(model):
        module = wrapper.get_base_layer()
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter, std=0.3 if name.endswith("_bias") else HIDDEN**-0.5)
    return model


def in_four_bits(
    model: Any, parameters: Sequence[str] = ("gate_up_proj", "down_proj"), **settings: Any
) -> tuple[Any, Any]:
    """A copy whose experts bitsandbytes has packed, and one with the dense weights that the 4 bits stand for."""
    packed, dense = copy.deepcopy(model), copy.deepcopy(model)
    for with_bits, without in zip(experts_of(packed), experts_of(dense), strict=True):
        for name in parameters:
            replace_parameter_4bit(with_bits, name, **settings)
            making, weight = with_bits.parametrizations[name], getattr(without, name)
            weight.data = from_bitsandbytes(making.original, making[0].quant_state).dequantize(weight.dtype)
    return packed, dense


def experts_of(model: nn.Module) -> list[Any]:
    """Transformers' own modules, in PEFT's wrappers or without."""
    return [module for module in model.modules() if hasattr(module, "is_transposed")]


def wrappers(model: nn.Module) -> list[Any]:
    """PEFT's outermost wrapper of each block's experts."""
    found = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inside = {id(wrapper.base_layer) for wrapper in found}
    return [wrapper for wrapper in found if id(wrapper) not in inside]


def fused_experts(model: nn.Module) -> list[str]:
    """Their names."""
    return [name for name, module in model.named_modules() if type(module) is FusedParamWrapper]


@contextmanager
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, no layer goes to PEFT's own forward, and what is yielded grows by an entry with each call of experts."""
    calls: list[str] = []
    run = FusedParamWrapper._run
    with monkeypatch.context() as patch, no_peft_forward(monkeypatch):
        patch.setattr(
            FusedParamWrapper, "_run", lambda self, *args: calls.append(self.parameter_name) or run(self, *args)
        )
        yield calls


Call = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(routing: str = "random", tokens: int = 48, per_token: int = PER_TOKEN) -> Call:
    """``x [T, K]``, indices and weights of experts ``[T, k]``, and what flows back, ``[T, K]``."""
    logits = torch.rand(tokens, EXPERTS)
    if routing == "to one expert":
        per_token, logits[:, 2] = 1, 2.0
    elif routing == "none to most":
        logits[:, 1:3] += 2
    elif routing == "to all":
        per_token = EXPERTS
    weights, index = logits.softmax(1).topk(per_token)
    if routing == "twice to the same":
        index = index[:, :1].expand_as(index)
    return signed(tokens, HIDDEN), index, weights, signed(tokens, HIDDEN)


def run(model: nn.Module, call: Call, autocast: torch.dtype | None = None) -> Results:
    """What the first block's experts give, and every gradient, by name; in the dtype of their weights."""
    wrapper = wrappers(model)[0]
    dtype = wrapper.get_param().dtype
    x, index, weights, dy = call
    x, weights = (each.to(dtype).detach().requires_grad_() for each in (x, weights))
    trained = {name: p for name, p in wrapper.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = wrapper(x, index, weights)
    grads = torch.autograd.grad(y, [x, weights, *trained.values()], dy.to(y.dtype), allow_unused=True)
    named = zip(["x", "weights", *trained], grads, strict=True)
    return {"y": y.detach()} | {name: grad for name, grad in named if grad is not None}

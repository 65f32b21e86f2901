"""Tiny models of random weights, and the methods on them once more as plain formulas, for test_methods*.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from fastpeft.methods import BitFit, Houlsby, LoReFT, Pfeiffer, apply

WIDTH, BLOCKS, VOCABULARY, LENGTH = 16, 2, 32, 7
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STACKS = {"bert": "bert.encoder.layer", "llama": "model.layers"}
PROJECTIONS = {
    "bert": ("attention.output.dense", "output.dense"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
}
MASK = torch.tensor([[1] * LENGTH, [1] * 4 + [0] * 3, [0] * 5 + [1] * 2])  # none, padded on the right, on the left
IDS = torch.randint(1, VOCABULARY, MASK.shape, generator=torch.Generator().manual_seed(0)) * MASK
CONFIGS = (
    Houlsby(bottleneck=5),
    Pfeiffer(bottleneck=5),
    Pfeiffer(bottleneck=1, activation="silu", layers=(1,)),
    BitFit(),
    LoReFT(rank=3, positions="f2+l1"),
    LoReFT(rank=1, positions="all", layers=(0,)),
)


def tiny_bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SHAPE, **NO_DROPOUT))


def tiny_llama() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, pad_token_id=0, attention_bias=True))


MODELS: dict[str, Callable[[], Any]] = {"bert": tiny_bert, "llama": tiny_llama}


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


def randomize(applied: Any, scale: float = 0.3) -> None:
    """Away from the start, where a method does next to nothing."""
    with torch.no_grad():
        for parameter in applied.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "relu": lambda z: z * (z > 0),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)),
}


def orthonormal(basis: Tensor) -> Tensor:
    """Gram-Schmidt, row after row."""
    rows: list[Tensor] = []
    for row in basis:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


def chosen_tokens(positions: str) -> list[tuple[int, int]]:
    """Sequence and place of the tokens that ``positions`` stands for, with the padding of ``MASK``."""
    tokens = []
    for sequence, mask in enumerate(MASK.tolist()):
        real = [place for place, bit in enumerate(mask) if bit]
        chosen = set(range(LENGTH)) if positions == "all" else set()
        for term in positions.split("+") if positions != "all" else []:
            count = int(term[1:])
            chosen |= set(real[:count] if term[0] == "f" else real[-count:])
        tokens += [(sequence, place) for place in sorted(chosen)]
    return tokens


def plain_bottleneck(h: Tensor, p: dict[str, Tensor], activation: str) -> Tensor:
    z = h @ p["down.weight"].T + p["down.bias"]
    return h + ACTIVATIONS[activation](z) @ p["up.weight"].T + p["up.bias"]


def plain_edit(h: Tensor, p: dict[str, Tensor], positions: str) -> Tensor:
    R, rows = orthonormal(p["basis"]), [list(sequence) for sequence in h]
    for sequence, place in chosen_tokens(positions):
        x = rows[sequence][place]
        rows[sequence][place] = x + R.T @ (p["source.weight"] @ x + p["source.bias"] - R @ x)
    return torch.stack([torch.stack(sequence) for sequence in rows])


def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """``module`` puts out ``change`` of what it did."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.forward = forward  # type: ignore[method-assign]


def plain(base: nn.Module, kind: str, config: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits, and each gradient of their weighted sum, of the method computed by its formula.

    Args:
        base: the model without the method. ``values``: what is trained, by its name.
    """
    model = copy.deepcopy(base).requires_grad_(False)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    for name, leaf in leaves.items():
        if name in dict(model.named_parameters()):
            path, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(path), attribute)
            setattr(model.get_submodule(path), attribute, leaf)

    def of(path: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{path}."): leaf for name, leaf in leaves.items() if name.startswith(f"{path}.")}

    for layer in range(BLOCKS) if config.layers is None else config.layers:
        block = f"{STACKS[kind]}.{layer}"
        if isinstance(config, LoReFT):
            p = of(f"{block}.loreft")
            changed(model.get_submodule(block), lambda h, p=p: plain_edit(h, p, config.positions))
        elif not isinstance(config, BitFit):
            for path in PROJECTIONS[kind] if isinstance(config, Houlsby) else PROJECTIONS[kind][1:]:
                p = of(f"{block}.{path}.adapter")
                place = model.get_submodule(f"{block}.{path}")
                changed(place, lambda h, p=p: plain_bottleneck(h, p, config.activation))
    return computed(model, leaves)


def computed(model: nn.Module, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits and each leaf's gradient of their weighted sum."""
    y = logits(model)
    weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), grads, strict=True)
    return {"logits": y.detach()} | {
        name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs
    }


def applied_to(kind: str, config: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Any]:
    """The model without the method, one with it (away from its start), and the handle."""
    base = MODELS[kind]().to(dtype).eval()
    model = copy.deepcopy(base)
    applied = apply(model, config)
    randomize(applied)
    return base, model, applied

"""Blocks and their projections are found in many architectures of transformers, and can be trained there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as t
from methods_models import NO_DROPOUT, SHAPE
from torch import nn

from fastpeft.methods import Houlsby, LoReFT, apply
from fastpeft.methods.blocks import find_blocks

IDS = torch.arange(1, 11).view(2, 5)
VISION = {name: value for name, value in SHAPE.items() if name != "vocab_size"} | {"image_size": 8, "patch_size": 4}
BLOOM = {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
TOKENS = {f"{name}_token_id": index for index, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
DISTIL = {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
OPT = SHAPE | {"ffn_dim": 24, "word_embed_proj_dim": 16}
BART = {"vocab_size": 32, "d_model": 16} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
}


@dataclass(frozen=True)
class Case:
    """A model, and where the projections of its first block are."""

    make: Callable[[], Any]
    block: str
    attention: str
    feed_forward: str
    inputs: tuple[str, ...] = ("input_ids",)
    blocks: int = 2


CASES = {
    "bert": Case(
        lambda: t.BertModel(t.BertConfig(**SHAPE, **NO_DROPOUT)),
        "encoder.layer.0",
        "attention.output.dense",
        "output.dense",
    ),
    "roberta": Case(
        lambda: t.RobertaModel(t.RobertaConfig(**SHAPE)), "encoder.layer.0", "attention.output.dense", "output.dense"
    ),
    "distilbert": Case(
        lambda: t.DistilBertModel(t.DistilBertConfig(**DISTIL)), "transformer.layer.0", "attention.out_lin", "ffn.lin2"
    ),
    "mpnet": Case(lambda: t.MPNetModel(t.MPNetConfig(**SHAPE)), "encoder.layer.0", "attention.attn.o", "output.dense"),
    "modernbert": Case(
        lambda: t.ModernBertModel(t.ModernBertConfig(**SHAPE, **TOKENS)), "layers.0", "attn.Wo", "mlp.Wo"
    ),
    "vit": Case(
        lambda: t.ViTModel(t.ViTConfig(**VISION)), "layers.0", "attention.o_proj", "mlp.fc2", ("pixel_values",)
    ),
    "gpt2": Case(lambda: t.GPT2Model(t.GPT2Config(**GPT2)), "h.0", "attn.c_proj", "mlp.c_proj"),
    "gptj": Case(lambda: t.GPTJModel(t.GPTJConfig(rotary_dim=4, **GPT2)), "h.0", "attn.out_proj", "mlp.fc_out"),
    "opt": Case(lambda: t.OPTModel(t.OPTConfig(**OPT)), "decoder.layers.0", "self_attn.out_proj", "fc2"),
    "llama": Case(lambda: t.LlamaModel(t.LlamaConfig(**SHAPE)), "layers.0", "self_attn.o_proj", "mlp.down_proj"),
    "phi": Case(lambda: t.PhiModel(t.PhiConfig(**SHAPE)), "layers.0", "self_attn.dense", "mlp.fc2"),
    "gpt_neox": Case(
        lambda: t.GPTNeoXModel(t.GPTNeoXConfig(**SHAPE)), "layers.0", "attention.dense", "mlp.dense_4h_to_h"
    ),
    "falcon": Case(lambda: t.FalconModel(t.FalconConfig(**SHAPE)), "h.0", "self_attention.dense", "mlp.dense_4h_to_h"),
    "bloom": Case(lambda: t.BloomModel(t.BloomConfig(**BLOOM)), "h.0", "self_attention.dense", "mlp.dense_4h_to_h"),
    "t5": Case(
        lambda: t.T5Model(t.T5Config(**T5)),
        "encoder.block.0",
        "layer.0.SelfAttention.o",
        "layer.1.DenseReluDense.wo",
        ("input_ids", "decoder_input_ids"),
        4,
    ),
    "bart": Case(lambda: t.BartModel(t.BartConfig(**BART)), "encoder.layers.0", "self_attn.out_proj", "fc2", blocks=4),
}


def trained_one_step(model: nn.Module, applied: Any, inputs: tuple[str, ...]) -> None:
    """Every parameter has a gradient, and the loss falls (a step is too small for it not to)."""
    values = {
        "pixel_values": torch.ones(2, 3, 8, 8, dtype=torch.float64),
        "input_ids": IDS,
        "decoder_input_ids": IDS,
    }

    def loss() -> torch.Tensor:
        state = model(**{name: values[name] for name in inputs}).last_hidden_state
        return (state * torch.linspace(-1, 1, state.numel()).view_as(state)).mean()

    first = loss()
    first.backward()
    assert all(parameter.grad is not None for parameter in applied.parameters())
    torch.optim.SGD(applied.parameters(), lr=1e-3).step()
    assert loss() < first


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_found_and_trained(name: str) -> None:
    case = CASES[name]
    model = case.make().double().eval()
    blocks = find_blocks(model)
    assert len(blocks) == case.blocks
    assert blocks[0].name == case.block
    assert blocks[0].module is model.get_submodule(case.block)
    for projection, path in (
        (blocks[0].attention_output(), case.attention),
        (blocks[0].feed_forward_output(), case.feed_forward),
    ):
        assert projection.name == f"{case.block}.{path}"
        assert projection.module is model.get_submodule(projection.name)
        assert projection.width == 16
    applied = apply(model, Houlsby(4))
    assert len(list(applied.parameters())) == 4 * 2 * case.blocks
    trained_one_step(model, applied, case.inputs)
    applied.remove()
    trained_one_step(model, apply(model, LoReFT(2, "f1+l1")), case.inputs)


def test_stacks_within_blocks_are_parts_of_them() -> None:
    names = [block.name for block in find_blocks(CASES["t5"].make())]
    assert names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_cross_attention_has_no_bottleneck() -> None:
    model = CASES["t5"].make()
    apply(model, Houlsby(4))
    assert not any("EncDecAttention" in name for name, _ in model.named_parameters() if "adapter" in name)

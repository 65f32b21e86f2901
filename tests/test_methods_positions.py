"""Which tokens LoReFT edits, and how it comes to know the padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from methods_models import IDS, LENGTH, MASK, SHAPE, WIDTH, chosen_tokens, randomize, tiny_bert, tiny_llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from fastpeft.methods import LoReFT, apply
from fastpeft.methods.positions import Positions, parse

TERMS = ("f1", "f3", "l1", "l3", "f2+l1", "f1+l2", "f4+l4", "f9+l9")


@pytest.mark.parametrize("text", TERMS)
def test_positions_count_real_tokens_alone(text: str) -> None:
    positions = parse(text)
    assert positions is not None
    found = positions.mask(MASK).nonzero().tolist()
    assert [tuple(token) for token in found] == chosen_tokens(text)


def test_what_positions_mean() -> None:
    assert parse("all") is None
    assert parse("f4+l12") == Positions(4, 12)
    assert parse("f10") == Positions(10, 0)
    assert parse("l3") == Positions(0, 3)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0] * 7])  # padding between; nothing but padding
    assert Positions(1, 2).mask(mask).tolist() == [[False, True, False, False, True, True, False], [False] * 7]


def edited(model: nn.Module, block: nn.Module, call: Any) -> list[tuple[int, int]]:
    """The tokens at which ``block``'s output differs when its edit is on."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(note)
    for enabled in (True, False):
        block.loreft.enabled = enabled
        call()
    handle.remove()
    block.loreft.enabled = True
    changed, own = outputs
    return [tuple(token) for token in (changed != own).any(-1).nonzero().tolist()]


@pytest.mark.parametrize("text", [*TERMS, "all"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_no_other_token_is_edited(kind: str, text: str) -> None:
    model = (tiny_bert if kind == "bert" else tiny_llama)().eval()
    randomize(apply(model, LoReFT(2, text, layers=(0,))))
    block = model.bert.encoder.layer[0] if kind == "bert" else model.model.layers[0]
    for call in (lambda: model(IDS, MASK), lambda: model(input_ids=IDS, attention_mask=MASK)):
        assert edited(model, block, call) == chosen_tokens(text)


def test_without_a_mask_every_token_is_real() -> None:
    model = tiny_bert().eval()
    randomize(apply(model, LoReFT(2, "f1+l2", layers=(0,))))
    tokens = edited(model, model.bert.encoder.layer[0], lambda: model(IDS))
    assert tokens == [(row, column) for row in range(3) for column in (0, LENGTH - 2, LENGTH - 1)]
    shape = {name: value for name, value in SHAPE.items() if name != "vocab_size"}
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **shape)).eval()
    randomize(apply(vit, LoReFT(2, "f1+l1", layers=(0,))))
    assert edited(vit, vit.layers[0], lambda: vit(torch.ones(1, 3, 8, 8))) == [(0, 0), (0, 4)]  # 4 patches after CLS


def test_padding_on_either_side_gives_the_same_answer() -> None:
    model = tiny_bert().eval()
    randomize(apply(model, LoReFT(2, "f2+l1")))
    nn.init.zeros_(model.bert.embeddings.position_embeddings.weight)  # or a token would know its place
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [0, 0, 5, 6, 7, 8]])
    hidden = model.bert(ids, attention_mask=(ids != 0).long()).last_hidden_state
    torch.testing.assert_close(hidden[0, :4], hidden[1, 2:], rtol=1e-5, atol=1e-5)


def test_a_mask_of_another_shape_is_refused_and_the_next_call_is_right() -> None:
    model = tiny_llama().eval()
    randomize(apply(model, LoReFT(2, "f1")))
    expected = model(IDS, MASK).logits
    square = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, T\] = \[3, 7\], got \[3, 1, 7, 7\]"):
        model.model(IDS, attention_mask=square)
    assert torch.equal(model(IDS, MASK).logits, expected)


def test_a_block_alone_is_refused() -> None:
    """Checkpointing that recomputes a block with its hooks, too: which padding it was is not known any more."""
    model = tiny_bert()
    apply(model, LoReFT(2, "f1"))
    encoder = model.bert.encoder
    with pytest.raises(RuntimeError, match="a block was called outside of its model's forward pass"):
        encoder.layer[0](torch.randn(1, 3, WIDTH))
    own = encoder.forward
    encoder.forward = lambda *args, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    loss = model(IDS, MASK).logits.sum()
    with pytest.raises(RuntimeError, match="Checkpointing has to recompute the block's forward"):
        loss.backward()


def test_generated_tokens_are_not_edited() -> None:
    """With a cache and without one the same prompt is edited, and nothing that follows."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=0, eos_token_id=None, bos_token_id=None)).eval()
    randomize(apply(model, LoReFT(2, "f1+l1", layers=(0,), modules_to_save=())))
    prompt, mask = IDS[[0, 2]].clamp(min=1), MASK[[0, 2]]
    with torch.no_grad():
        first = model(prompt, attention_mask=mask)
    step = first.logits[:, -1:].argmax(-1)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    block, cache = model.model.layers[0], first.past_key_values

    def continued() -> None:
        model(step, attention_mask=longer, past_key_values=copy.deepcopy(cache))

    assert edited(model, block, continued) == []
    assert edited(model, block, lambda: model(prompt, attention_mask=mask)) == [(0, 0), (0, 6), (1, 5), (1, 6)]
    generated = model.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, LENGTH + 4)


def test_an_encoder_and_a_decoder_have_masks_of_their_own() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).eval()
    randomize(apply(model, LoReFT(2, "l1", layers=(0, 2))))
    answer, answer_mask = IDS[:, :5].clamp(min=1), torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 1 + [0] * 4])

    def call() -> None:
        model(IDS, attention_mask=MASK, decoder_input_ids=answer, decoder_attention_mask=answer_mask)

    assert edited(model, model.encoder.block[0], call) == chosen_tokens("l1")
    model.encoder.block[0].loreft.enabled = False
    assert edited(model, model.decoder.block[0], call) == [(0, 4), (1, 2), (2, 0)]
    model.encoder.block[0].loreft.enabled = True
    assert model.generate(IDS, attention_mask=MASK, max_new_tokens=3).shape[0] == 3

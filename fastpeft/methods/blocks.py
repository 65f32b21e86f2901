"""Where a transformer's blocks are, and in each block the two projections that write into the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# A list of repeated blocks has one of these names; of nested lists (T5's `block.0.layer`) the outermost counts.
STACKS = ("layer", "layers", "h", "block", "blocks")
# Paths within a block, tried in this order.
ATTENTION_OUTPUTS = (
    "attention.output.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa
    "attention.out_lin",  # DistilBERT
    "attention.attn.o",  # MPNet
    "attention.o_proj",  # ViT
    "attention.dense",  # GPT-NeoX
    "attn.Wo",  # ModernBERT
    "attn.c_proj",  # GPT-2
    "attn.out_proj",  # GPT-J
    "attn.attention.out_proj",  # GPT-Neo
    "self_attn.o_proj",  # Llama, Qwen, Mistral, Gemma, SmolLM
    "self_attn.out_proj",  # OPT, BART, Whisper, CLIP
    "self_attn.dense",  # Phi
    "self_attention.dense",  # Falcon, BLOOM
    "layer.0.SelfAttention.o",  # T5
)
FEED_FORWARD_OUTPUTS = (
    "output.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa, MPNet
    "ffn.lin2",  # DistilBERT
    "mlp.fc2",  # ViT, CLIP, Phi
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, BLOOM
    "mlp.Wo",  # ModernBERT
    "mlp.c_proj",  # GPT-2, GPT-Neo
    "mlp.fc_out",  # GPT-J
    "mlp.down_proj",  # Llama, Qwen, Mistral, Gemma, SmolLM
    "fc2",  # OPT, BART, Whisper
    "layer.1.DenseReluDense.wo",  # T5's encoder
    "layer.2.DenseReluDense.wo",  # T5's decoder, after its cross-attention
)


@dataclass(frozen=True)
class Projection:
    """A linear layer whose output ``[..., width]`` is added to the residual stream; ``name`` is its full name."""

    name: str
    module: nn.Module
    width: int


@dataclass(frozen=True)
class Block:
    """A transformer block with its full name, and the model around its stack: what is given the 2-D attention mask."""

    name: str
    module: nn.Module
    owner: nn.Module

    def attention_output(self) -> Projection:
        """Self-attention's output projection. ValueError: it has none of the names in ``ATTENTION_OUTPUTS``."""
        return self._projection("attention's output projection", ATTENTION_OUTPUTS)

    def feed_forward_output(self) -> Projection:
        """The feed-forward's output projection. ValueError: it has none of the names in ``FEED_FORWARD_OUTPUTS``."""
        return self._projection("the feed-forward's output projection", FEED_FORWARD_OUTPUTS)

    def _projection(self, what: str, paths: tuple[str, ...]) -> Projection:
        modules = dict(self.module.named_modules())
        for path in paths:
            module = modules.get(path)
            width = getattr(module, "out_features", getattr(module, "nf", None))  # nf: GPT-2's Conv1D
            if module is not None and isinstance(width, int):
                return Projection(f"{self.name}.{path}", module, width)
        raise ValueError(
            f"{what} was not found in {self.name} (a {type(self.module).__name__}); looked for {', '.join(paths)}"
        )


def find_blocks(model: nn.Module) -> list[Block]:
    """Every block of ``model`` in the model's order: an encoder's come before its decoder's.

    Raises:
        ValueError: there is no list of blocks.
    """
    blocks = [
        Block(f"{name}.{index}", module, owner)
        for name, stack, owner in _stacks(model, "", model)
        for index, module in enumerate(stack)
    ]
    if not blocks:
        raise ValueError(
            f"model (a {type(model).__name__}) has no list of transformer blocks: none of its ModuleLists is called "
            f"{', '.join(STACKS)}"
        )
    return blocks


def chosen_blocks(model: nn.Module, layers: tuple[int, ...] | None) -> list[Block]:
    """The blocks with the numbers ``layers`` (counted from 0), or all.

    Raises:
        ValueError: there is no list of blocks, or a number is out of its range.
    """
    blocks = find_blocks(model)
    if layers is None:
        return blocks
    if max(layers) >= len(blocks):
        raise ValueError(f"layers must be between 0 and {len(blocks) - 1}, the model's last block, got {max(layers)}")
    return [blocks[layer] for layer in layers]


def _stacks(module: nn.Module, path: str, owner: nn.Module) -> Iterator[tuple[str, nn.ModuleList, nn.Module]]:
    """Name, stack and owner of each list of blocks below ``module``; the owner is the innermost whole model."""
    if hasattr(module, "main_input_name"):  # transformers' PreTrainedModel
        owner = module
    for name, child in module.named_children():
        full_name = f"{path}.{name}" if path else name
        if name in STACKS and isinstance(child, nn.ModuleList) and len(child):
            yield full_name, child, owner
        else:
            yield from _stacks(child, full_name, owner)

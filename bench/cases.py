"""What is measured: one linear layer or a small Llama-shaped model, the same weights and inputs at each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("cpu", "cuda")
LAYER_SHAPES = (
    (1, 2048, 2048),
    (1, 4096, 4096),
    (512, 1024, 1024),
    (512, 2048, 2048),
    (2048, 2048, 2048),
    (512, 4096, 4096),
)
GPU_LAYER_SHAPES = ((1, 4096, 4096), (512, 4096, 4096), (2048, 4096, 4096), (4096, 4096, 4096), (8192, 4096, 4096))
RANK = 16
DROPOUTS = (0.0, 0.05)
SEED = 0


class Case(Protocol):
    """A base model, its inputs, and what one pass over them is."""

    kind: ClassVar[str]
    target_modules: ClassVar[Sequence[str]]

    @property
    def dtype(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def method(self) -> str:
        """A key of :data:`fastpeft.experiments.models.METHODS`."""

    @property
    def device(self) -> str:
        """One of :data:`DEVICES`."""

    @property
    def shape(self) -> str:
        """Names the case in rows, tables and plots."""

    @property
    def phases(self) -> tuple[str, ...]:
        """Which of forward, step and generate are measured."""

    def base(self) -> nn.Module:
        """The frozen base; the same weights at each call."""

    def entry(self, model: nn.Module) -> nn.Module:
        """The module to call, given the model with or without adapters: what surrounds it is not timed."""

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """The input, and the gradient that the backward of :meth:`train` starts from (None: 1, of a loss)."""

    def train(self, entry: nn.Module, x: Tensor) -> Tensor:
        """What the training step's backward starts from: the layer's output, the model's loss."""

    def predict(self, entry: nn.Module, x: Tensor) -> Tensor:
        """The layer's output, the model's logits."""

    def token(self, x: Tensor) -> Tensor:
        """The part of ``x`` that is one token, for generation."""


@dataclass(frozen=True)
class LayerCase:
    """``x [M, K]`` through one linear layer ``W [N, K]`` without bias; ``x`` requires a gradient."""

    M: int
    K: int
    N: int
    dtype: str
    rank: int = RANK
    dropout: float = 0.0
    method: str = "lora"
    device: str = "cpu"

    kind: ClassVar[str] = "layer"
    target_modules: ClassVar[Sequence[str]] = ("linear",)

    @property
    def shape(self) -> str:
        return f"{self.M}×{self.K}×{self.N}"

    @property
    def phases(self) -> tuple[str, ...]:
        return ("forward", "step", "generate") if self.M == 1 and not self.dropout else ("forward", "step")

    def base(self) -> nn.Module:
        torch.manual_seed(SEED)
        linear = nn.Linear(self.K, self.N, bias=False, dtype=DTYPES[self.dtype], device=self.device)
        return nn.ModuleDict({"linear": linear}).requires_grad_(False)

    def entry(self, model: nn.Module) -> nn.Module:
        return next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "linear")

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        generator = torch.Generator(self.device).manual_seed(SEED)
        x, dy = (torch.randn(self.M, n, generator=generator, device=self.device) for n in (self.K, self.N))
        x, dy = x.to(DTYPES[self.dtype]), dy.to(DTYPES[self.dtype])
        return x.requires_grad_(), dy

    def train(self, entry: nn.Module, x: Tensor) -> Tensor:
        return entry(x)

    def predict(self, entry: nn.Module, x: Tensor) -> Tensor:
        return entry(x)

    def token(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class ModelCase:
    """A Llama-shaped model with random weights, one sequence of tokens, adapters on all seven projections of a block.

    The vocabulary is 4,096: a model this small with a real one (32,000 and more) would spend its step in the frozen
    output head, which every contestant shares. The embeddings' output requires a gradient, so that the frozen base,
    too, computes ``dx`` all the way down. Generation is one token on an empty cache.
    """

    dtype: str
    rank: int = RANK
    dropout: float = 0.0
    method: str = "lora"
    device: str = "cpu"
    tokens: int = 512
    layers: int = 4
    hidden: int = 1024
    intermediate: int = 2816
    heads: int = 16
    vocabulary: int = 4096

    kind: ClassVar[str] = "model"
    target_modules: ClassVar[Sequence[str]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    @property
    def shape(self) -> str:
        return f"Llama {self.layers}×{self.hidden}, {self.tokens} tokens"

    @property
    def phases(self) -> tuple[str, ...]:
        return ("step",) if self.dropout else ("step", "generate")

    def base(self) -> nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.tokens,
            use_cache=False,
        )
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.dtype]).requires_grad_(False)
        model.enable_input_require_grads()
        return model.to(self.device)

    def entry(self, model: nn.Module) -> nn.Module:
        return model

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(self.vocabulary, (1, self.tokens), generator=generator).to(self.device), None

    def train(self, entry: nn.Module, x: Tensor) -> Tensor:
        return entry(input_ids=x, labels=x).loss

    def predict(self, entry: nn.Module, x: Tensor) -> Tensor:
        return entry(input_ids=x).logits

    def token(self, x: Tensor) -> Tensor:
        return x[:, :1]

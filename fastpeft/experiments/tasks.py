"""The tasks: what is learnt, from which examples, and by which metrics the result is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .data import MOVIES, SITES, clear_reviews, read_rated, to_examples
from .encoding import Examples
from .files import CLASSIFICATION, KINDS, LANGUAGE, PAIR, REGRESSION, Columns, Learnable, read
from .glue import GLUE, REPOSITORY
from .metrics import METRICS
from .prose import read_plays
from .refusals import BadOption

_HELD_OUT_SHARE, _MOST_HELD_OUT = 10, 1000
_SIZE_OPTIONS = {"train": "--train-size", "validation": "--valid-size", "test": "--test-size"}
_SENTIMENT = ("negative", "positive")


@dataclass(frozen=True)
class Task:
    """A task: ``kind`` is one of :data:`files.KINDS`, ``classes`` are their names (None where there are none).

    ``metrics`` are keys of :data:`metrics.METRICS`; the first is the one that results are compared by.
    """

    name: str
    title: str
    kind: str
    metrics: tuple[str, ...]
    classes: tuple[str, ...] | None
    train: Examples
    valid: Examples
    test: Examples

    @property
    def metric(self) -> str:
        """The name of the first metric."""
        return self.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """Of the first metric."""
        return METRICS[self.metric].higher_is_better


@dataclass(frozen=True)
class Sizes:
    """How many examples (of a language: blocks of tokens) each split has at most.

    None: all that there are; but a tenth of the examples, at most 1000, where a split is cut from those to train on.
    """

    train: int | None = None
    valid: int | None = None
    test: int | None = None


ALL = Sizes()


@dataclass(frozen=True)
class BuiltIn:
    """A task whose examples come in a package's source archive; ``read(folder, seed)`` reads them, not yet split.

    ``group``: so many examples after each other stay in one split.
    """

    title: str
    kind: str
    read: Callable[[Path, int], Examples]
    classes: tuple[str, ...] | None = None
    group: int = 1


def _rated(folder: Path, tables: tuple[str, ...]) -> list[tuple[str, float]]:
    return read_rated(folder, tables, option="--folder")


def _reviews(folder: Path, seed: int) -> Examples:
    return to_examples(clear_reviews(_rated(folder, (MOVIES,))))


def _sites(folder: Path, seed: int) -> Examples:
    return to_examples(clear_reviews(_rated(folder, SITES)))


def _ratings(folder: Path, seed: int) -> Examples:
    """Also those near neutral; of a sentence that stands there twice the first rating."""
    ratings: dict[str, float] = {}
    for sentence, rating in _rated(folder, (MOVIES,)):
        ratings.setdefault(sentence, rating)
    return Examples(list(ratings), labels=list(ratings.values()))


def _pairs(folder: Path, seed: int) -> Examples:
    """Groups of four pairs, each sentence in one of them: two of one polarity, two of both.

    Either sentence of a pair alone says nothing: it is positive in half of the pairs of each class.
    """
    reviews = clear_reviews(_rated(folder, (MOVIES,)))
    shuffled = [reviews[i] for i in _shuffled(len(reviews), seed)]
    negative, positive = ([review.sentence for review in shuffled if review.label == label] for label in (0, 1))
    whole = min(len(negative), len(positive)) // _PAIR_GROUP * _PAIR_GROUP
    texts, pairs = [], []
    for i in range(0, whole, _PAIR_GROUP):
        bad, good = negative[i : i + _PAIR_GROUP], positive[i : i + _PAIR_GROUP]
        texts += [bad[0], good[0], bad[2], good[2]]
        pairs += [bad[1], good[1], good[3], bad[3]]
    return Examples(texts, pairs, [1, 1, 0, 0] * (whole // _PAIR_GROUP))


def _shakespeare(folder: Path, seed: int) -> Examples:
    return Examples(list(read_plays(folder).values()))


_PAIR_GROUP = 4
TASKS = {
    "reviews": BuiltIn("movie reviews: positive or negative", CLASSIFICATION, _reviews, _SENTIMENT),
    "sites": BuiltIn("product reviews, editorials, tweets: positive or negative", CLASSIFICATION, _sites, _SENTIMENT),
    "ratings": BuiltIn("movie reviews: their mean rating, -4 to 4", REGRESSION, _ratings),
    "pairs": BuiltIn("two movie reviews: of one polarity or not", PAIR, _pairs, ("different", "same"), _PAIR_GROUP),
    "shakespeare": BuiltIn("Shakespeare's plays: the next word", LANGUAGE, _shakespeare),
}


def load_task(
    name: str,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    kind: str | None = None,
    folder: Path = Path("data"),
    sizes: Sizes = ALL,
    seed: int = 0,
) -> Task:
    """The task ``name``: a key of :data:`TASKS` or :data:`GLUE`, or what :func:`files.read` reads.

    Args:
        text, text_pair, label: columns of a file or a data set of the hub; ``text`` and ``label`` where None.
        kind: one of :data:`files.KINDS`; None: what the columns say.
        folder: where the built-in tasks' archives lie.
        seed: of the splits, where the source has none, and of what stays in a split that is cut to size.

    Raises:
        BadOption: the option that cannot be met, and why.
        MissingPackage: an archive or a library is not there.
    """
    columns = {"--text": text, "--text-pair": text_pair, "--label": label}
    if kind is not None and kind not in KINDS:
        raise BadOption("--kind", f"unknown kind of task '{kind}'; there are: {', '.join(KINDS)}")
    if kind == LANGUAGE and label is not None:
        raise BadOption("--label", "--kind language has no label: the next token is learnt")
    if name in TASKS or name in GLUE:
        for option, value in (columns | {"--kind": kind}).items():
            if value is not None:
                raise BadOption(option, f"is for a file or a data set of the hub; the task {name} has its own")
    elif "/" not in name and not Path(name).exists():
        known = f"there are {', '.join(TASKS)}, GLUE's {', '.join(GLUE)}, a file, a folder, a hub's owner/name"
        raise BadOption("--data", f"unknown task '{name}'; {known}")

    title, metrics, group = name, None, 1
    if name in TASKS:
        own = TASKS[name]
        title, group = own.title, own.group
        found = Learnable(own.kind, own.classes, {"train": own.read(folder, seed)})
    elif name in GLUE:
        glue = GLUE[name]
        title, metrics = glue.title, glue.metrics
        found = read(REPOSITORY, Columns(*glue.columns), glue.kind, name, {"train": "train", "test": glue.test})
    else:
        found = read(name, Columns(text or "text", text_pair, label or "label"), kind)
    train, valid, test = _split(found, sizes, seed, group)
    if found.kind != LANGUAGE:
        for split, part in {"train": train, "validation": valid, "test": test}.items():
            _check_labels(part, split, name)
    return Task(name, title, found.kind, metrics or _metrics(found), found.classes, train, valid, test)


def _metrics(found: Learnable) -> tuple[str, ...]:
    if found.kind == LANGUAGE:
        return ("perplexity",)
    if found.classes is None:
        return ("pearson", "spearman")
    return ("accuracy", "f1" if len(found.classes) == 2 else "macro_f1")


def _split(found: Learnable, sizes: Sizes, seed: int, group: int) -> tuple[Examples, Examples, Examples]:
    """The examples to train on, to validate on and to test on; those to train on give what the source does not have."""
    wanted = {"test": sizes.test, "validation": sizes.valid, "train": sizes.train}
    for split, size in wanted.items():
        if size is not None and size < group:
            raise BadOption(_SIZE_OPTIONS[split], f"must be at least {group}, got {size}")
    whole = found.splits["train"]
    rest = [group * i + j for i in _shuffled(len(whole) // group, seed) for j in range(group)]
    parts: dict[str, Examples] = {}
    for split, blocks in wanted.items():
        size = None if found.kind == LANGUAGE else blocks
        if split in found.splits and split != "train":
            source = found.splits[split]
            index = _shuffled(len(source), seed)[:size] if size else range(len(source))
        else:
            if split != "train" and size is None:
                size = min(_MOST_HELD_OUT, len(whole) // _HELD_OUT_SHARE)
                if size < group:
                    raise BadOption("--data", f"{len(whole)} examples are too few to hold some out of them for a test")
            size = len(rest) if size is None else size - size % group
            source, index, rest = whole, rest[:size], rest[size:]
        parts[split] = source.take(index)
        if found.kind == LANGUAGE:
            parts[split] = replace(parts[split], blocks=blocks)
    if not len(parts["train"]):
        held_out = f"{len(parts['test'])} to test on and {len(parts['validation'])} to choose by"
        larger = "--test-size" if len(parts["test"]) >= len(parts["validation"]) else "--valid-size"
        raise BadOption(larger, f"{held_out} leave nothing of {len(whole)} examples to train on")
    return parts["train"], parts["validation"], parts["test"]


def _check_labels(part: Examples, split: str, name: str) -> None:
    """Where all labels are alike there is nothing to learn, and a score says nothing."""
    labels = part.labels or []
    if len(set(labels)) < 2:
        purpose = {"train": "to train on", "validation": "to choose by", "test": "to test on"}[split]
        option = "--data" if split == "train" else _SIZE_OPTIONS[split]
        raise BadOption(option, f"of {name} all {len(labels)} examples {purpose} have the same label")


def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

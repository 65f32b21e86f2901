"""Movie-review sentences with the mean rating that people gave them, made into two classes: SST-2-style data.

They are 10,605 sentences of Rotten Tomatoes reviews, each rated from -4 to 4 by twenty people (Hutto and Gilbert,
"VADER", ICWSM 2014). The source distribution of vaderSentiment holds them in an archive inside the archive.
"""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from .packages import MissingPackage

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
DOWNLOAD = "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d {folder}"
_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_CLEAR_RATING = 0.5


@dataclass(frozen=True)
class Review:
    """A sentence and its class: 1 positive, 0 negative."""

    sentence: str
    label: int


@dataclass(frozen=True)
class Encoded:
    """Sentences as a model takes them: ``input_ids`` and ``attention_mask`` ``[n, length]``, ``labels [n]``, int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Encoded:
        """The sentences at ``index [m]``."""
        return Encoded(self.input_ids[index], self.attention_mask[index], self.labels[index])

    def trimmed(self) -> Encoded:
        """The same without the columns on the right in which every sentence is padding."""
        width = int(self.attention_mask.sum(1).max())
        return Encoded(self.input_ids[:, :width], self.attention_mask[:, :width], self.labels)


def read_reviews(folder: Path) -> list[Review]:
    """The sentences with a clear rating (at least half a point from neutral), each once, in the archive's order.

    Raises:
        MissingPackage: ``folder`` does not hold the archive, or the archive does not hold the sentences.
    """
    archive = folder / ARCHIVE
    command = DOWNLOAD.format(folder=folder)
    classes: dict[str, int] = {}
    try:
        if not archive.is_file():
            raise MissingPackage(f"{archive}, which holds the movie reviews (--data names its folder),", command)
        with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(_INNER_ARCHIVE)) as inner:
            table = cast(IO[bytes], inner.extractfile(_TABLE)).read().decode("utf-8")
        for line in table.splitlines():
            _, rating, sentence = line.split("\t")
            if abs(float(rating)) >= _CLEAR_RATING:
                classes.setdefault(sentence.strip(), int(float(rating) > 0))
    except (EOFError, KeyError, OSError, ValueError, tarfile.TarError, zlib.error) as error:
        raise MissingPackage(f"a whole {archive} (this one: {error})", command) from error
    return [Review(sentence, label) for sentence, label in classes.items()]


def split_reviews(reviews: list[Review], test_size: int, seed: int) -> tuple[list[Review], list[Review]]:
    """Shuffles with ``seed`` and cuts: the training sentences and ``test_size`` test sentences.

    Raises:
        ValueError: ``test_size`` leaves nothing to train on.
    """
    if not 0 < test_size < len(reviews):
        raise ValueError(f"test_size must be between 1 and {len(reviews) - 1}, got {test_size}")
    order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [reviews[i] for i in order]
    return shuffled[test_size:], shuffled[:test_size]


def encode(reviews: list[Review], tokenizer: Any, length: int) -> Encoded:
    """Every sentence as ``length`` tokens, cut or padded on the right: every training step does the same work."""
    tokens = tokenizer(
        [review.sentence for review in reviews],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    return Encoded(tokens["input_ids"], tokens["attention_mask"], torch.tensor([review.label for review in reviews]))


def data_order(count: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """Which of ``count`` sentences each step takes, ``[steps, batch_size]``: epoch after epoch, each one shuffled."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)

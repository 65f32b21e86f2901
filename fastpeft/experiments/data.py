"""Sentences with the mean rating that people gave them, made into two classes: SST-2-style data.

They are 10,605 sentences of Rotten Tomatoes reviews, each rated from -4 to 4 by twenty people (Hutto and Gilbert,
"VADER", ICWSM 2014), and 13,098 of Amazon's product reviews, the New York Times's editorials and tweets. The source
distribution of vaderSentiment holds them in an archive inside the archive.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from .encoding import Encoded, Examples
from .encoding import encode as encode_examples
from .packages import MissingPackage

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
DOWNLOAD = "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d {folder}"
_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MOVIES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SITES = (
    "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "hutto_ICWSM_2014/tweets_GroundTruth.txt",
)
_CLEAR_RATING = 0.5


@dataclass(frozen=True)
class Review:
    """A sentence and its class: 1 positive, 0 negative."""

    sentence: str
    label: int


def read_rated(folder: Path, tables: Sequence[str] = (MOVIES,), option: str = "--data") -> list[tuple[str, float]]:
    """The sentences of ``tables`` and their mean ratings, in the archive's order; some stand there twice.

    Args:
        option: what names ``folder`` on the command line.

    Raises:
        MissingPackage: ``folder`` does not hold the archive, or the archive does not hold the sentences.
    """
    archive = folder / ARCHIVE
    command = DOWNLOAD.format(folder=folder)
    try:
        if not archive.is_file():
            raise MissingPackage(f"{archive}, which holds the movie reviews ({option} names its folder),", command)
        with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(_INNER_ARCHIVE)) as inner:
            texts = [cast(IO[bytes], inner.extractfile(table)).read().decode("utf-8") for table in tables]
        rows = [line.split("\t") for text in texts for line in text.splitlines()]
        return [(sentence.strip(), float(rating)) for _, rating, sentence in rows]
    except (EOFError, KeyError, OSError, ValueError, tarfile.TarError, zlib.error) as error:
        raise MissingPackage(f"a whole {archive} (this one: {error})", command) from error


def read_reviews(folder: Path) -> list[Review]:
    """:func:`clear_reviews` of the movie reviews that :func:`read_rated` reads."""
    return clear_reviews(read_rated(folder))


def clear_reviews(rated: Sequence[tuple[str, float]]) -> list[Review]:
    """The sentences with a clear rating (at least half a point from neutral), each once, in their order."""
    classes: dict[str, int] = {}
    for sentence, rating in rated:
        if abs(rating) >= _CLEAR_RATING:
            classes.setdefault(sentence, int(rating > 0))
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
    """Every sentence as ``length`` tokens, cut or padded on the right."""
    return encode_examples(to_examples(reviews), tokenizer, length)


def to_examples(reviews: Sequence[Review]) -> Examples:
    """The sentences as texts with a class each."""
    return Examples([review.sentence for review in reviews], labels=[review.label for review in reviews])

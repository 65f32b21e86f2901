"""The tasks of GLUE (Wang et al., ICLR 2019): their columns, and the metrics that GLUE judges them by."""

from __future__ import annotations

from dataclasses import dataclass

from .files import CLASSIFICATION, PAIR, REGRESSION

REPOSITORY = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """``columns`` of the text or of the two texts; ``metrics``, the first of which is the task's; the split to test on.

    The labels of GLUE's own test splits are not public: results are those on the validation split.
    """

    title: str
    columns: tuple[str, ...]
    kind: str = PAIR
    metrics: tuple[str, ...] = ("accuracy",)
    test: str = "validation"


GLUE = {
    "cola": GlueTask("CoLA: is the sentence grammatical", ("sentence",), CLASSIFICATION, ("matthews",)),
    "sst2": GlueTask("SST-2: is the review positive", ("sentence",), CLASSIFICATION),
    "mrpc": GlueTask("MRPC: do the two say the same", ("sentence1", "sentence2"), metrics=("f1", "accuracy")),
    "stsb": GlueTask(
        "STS-B: how alike are the two, 0 to 5", ("sentence1", "sentence2"), REGRESSION, ("pearson", "spearman")
    ),
    "qqp": GlueTask("QQP: do the two ask the same", ("question1", "question2"), metrics=("f1", "accuracy")),
    "mnli": GlueTask("MNLI: does the one follow", ("premise", "hypothesis"), test="validation_matched"),
    "qnli": GlueTask("QNLI: does the sentence answer", ("question", "sentence")),
    "rte": GlueTask("RTE: does the one follow", ("sentence1", "sentence2")),
    "wnli": GlueTask("WNLI: whom does the pronoun mean", ("sentence1", "sentence2")),
}

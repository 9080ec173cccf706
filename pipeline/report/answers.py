"""What a run's predictions show: its mistakes, how sure they were, how well each class is told."""

# Shape letters: N images, K classes.

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.core.evaluate import (
    ClassScore,
    class_scores,
    confusion,
    is_refused,
    reliability,
    wilson_interval,
    worst_mistakes,
)
from pipeline.data.splits import Split
from pipeline.images.read import png
from pipeline.report import figures
from pipeline.training.records import Predictions

MISTAKES = 50  # shown, at most
CONFUSIONS = 10  # named, at most
SHADES = 5  # of a cell in the confusion matrix


@dataclass(frozen=True)
class Mistake:
    """A test image that was taken for something else."""

    index: int  # in the test split
    truth: str
    said: str
    said_probability: float  # 0 to 1
    truth_probability: float
    picture: str | None  # a data: URL


@dataclass(frozen=True)
class Refused:
    """How many of the test images the model is not sure of, the threshold being what it is."""

    min_probability: float
    right: float  # fraction of the right answers, 0 to 1
    wrong: float | None  # and of the wrong ones, where there are any
    all: float


@dataclass(frozen=True)
class Answers:
    """What the run's predictions show."""

    images: int
    wrong: int
    interval: tuple[float, float]  # of the accuracy, 95 %
    matrix: tuple[tuple[tuple[int, int], ...], ...]  # (count, shade 0 to SHADES) by truth, said
    confusions: tuple[tuple[str, str, int], ...]  # truth, said, how often; the most frequent
    mistakes: tuple[Mistake, ...]
    scores: tuple[ClassScore, ...]
    figures: tuple[Markup, ...]
    refused: Refused | None  # of runs of old nothing is known


def answers(predictions: Predictions, summary: Mapping[str, Any], test: Split | None) -> Answers:
    """What the predictions show; with pictures where there is a `test` split to take them from."""
    outputs, labels = predictions.log_probabilities, predictions.labels
    classes = [str(name) for name in summary["classes"]]
    counts = confusion(outputs, labels)
    images, right = len(labels), int(counts.trace())
    before = reliability(predictions.untempered(summary["temperature"]), labels)
    after = reliability(outputs, labels)
    wrong = counts - np.diag(counts.diagonal())  # (K, K), mistakes alone
    shades = np.ceil(SHADES * np.sqrt(wrong / max(1, wrong.max()))).astype(int)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    cells = [divmod(int(cell), len(classes)) for cell in order]
    return Answers(
        images=images,
        wrong=images - right,
        interval=wilson_interval(right, images),
        matrix=tuple(
            tuple(zip(*rows, strict=True))
            for rows in zip(counts.tolist(), shades.tolist(), strict=True)
        ),
        confusions=tuple(
            (classes[truth], classes[said], int(wrong[truth, said]))
            for truth, said in cells
            if wrong[truth, said]
        ),
        mistakes=tuple(
            Mistake(
                index=index,
                truth=classes[labels[index]],
                said=classes[outputs[index].argmax()],
                said_probability=math.exp(outputs[index].max()),
                truth_probability=math.exp(outputs[index, labels[index]]),
                picture=picture(test.images[index]) if test else None,
            )
            for index in map(int, worst_mistakes(outputs, labels, MISTAKES))
        ),
        scores=class_scores(counts),
        figures=(
            Markup(figures.reliability_diagram(before, after)),
            Markup(figures.confidence_histogram(before, after)),
        ),
        refused=_refused(outputs, labels, summary.get("min_probability")),
    )


def _refused(
    outputs: np.ndarray, labels: np.ndarray, min_probability: float | None
) -> Refused | None:
    if min_probability is None:
        return None
    refused, right = is_refused(outputs, min_probability), outputs.argmax(axis=1) == labels
    return Refused(
        min_probability=min_probability,
        right=float(refused[right].mean()) if right.any() else 0.0,
        wrong=float(refused[~right].mean()) if not right.all() else None,
        all=float(refused.mean()),
    )


def picture(image: np.ndarray) -> str:
    """An image, uint8 (1, 28, 28), as a data: URL."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"

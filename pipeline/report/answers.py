"""The report's section on a run's predictions: mistakes, calibration and scores of each class."""

# Shape letters: N images, K classes.

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.core import evaluate
from pipeline.data.splits import Split
from pipeline.images.read import encode_png
from pipeline.report import figures
from pipeline.training.runs import Predictions

MISTAKES = 50  # most mistakes shown
CONFUSIONS = 10  # most confusions named
PALEST, SPAN = 0.12, 0.5  # opacity of one mistake in the confusion matrix, and what is above it
FEWEST = 20  # images of a point of the calibration curve: smaller bins are merged


@dataclass(frozen=True)
class Answers:
    """Contents of the section on the run's predictions."""

    images: int
    wrong: int
    interval: tuple[float, float]  # of the accuracy, 95 %
    # Count and opacity of its tint, by truth and answer; empty for strings, as are the scores.
    matrix: list[list[tuple[int, float]]]
    confusions: tuple[tuple[str, str, int], ...]  # truth, prediction, count; the most frequent
    mistakes: tuple[dict[str, Any], ...]  # of the test images with a wrong class, the worst
    scores: tuple[evaluate.ClassScore, ...]
    figures: tuple[Markup, ...]
    refused: Mapping[str, float | None] | None  # None without a threshold
    lengths: tuple[tuple[int, int, int], ...]  # of strings: digits, images, and how many are right
    fewest: int = FEWEST


def collect_answers(
    predictions: Predictions, summary: Mapping[str, Any], test: Split | None
) -> Answers:
    """Collect the section on the predictions, with pictures of the mistakes if `test` is given."""
    outputs, labels = predictions.log_probabilities, predictions.labels
    classes = [str(name) for name in summary["classes"]]
    said, logs = evaluate.read_answers(outputs)
    is_right = said == labels
    images, right = len(labels), int(is_right.sum())
    is_of_strings = outputs.ndim == 3
    names = labels if is_of_strings else np.array(classes)[labels]
    counts = np.zeros((0, 0), np.int64) if is_of_strings else evaluate.confusion(outputs, labels)
    sizes = np.char.str_len(labels) if is_of_strings else np.zeros(0, np.int64)
    true_logs = evaluate.log_likelihood(outputs, labels)
    refused: dict[str, float | None] | None = None
    if (min_probability := summary.get("min_probability")) is not None:
        is_unsure = evaluate.is_refused(outputs, min_probability)
        refused = {
            "min_probability": min_probability,
            "total": float(is_unsure.mean()),
            "right": float(is_unsure[is_right].mean()) if right else 0.0,
            "wrong": float(is_unsure[~is_right].mean()) if right < images else None,
        }
    raw = predictions.remove_temperature(summary["temperature"])
    curves, bins = (
        [evaluate.reliability(both, labels, fewest=fewest) for both in (raw, outputs)]
        for fewest in (FEWEST, 1)
    )
    wrong = counts - np.diag(counts.diagonal())  # (K, K), mistakes only
    strength = np.log(np.maximum(wrong, 1)) / max(1.0, math.log(wrong.max(initial=1)))
    tints = np.where(wrong, PALEST + SPAN * strength, 0).round(3)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    cells = [divmod(int(cell), len(classes)) for cell in order if wrong.flat[cell]]
    return Answers(
        images=images,
        wrong=images - right,
        interval=evaluate.wilson_interval(right, images),
        matrix=[
            list(zip(*row, strict=True))
            for row in zip(counts.tolist(), tints.tolist(), strict=True)
        ],
        confusions=tuple(
            (classes[truth], classes[predicted], int(wrong[truth, predicted]))
            for truth, predicted in cells
        ),
        mistakes=tuple(
            {
                "index": index,  # in the test split
                "truth": str(names[index]),
                "predicted": str(said[index]) if is_of_strings else classes[said[index]],
                "predicted_probability": math.exp(logs[index]),
                "truth_probability": math.exp(true_logs[index]),
                "picture": draw_picture(test.images[index]) if test else None,
            }
            for index in map(int, evaluate.worst_mistakes(outputs, labels, MISTAKES))
        ),
        scores=evaluate.class_scores(counts),
        figures=(Markup(figures.draw_reliability(*curves)), Markup(figures.draw_confidence(*bins))),
        refused=refused,
        lengths=tuple(
            (int(size), int((sizes == size).sum()), int(is_right[sizes == size].sum()))
            for size in np.unique(sizes)
        ),
    )


def draw_picture(image: np.ndarray) -> str:
    """Return an image, uint8 (1, H, W), as a data: URL of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"

"""Agreement table: how the predictors of one model answer the same images."""

# Shape letters: N images, K classes.

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, find_unequal, hash_scores, judge, predict, score
from pipeline.core.files import read_record
from pipeline.core.paths import Paths
from pipeline.core.text import Lines, columns
from pipeline.repository.release import Limits

TABLE_BATCH = 64  # images in a request


@dataclass(frozen=True)
class AgreementRow:
    """One predictor in the agreement table; all rows are compared with the first."""

    name: str
    accuracy: float  # fraction of images, 0 to 1
    differing: int  # images whose class differs from the first row's
    max_abs_diff: float | None  # from the first row's log-probabilities; None: not finite
    images_per_second: float | None  # in batches of 64, one after the other; None: recorded answers
    unequal: str | None = None  # of an exact model: which scores are not equal; empty if all are

    @property
    def cells(self) -> tuple[str, ...]:
        """The row's cells in the printed table."""
        largest = "not finite" if self.max_abs_diff is None else f"{self.max_abs_diff:.2e}"
        speed = "recorded" if self.images_per_second is None else f"{self.images_per_second:,.0f}"
        scores = {None: "-", "": "equal"}.get(self.unequal, f"NOT equal: {self.unequal}")
        return self.name, f"{self.accuracy:.2%}", str(self.differing), largest, speed, scores


@dataclass(frozen=True)
class Table:
    """Agreement of the predictors of one model on the same images."""

    name: str
    version: int
    sha256: str | None  # of its model.onnx
    images: int
    split: str  # which images: test or golden
    rows: tuple[AgreementRow, ...]

    def __str__(self) -> str:
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        title = f"{self.name} version {self.version}{digest}: {self.images:,} {self.split} images"
        header = ("", "accuracy", "differing", "max |diff|", "images/s", "scores")
        is_exact = any(row.unequal is not None for row in self.rows)
        count = len(header) if is_exact else len(header) - 1
        return Lines(title, columns(header[:count], [row.cells[:count] for row in self.rows]))


def measure_agreement(
    predictors: Mapping[str, Predictor],
    images: np.ndarray,
    labels: np.ndarray,
    scores: Mapping[str, Predictor] = {},
    exact_sha256: str | None = None,
) -> tuple[AgreementRow, ...]:
    """Compare predictors on images (N, ...) with the first of them; return a row for each.

    The `scores` of an exact model, by the same names, are compared with each other and with their
    digest. Raises CheckFailedError when outputs cannot be compared with those of the first.
    """
    rows: list[AgreementRow] = []
    reference, expected = None, None
    for name, predictor in predictors.items():
        predictor(images[:TABLE_BATCH])  # warm up: the first call of a runtime is slower
        start = time.perf_counter()
        outputs = predict(predictor, images, TABLE_BATCH)
        seconds = time.perf_counter() - start
        reference = outputs if reference is None else reference
        try:
            judgement = judge(reference, outputs)
        except CheckFailedError as error:
            raise CheckFailedError(f"{name}: {error}") from error
        difference, unequal = float(judgement.errors.max()), None
        if name in scores:
            answers = predict(scores[name], images, TABLE_BATCH)
            expected = answers if expected is None else expected
            unequal = find_unequal(expected, answers)
            if not unequal and hash_scores(answers) != exact_sha256:
                unequal = f"their digest is not {str(exact_sha256)[:12]}"
        rows.append(
            AgreementRow(
                name=name,
                accuracy=score(outputs, labels).accuracy,
                differing=int(judgement.is_changed.sum()),
                max_abs_diff=difference if np.isfinite(difference) else None,
                images_per_second=len(labels) / seconds,
                unequal=unequal,
            )
        )
    return tuple(rows)


def require_agreement(table: Table, limits: Limits) -> None:
    """Raise CheckFailedError when a row differs from the first by more than the limits."""
    mismatches = [
        f"{row.name}: {row.differing} images with another class, largest difference "
        f"{'not finite' if row.max_abs_diff is None else row.max_abs_diff}"
        for row in table.rows
        if row.differing > limits.differing
        or row.max_abs_diff is None
        or row.max_abs_diff > limits.max_abs_diff
    ]
    mismatches += [f"{row.name}: scores: {row.unequal}" for row in table.rows if row.unequal]
    if mismatches:
        raise CheckFailedError(
            f"{table.name}: answers differ from the reference ({table.rows[0].name}) by more than "
            f"{limits.max_abs_diff:.3g}, or in the class of more than {limits.differing} images: "
            f"{'; '.join(mismatches)}"
        )


def read_agreement(paths: Paths, precision: str = "fp32") -> Table:
    """Read the agreement table that the last validation of a model wrote."""
    file = paths.variant_agreement(precision)
    return read_record(file, Table, "run 'pipeline validate exported/model_repository'")

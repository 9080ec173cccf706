"""The table of agreement: how the predictors of one model answer the same images."""

# Shape letters: N images, K classes.

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, judge, predict, score
from pipeline.core.files import read_json
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.repository.release import Limits

TABLE_BATCH = 64  # images a request in the agreement table


@dataclass(frozen=True)
class Row:
    """One predictor in the table of agreement, beside the reference in its first row."""

    name: str
    accuracy: float  # fraction of images, 0 to 1
    differing: int  # images whose class differs from the reference's
    max_abs_diff: float | None  # from the reference's log-probabilities; None: not finite
    images_per_second: float | None  # in batches of 64, one after the other; None: not run

    def __str__(self) -> str:
        apart = "not finite" if self.max_abs_diff is None else f"{self.max_abs_diff:.2e}"
        speed = "recorded" if self.images_per_second is None else f"{self.images_per_second:,.0f}"
        return f"{self.name:<24} {self.accuracy:>8.2%} {self.differing:>9} {apart:>12} {speed:>10}"


@dataclass(frozen=True)
class Table:
    """How the predictors of one model agree on the same images."""

    name: str
    version: int
    sha256: str | None  # of its model.onnx
    images: int
    split: str  # which images: test or golden
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        title = f"{self.name} version {self.version}{digest}: {self.images:,} {self.split} images"
        header = f"{'':<24} {'accuracy':>8} {'differing':>9} {'max |diff|':>12} {'images/s':>10}"
        return Lines(title, header, *self.rows)


def agree(
    predictors: Mapping[str, Predictor],
    images: np.ndarray,
    labels: np.ndarray,
    recorded: np.ndarray | None = None,
) -> tuple[Row, ...]:
    """A row for each predictor on images (N, ...), held against the first one.

    Where answers (N, K) were `recorded`, they are the reference and the first row.
    """
    rows = [] if recorded is None else [_row("golden set", recorded, recorded, labels, None)]
    reference = recorded
    for name, predictor in predictors.items():
        predictor(images[:TABLE_BATCH])  # the first call of a runtime is not its speed
        start = time.perf_counter()
        outputs = predict(predictor, images, TABLE_BATCH)
        seconds = time.perf_counter() - start
        reference = outputs if reference is None else reference
        rows.append(_row(name, outputs, reference, labels, seconds))
    return tuple(rows)


def _row(
    name: str,
    outputs: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray,
    seconds: float | None,
) -> Row:
    try:
        judgement = judge(reference, outputs)
    except CheckFailedError as error:
        raise CheckFailedError(f"{name} {error}") from error
    apart = float(judgement.errors.max())
    return Row(
        name=name,
        accuracy=score(outputs, labels).accuracy,
        differing=int(judgement.is_changed.sum()),
        max_abs_diff=apart if np.isfinite(apart) else None,
        images_per_second=None if seconds is None else len(labels) / seconds,
    )


def require_agreement(table: Table, limits: Limits) -> None:
    """Raise CheckFailedError when a row lies too far from the first."""
    wrong = [
        f"{row.name}: {row.differing} differing classes, largest difference {row.max_abs_diff}"
        for row in table.rows
        if row.differing > limits.differing
        or row.max_abs_diff is None
        or row.max_abs_diff > limits.max_abs_diff
    ]
    if wrong:
        raise CheckFailedError(
            f"{table.name}: answers differ from the reference ({table.rows[0].name}) beyond "
            f"{limits.max_abs_diff:.3g} or in more than {limits.differing} classes: "
            f"{'; '.join(wrong)}"
        )


def read_agreement(paths: Paths) -> Table:
    """The table that the last proof of a model wrote."""
    record = read_json(paths.agreement, "run 'pipeline validate exported/model_repository'")
    fields = {name: record[name] for name in Table.__dataclass_fields__}
    return Table(**{**fields, "rows": tuple(Row(**row) for row in record["rows"])})

"""The golden set: a few images with the reference's answers, which a server must reproduce."""

# Shape letters: N images, K classes.

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib import format as npy

from pipeline.core.errors import CheckFailedError, CorruptError
from pipeline.core.evaluate import (
    Predictor,
    find_unequal,
    hash_scores,
    judge,
    margins,
    predict,
)
from pipeline.core.files import pack_arrays
from pipeline.core.text import Lines

GOLDEN_IMAGES = 100  # in all, divided evenly among the classes
MOST_CLASSES = 50  # above it, images are chosen from all classes together
_MAX_GOLDEN_BYTES = 64 * 1024 * 1024  # a limit for zip bombs: 100 MNIST images need 0.1 MB


@dataclass(frozen=True)
class Golden:
    """Images with the answers that a server must give, and a bound for each."""

    images: np.ndarray  # (N, ...), as the model takes them
    labels: np.ndarray  # (N,): the true answers; the reference's where there are no labels
    outputs: np.ndarray  # float64 (N, K), of strings (N, T, K + 1): the reference's answers
    bounds: np.ndarray  # float64 (N,): how far each output of a row may be from the reference
    scores: np.ndarray | None = None  # int32 (N, S): of an exact model, which must be equal

    def select(self, rows: np.ndarray | list[int]) -> "Golden":
        """Return the golden set of these rows."""
        scores = None if self.scores is None else self.scores[rows]
        return Golden(
            self.images[rows], self.labels[rows], self.outputs[rows], self.bounds[rows], scores
        )


def raise_problems(problems: Sequence[str], what: str, fix: str) -> None:
    """Raise CheckFailedError with the first ten problems and a fix, if there is any problem."""
    if problems:
        raise CheckFailedError(Lines(f"{what}:", *(f"  {text}" for text in problems[:10]), fix))


def choose_golden(
    images: np.ndarray,
    labels: np.ndarray,
    outputs: np.ndarray,
    bounds: np.ndarray,
    scores: np.ndarray | None = None,
) -> Golden:
    """Choose the images of each class with the largest and the smallest reference margins.

    Chooses 100 in all: ten for each class if there are ten classes. A class with fewer images gives
    all of them. Uses only images whose margin exceeds their bound, because for the others more than
    one class would pass. Raises CheckFailedError if there are no such images.

    `images` is (N, ...), `labels` (N,), `outputs` the reference's (N, ...) and `bounds` (N,). An
    exact model's `scores` are those of the first N rows or more.
    """
    ahead = margins(outputs)
    rows = np.flatnonzero(ahead > bounds)
    if not len(rows):
        raise CheckFailedError(
            "no image is fit for the golden set: the allowed error of each is at least the lead of "
            "its best class over the second. Train longer, or give clearer --images"
        )
    present = np.unique(labels[rows])
    groups, share = [rows], GOLDEN_IMAGES
    if len(present) <= MOST_CLASSES:
        groups = [rows[labels[rows] == label] for label in present]
        share = max(2, GOLDEN_IMAGES // len(present))
    chosen: list[int] = []
    for group in groups:
        ranked = group[np.argsort(-ahead[group], kind="stable")].tolist()
        hardest = ranked[::-1][: share // 2] if len(ranked) > share else []
        chosen += ranked[: share - len(hardest)] + hardest
    return Golden(images, labels, outputs, bounds, scores).select(np.array(chosen))


def compare_golden(
    golden: Golden, candidate: Predictor, sizes: tuple[int, ...], scores: Predictor | None = None
) -> list[str]:
    """Return what is wrong with a candidate's answers to the golden set, at each size of a batch.

    There is a sentence for each problem, and none if every row is within its bound and no class
    changes. The `scores` of an exact model must be equal. A candidate that raises CheckFailedError,
    returns another shape, or returns values that are not finite has a problem.
    """
    problems: list[str] = []
    for size in sizes:
        try:
            outputs = predict(candidate, golden.images, size)
            mismatches = judge(golden.outputs, outputs, golden.bounds).problems(range(len(outputs)))
        except CheckFailedError as error:
            problems.append(f"batch size {size}: {error}")
            continue
        if scores and golden.scores is not None:
            unequal = find_unequal(golden.scores, predict(scores, golden.images, size))
            mismatches += [f"scores: {unequal}"] if unequal else []
        problems += [f"batch size {size}: {mismatch}" for mismatch in mismatches]
    return problems


_ARRAYS = ("images", "labels", "outputs", "bounds")


def pack_golden(golden: Golden) -> bytes:
    """Return the golden set as the bytes of an .npz file; equal sets give equal bytes."""
    return pack_arrays({name: array for name, array in vars(golden).items() if array is not None})


def hash_golden(golden: Golden) -> str | None:
    """Return the SHA-256 of the scores in a golden set; None if it has none."""
    return None if golden.scores is None else hash_scores(golden.scores)


def unpack_golden(content: bytes, name: str) -> Golden:
    """Read a golden set from the bytes of an .npz file; `name` is its name in messages.

    Never unpickles. Raises CorruptError if the content is not a valid golden set, and
    CheckFailedError if a row's bound is not below its margin.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_GOLDEN_BYTES:
                raise CorruptError(f"{name} unpacks to more than {_MAX_GOLDEN_BYTES:,} bytes")
            for info in archive.infolist():  # before numpy allocates what a header states
                with archive.open(info) as member:
                    major, _ = npy.read_magic(member)
                    headers = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}
                    shape, _, dtype = headers[major](member)
                if math.prod(shape) * dtype.itemsize > info.file_size:
                    raise CorruptError(f"{name} is not a golden set: an array is cut short")
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        images, labels, outputs, bounds = (arrays[key] for key in _ARRAYS)
        scores = arrays.get("scores")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{name} is not a golden set: run 'pipeline validate' again") from error
    count = outputs.shape[:1]
    if (
        (images.shape[:1], labels.shape, bounds.shape) != (count, count, count)
        or (outputs.ndim not in (2, 3) or {outputs.dtype, bounds.dtype} != {np.dtype(np.float64)})
        or (scores is not None and (scores.dtype, scores.shape[:1]) != (np.int32, count))
        or (images.dtype.kind not in "iuf" or labels.dtype.kind not in "iuU")
        or (min(outputs.shape) < 1 or outputs.shape[-1] < 2)
        or not (np.isfinite(outputs).all() and (bounds > 0).all())
    ):
        raise CorruptError(f"{name} is not a golden set: its arrays do not fit each other")
    ahead = margins(outputs)
    loose = np.flatnonzero(~(ahead > bounds))
    if len(loose):
        raise CheckFailedError(
            f"{name} accepts wrong classes: the bound exceeds the margin in {len(loose)} of "
            f"{len(bounds)} images (image {loose[0]}: bound {bounds[loose[0]]:.3g}, margin "
            f"{ahead[loose[0]]:.3g}). Run 'pipeline validate' and 'pipeline package' again"
        )
    return Golden(images, labels, outputs, bounds, scores)


GOLDEN_BATCHES = (1, 2, 7)  # batch sizes at which a server is asked the golden set

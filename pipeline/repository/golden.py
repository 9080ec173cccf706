"""The golden set: a few images with the reference's answers, which a server must give as well."""

# Shape letters: N images, K classes.

import io
import math
import zipfile
from dataclasses import dataclass

import numpy as np

from pipeline.core.errors import CheckFailedError, CorruptError
from pipeline.core.evaluate import Predictor, judge, margins, predict
from pipeline.core.text import Lines

GOLDEN_IMAGES = 100  # shared out evenly among the classes
MOST_CLASSES = 50  # that get a share each; of more classes the hardest and the plainest of all
_MAX_GOLDEN_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Golden:
    """What a server must say to be the right one, and how far it may be off."""

    images: np.ndarray  # (N, ...), as the model takes them
    labels: np.ndarray  # int64 (N,): the true classes; without labels the reference's own
    outputs: np.ndarray  # float64 (N, K): what the module says without rounding
    bounds: np.ndarray  # float64 (N,): how far any of a row's outputs may lie from that

    def only(self, row: int) -> "Golden":
        """The set of just one image."""
        one = slice(row, row + 1)
        return Golden(self.images[one], self.labels[one], self.outputs[one], self.bounds[one])


@dataclass(frozen=True)
class Agreement:
    """How far a predictor lies from a golden set, and whether that passes."""

    images: int
    batch_sizes: tuple[int, ...]
    max_abs_diff: float | None  # over all outputs and batch sizes; None where one was not finite
    differing: int  # images whose class differs, at the worst batch size
    problems: tuple[str, ...]  # in words; none means that it passed

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batch_sizes))
        largest = "not finite" if self.max_abs_diff is None else f"{self.max_abs_diff:.2e}"
        return (
            f"{self.images:,} images at batch sizes {sizes}: {self.differing} differing classes, "
            f"largest difference {largest}"
        )


def choose_golden(
    images: np.ndarray, labels: np.ndarray, outputs: np.ndarray, bounds: np.ndarray
) -> Golden:
    """Choose of each class the plainest images and then the hardest, by the reference's margin.

    100 in all, ten a class where there are ten classes. A class with fewer images has them all.
    Only images whose margin exceeds their bound: of others any class could be right. Raises
    CheckFailedError when there are none.
    """
    ahead = margins(outputs)
    rows = np.flatnonzero(ahead > bounds)
    if not len(rows):
        raise CheckFailedError(
            f"no golden set can be made: each of {len(labels):,} images may be off by more than "
            "the margin between its classes, so that any answer would pass"
        )
    present = np.unique(labels[rows])
    if len(present) > MOST_CLASSES:
        chosen = _ends(rows, ahead, GOLDEN_IMAGES)
    else:
        share = max(2, GOLDEN_IMAGES // len(present))
        groups = [_ends(rows[labels[rows] == label], ahead, share) for label in present]
        chosen = np.concatenate(groups)
    return Golden(images[chosen], labels[chosen], outputs[chosen], bounds[chosen])


def _ends(rows: np.ndarray, ahead: np.ndarray, count: int) -> np.ndarray:
    """Of `rows`, the half of `count` with the largest margin, then the half with the smallest."""
    ranked = rows[np.argsort(-ahead[rows], kind="stable")]
    if len(ranked) <= count:
        return ranked
    hardest = ranked[::-1][: count // 2]
    return np.concatenate([ranked[: count - len(hardest)], hardest])


def compare_golden(golden: Golden, candidate: Predictor, batch_sizes: tuple[int, ...]) -> Agreement:
    """Compare `candidate` with the golden set at each batch size.

    A row may be off by its bound, and no class may change. A candidate that fails, answers in
    another shape, or is not finite does not pass.
    """
    problems: list[str] = []
    largest, differing = 0.0, 0
    for size in batch_sizes:
        try:
            outputs = predict(candidate, golden.images, size)
            judgement = judge(golden.outputs, outputs, golden.bounds)
        except CheckFailedError as error:
            problems.append(f"batch size {size}: {error}")
            continue
        largest = max(largest, float(judgement.errors.max()))
        differing = max(differing, int(judgement.is_changed.sum()))
        found = judgement.problems(range(len(outputs)))
        problems += [f"batch size {size}: {problem}" for problem in found]
    known = largest if math.isfinite(largest) else None
    return Agreement(len(golden.images), batch_sizes, known, differing, tuple(problems))


def require(agreement: Agreement, what: str, mend: str) -> Agreement:
    """`agreement` if it passed; otherwise CheckFailedError with its problems, and how to mend."""
    if agreement.passed:
        return agreement
    problems = (f"  {problem}" for problem in agreement.problems[:10])
    raise CheckFailedError(Lines(f"{what}:", *problems, mend))


_ARRAYS = tuple(Golden.__dataclass_fields__)


def pack_golden(golden: Golden) -> bytes:
    """The golden set as the bytes of an .npz file, the same each time."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: getattr(golden, name) for name in _ARRAYS})
    return buffer.getvalue()


def unpack_golden(content: bytes, name: str) -> Golden:
    """The golden set in the bytes of an .npz file.

    Raises CorruptError when it is not one, and CheckFailedError when a row's bound is not below
    its margin; nothing in it is unpickled.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_GOLDEN_BYTES:
                raise CorruptError(f"{name} unpacks to more than {_MAX_GOLDEN_BYTES} bytes")
            for info in archive.infolist():  # before numpy allocates what a header claims
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    read_header = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read_header(member)
                if math.prod(shape) * dtype.itemsize > info.file_size:
                    raise CorruptError(f"{name} is not a golden set: an array is cut short")
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        images, labels, outputs, bounds = (arrays[key] for key in _ARRAYS)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{name} is no golden set: run 'pipeline validate' again") from error
    count = outputs.shape[:1]
    if (
        (images.shape[:1], labels.shape, bounds.shape) != (count, count, count)
        or (outputs.ndim, outputs.dtype, bounds.dtype) != (2, np.float64, np.float64)
        or (images.dtype.kind not in "iuf" or labels.dtype.kind not in "iu")
        or (min(outputs.shape) < 1 or outputs.shape[1] < 2)
        or not (np.isfinite(outputs).all() and (bounds > 0).all())
    ):
        raise CorruptError(f"{name} is no golden set: its arrays do not belong together")
    loose = ~(margins(outputs) > bounds)
    if loose.any():
        row = int(loose.argmax())
        raise CheckFailedError(
            f"{name} accepts wrong classes: {int(loose.sum())} of {len(bounds)} images may be off "
            f"by more than their margin (image {row} by {bounds[row]:.3g} at a margin of "
            f"{margins(outputs)[row]:.3g}). Run 'pipeline validate' and 'pipeline package' again"
        )
    return Golden(images, labels, outputs, bounds)


GOLDEN_BATCHES = (1, 2, 7)  # at which a server is asked the golden set

"""Two predictors in, an Agreement out; and the golden set that carries a reference's answers."""

# Shape letters: N images, K classes.

import io
import zipfile
from dataclasses import dataclass

import numpy as np

from pipeline.config import IMAGES, Criterion
from pipeline.errors import CheckFailedError, CorruptError
from pipeline.evaluate import Predictor, difference, predict

GOLDEN_PER_CLASS = 2
_GOLDEN_ARRAYS = ("images", "labels", "log_probabilities")
_MAX_GOLDEN_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Agreement:
    """How far a candidate lies from its reference on the same images, and whether that passes."""

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


def validate(
    reference: Predictor, candidate: Predictor, images: np.ndarray, criterion: Criterion
) -> Agreement:
    """How far `candidate` lies from `reference` on images (N, ...), at each batch size.

    A candidate that fails, answers in another shape, or is not finite does not pass.
    """
    return compare(predict(reference, images), candidate, images, criterion)


def compare(
    expected: np.ndarray, candidate: Predictor, images: np.ndarray, criterion: Criterion
) -> Agreement:
    """As `validate`, against a reference's answers (N, K) that are known already."""
    problems = []
    largest, differing = 0.0, 0
    if not np.isfinite(expected).all():
        problems.append("the reference itself is not finite")
    for size in criterion.batch_sizes:
        try:
            outputs = predict(candidate, images, size)
        except CheckFailedError as error:
            problems.append(f"batch size {size}: {error}")
            continue
        if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
            problems.append(
                f"batch size {size}: answers {outputs.dtype} {outputs.shape} "
                f"instead of {expected.dtype} {expected.shape}"
            )
            continue
        apart = difference(expected, outputs)
        largest, differing = max(largest, apart.max_abs_diff), max(differing, apart.differing)
        problems += _judge(apart.max_abs_diff, apart.differing, size, apart.worst, criterion)
    known = largest if np.isfinite(largest) else None
    return Agreement(len(images), criterion.batch_sizes, known, differing, tuple(problems))


def _judge(
    max_abs_diff: float, differing: int, size: int, worst: int, criterion: Criterion
) -> list[str]:
    problems = []
    if differing > criterion.differing:
        problems.append(
            f"batch size {size}: {differing} images change class, {criterion.differing} may"
        )
    if not max_abs_diff <= criterion.max_abs_diff:
        problems.append(
            f"batch size {size}: image {worst} differs by {max_abs_diff:.3g}, "
            f"{criterion.max_abs_diff:g} is allowed"
        )
    return problems


def require(agreement: Agreement, what: str, mend: str) -> Agreement:
    """`agreement` if it passed; otherwise CheckFailedError with its problems, and how to mend."""
    if agreement.passed:
        return agreement
    shown = "\n  ".join(agreement.problems[:10])
    raise CheckFailedError(f"{what}:\n  {shown}\n{mend}")


def probe_images(seed: int = 0) -> np.ndarray:
    """Images (18, 1, 28, 28) that no data set has: blank, full, noise."""
    rng = np.random.default_rng(seed)
    blank = np.zeros((1, *IMAGES.shape), np.uint8)
    noise = rng.integers(0, 256, (16, *IMAGES.shape), dtype=np.uint8)
    return np.concatenate([blank, blank + 255, noise])


@dataclass(frozen=True)
class Golden:
    """A few images with the reference's answers: what a server must say to be the right one."""

    images: np.ndarray  # uint8 (N, 1, 28, 28)
    labels: np.ndarray  # int64 (N,): the true classes
    log_probabilities: np.ndarray  # float32 (N, K): the reference's answers


def choose_golden(images: np.ndarray, labels: np.ndarray, outputs: np.ndarray) -> Golden:
    """The first two images of each class that the reference reads rightly, with its answers."""
    right = outputs.argmax(axis=1) == labels
    chosen: list[int] = []
    for label in range(outputs.shape[1]):
        of_class = np.flatnonzero(labels == label)
        # Right ones first; a class that is never read rightly still has its two.
        ranked = of_class[np.argsort(~right[of_class], kind="stable")]
        chosen += ranked[:GOLDEN_PER_CLASS].tolist()
    return Golden(images[chosen], labels[chosen], outputs[chosen])


def pack_golden(golden: Golden) -> bytes:
    """The golden set as the bytes of an .npz file, the same each time."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(golden, name) for name in _GOLDEN_ARRAYS})
    return buffer.getvalue()


def unpack_golden(content: bytes, name: str) -> Golden:
    """The golden set in the bytes of an .npz file.

    Raises CorruptError when it is none; nothing in it is unpickled.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MAX_GOLDEN_BYTES:
                raise CorruptError(f"{name} unpacks to more than {_MAX_GOLDEN_BYTES} bytes")
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        images, labels, outputs = (arrays[key] for key in _GOLDEN_ARRAYS)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{name} is no golden set: run 'pipeline validate' again") from error
    is_whole = len(images) == len(labels) == len(outputs) > 0 and outputs.ndim == 2
    if not is_whole or outputs.dtype != np.float32:
        raise CorruptError(f"{name} is no golden set: its arrays do not belong together")
    return Golden(images, labels, outputs)

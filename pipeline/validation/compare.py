"""FileResult of an exported file with its module in float64, image by image. Needs numpy only.

Also makes images that no data set has: probes, and images that a graph must refuse.
"""

# Shape letters: N rows (images, then probes), M labelled images, K classes, R rows of a run.

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import (
    Predictor,
    hash_scores,
    judge,
    margins,
    mcnemar,
    predict,
    read_answers,
)

LISTED = 1000  # flips that a verdict lists
SETTLED = 0.1  # share of the rows beyond their bound at which the remaining runs are skipped
SPEED_BATCH = 64  # images in a call when images per second are measured
COPIED = 8  # rows that are also run in batches of copies
Report = Callable[[str], None]


@dataclass(frozen=True)
class Criterion:
    """Limits within which an exported file agrees with its module; set before any measurement."""

    batch_sizes: tuple[int, ...] = (1, 2, 3, 7, 64, 65, 256)  # each for all rows
    largest_batch: int = 256  # each size up to it is run on one batch; `package` allows no more
    threads: tuple[int, ...] = (1, 2)
    # The least error that is allowed for in a row: 8 units in the last place of float32, of the
    # row's largest output. A row's bound is twice the larger of that and eager's error.
    floor: float = 2**-20
    ratio: float = 8.0  # at most: the largest error divided by eager PyTorch's largest
    # Eager PyTorch's largest error, as a share of the images' median margin. In stable networks it
    # is about a millionth; above this limit, float32 is not precise enough for the network.
    unstable: float = 1e-3
    # Flips that are allowed in float32, each of an image whose margin is below its bound; of fewer
    # than 500 images one in a hundred.
    ties: int = 5
    # The accuracy that a variant may lose against the reference, as a fraction.
    lost_accuracy: tuple[tuple[str, float], ...] = (
        *(("fp16", 0.0002), ("int8", 0.001), ("exact", 0.0005)),
    )


@dataclass(frozen=True)
class Reference:
    """The module's answers to the rows in float64, and eager PyTorch's in float32."""

    outputs: np.ndarray  # float64 (N, ...)
    eager: np.ndarray  # float32 (N, ...)
    labels: np.ndarray  # (M,): the true answers to the first M rows; the rest are probes
    is_labelled: bool = True  # whether labels were given; else they are the reference's answers
    largest_bound: float = np.inf  # ceiling of the bound of any row in float32

    @property
    def errors(self) -> np.ndarray:
        """Eager PyTorch's largest error in each row, float64 (N,)."""
        return judge(self.outputs, self.eager).errors

    def accuracy(self, outputs: np.ndarray) -> float:
        """Return the fraction of the labelled rows that outputs (N, ...) answer correctly."""
        return float(self.is_right(outputs).mean())

    def is_right(self, outputs: np.ndarray) -> np.ndarray:
        """Tell for each labelled row whether it is answered correctly, bool (M,)."""
        return np.asarray(read_answers(outputs[: len(self.labels)])[0] == self.labels)


def compute_bounds(
    outputs: np.ndarray, known_errors: np.ndarray | float, criterion: Criterion
) -> np.ndarray:
    """Return each row's bound on the difference from the reference's outputs, float64 (N,).

    It is twice the larger of the row's known error and the floor, which grows with its outputs.
    """
    scale = np.maximum(1, np.abs(outputs).reshape(len(outputs), -1).max(axis=1))
    return np.asarray(2 * np.maximum(known_errors, criterion.floor * scale))


def allowed_flips(criterion: Criterion, images: int) -> int:
    """Return how many of `images` may change class in float32: `ties`, at most one in a hundred."""
    return min(criterion.ties, images // 100)


def require_stable(reference: Reference, criterion: Criterion) -> Reference:
    """Return the reference with a ceiling for its bounds, if the module is stable in float32.

    The ceiling is twice the largest error that a stable module may have: without one, an unstable
    module would excuse any file. Raises CheckFailedError when eager PyTorch's largest error in
    float32 exceeds the criterion's share of the images' median margin, when it changes the class of
    more images than `ties` allows, and when the median margin is 0.
    """
    images = len(reference.labels)
    margin = float(np.median(margins(reference.outputs[:images])))
    judgement = judge(reference.outputs, reference.eager)
    error, limit = float(judgement.errors.max()), criterion.unstable * margin
    changed = int(judgement.is_changed[:images].sum())
    if error > limit or changed > allowed_flips(criterion, images):
        raise CheckFailedError(
            f"the module is not stable in float32: its largest error is {error:.3g}, {limit:.3g} "
            f"is allowed at a median margin of {margin:.3g}, and {changed:,} of {images:,} images "
            "change class against float64. Look for half precision, masks such as -1e9 and large "
            "numbers that cancel out; end with torch.log_softmax"
        )
    if not limit:
        raise CheckFailedError(
            f"the module gives two classes the same output for at least half of {images:,} images: "
            "there is no margin to validate. Train it, or give other images"
        )
    return replace(reference, largest_bound=2 * limit)


@dataclass(frozen=True)
class Flip:
    """An image whose answer changed: a class, or a string."""

    row: int
    label: int | str  # the true answer
    reference: int | str  # the reference's
    said: int | str
    margin: float  # of the reference's answer over the next one


@dataclass(frozen=True)
class Verdict:
    """Result of comparing an exported file with its module."""

    precision: str
    images: int
    probes: int  # blank, full, single pixel, checkerboard, noise: in addition to the images
    batch_sizes: tuple[int, ...]  # each for all rows
    largest_batch: int  # every size up to it was run
    threads: tuple[int, ...]
    accuracy: float  # fraction of the images, 0 to 1
    lost_accuracy: float  # against the reference; negative when it is better
    flipped: int  # images whose class changed, allowed or not
    flips: tuple[Flip, ...]  # the first LISTED of them
    mcnemar_p: float  # probability that a change at least as uneven happens by chance
    max_error: float | None  # against the reference, over all rows and runs; None: not finite
    mean_error: float | None  # of the rows' largest errors
    eager_error: float  # eager float32's largest
    ratio: float | None  # of max_error to eager_error
    safety_factor: float | None  # the images' smallest margin divided by max_error
    images_per_second: dict[str, float]  # by threads, in batches of 64
    exact_sha256: str | None  # of the images' scores, of an exact file
    problems: tuple[str, ...]  # in words; none means that it passed

    def __str__(self) -> str:
        error = "not finite" if self.max_error is None else f"{self.max_error:.1e}"
        ratio = "" if self.ratio is None else f" ({format_ratio(self.ratio)} times eager's)"
        factor = "unknown" if self.safety_factor is None else format_ratio(self.safety_factor)
        speeds = " and ".join(
            f"{speed:,.0f} images/s on {threads} thread{'s' * (int(threads) != 1)}"
            for threads, speed in self.images_per_second.items()
        )
        flips = f"{self.flipped:,} flip{'s' * (self.flipped != 1)}"
        start = f"{self.precision}: accuracy {self.accuracy:.2%}, {flips}"
        parts = [start, f"largest error {error}{ratio}", f"safety factor {factor}", speeds]
        if self.exact_sha256:
            equal = "NOT equal" if self.problems else "equal"
            parts.append(f"scores {equal} in every run (exact_sha256 {self.exact_sha256[:12]})")
        return ", ".join(filter(None, parts))


def format_ratio(value: float) -> str:
    """Format a ratio with two significant digits, or as a whole number from 10 on."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


@dataclass(frozen=True)
class Run:
    """Rows to run through a file in batches of one size, with a number of threads."""

    size: int  # images a batch
    threads: int
    rows: np.ndarray  # int64: indices of the rows, at least one full batch
    is_whole: bool = False  # all rows

    def __str__(self) -> str:
        copies = " of one image" if self.size > 1 and len(set(self.rows)) == 1 else ""
        return f"batch size {self.size}{copies}, {self.threads} thread{'s' * (self.threads > 1)}"


def plan_runs(criterion: Criterion, count: int) -> Iterator[Run]:
    """Yield the runs over `count` rows: all rows at some sizes, one batch at every other size.

    The single batches take the rows in turn. One number of threads is enough for them: which kernel
    a runtime chooses for a size does not depend on it. Some batches are copies of one image, as in
    a load test.
    """
    for threads in criterion.threads:
        for size in sorted(criterion.batch_sizes, reverse=True):
            yield Run(size, threads, np.resize(np.arange(count), max(count, size)), is_whole=True)
    for row in range(0, count, max(1, count // COPIED)):
        for size in (2, 3, SPEED_BATCH):
            yield Run(size, criterion.threads[0], np.full(size, row))
    start = 0
    for size in sorted({*range(1, criterion.largest_batch + 1)} - {*criterion.batch_sizes}):
        yield Run(size, criterion.threads[0], np.arange(start, start + size) % count)
        start += size


@dataclass
class FileResult:
    """Results of one file's runs over the rows, collected run by run."""

    precision: str
    reference: Reference
    criterion: Criterion
    scores: np.ndarray | None = None  # int32 (N, S): those of an exact file
    bounds: np.ndarray = field(init=False)  # float64 (N,): the bound of each row
    errors: np.ndarray = field(init=False)  # float64 (N,): the largest of any run
    outputs: np.ndarray = field(init=False)  # (N, ...): each row in the run of its largest error
    first: np.ndarray | None = None  # (N, ...): outputs of the first run
    beyond: dict[str, np.ndarray] = field(default_factory=dict)  # run -> rows beyond their bound
    speeds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        outputs, errors = self.reference.outputs, self.reference.errors
        bounds = compute_bounds(outputs, errors, self.criterion)
        self.bounds = np.minimum(bounds, self.reference.largest_bound)
        self.errors, self.outputs = np.zeros(len(outputs)), self.reference.eager.copy()
        if not np.isfinite(outputs).all():
            self.problems.append("the reference itself is not finite")

    @property
    def answers(self) -> np.ndarray:
        """The answer to each row (N,): for fp32 in the row's worst run, else in the first run."""
        outputs = self.outputs if self.precision == "fp32" or self.first is None else self.first
        return read_answers(outputs)[0]

    def add(self, run: Run, outputs: np.ndarray) -> None:
        """Compare the outputs (R, ...) of a run with the reference, and with the first run.

        With them come an exact file's scores, (R, K + S), which must be equal. Raises
        CheckFailedError when they do not have eager PyTorch's shape and type.
        """
        rows, dtype = run.rows, self.reference.eager.dtype.type
        if self.scores is not None:
            count = self.reference.outputs.shape[1]
            outputs, scores = outputs[:, :count].astype(dtype), outputs[:, count:]
            unequal = rows[(scores != self.scores[rows]).any(axis=1)]
            if len(unequal):
                problem = f"{len(unequal):,} rows are not equal, the first is row {unequal[0]}"
                self.problems.append(f"{run}: the scores of {problem}")
        judgement = judge(self.reference.outputs[rows], outputs, self.bounds[rows], dtype)
        self.first = outputs[: len(self.errors)] if self.first is None else self.first
        errors = judgement.errors
        # A row may occur more than once in a run: numpy keeps the last of equal indices.
        worse = np.argsort(errors, kind="stable")
        worse = worse[errors[worse] > self.errors[rows[worse]]]
        self.errors[rows[worse]], self.outputs[rows[worse]] = errors[worse], outputs[worse]
        if self.precision != "fp32":
            judgement = judge(self.first[rows], outputs, self.bounds[rows])
        beyond = np.unique(rows[judgement.is_beyond])
        if len(beyond):
            self.beyond[str(run)] = beyond


def compare_file(
    precision: str,
    candidates: Mapping[int, Predictor],
    rows: np.ndarray,
    reference: Reference,
    criterion: Criterion,
    report: Report = lambda line: None,
    scores: np.ndarray | None = None,
) -> FileResult:
    """Compare a file with the reference on rows (N, ...), in all runs of the criterion.

    `candidates` has a predictor of the file for each number of threads. For fp32, each row must lie
    within its bound of the reference. In a lower precision, it must lie within that bound of the
    file's own first answer, in every batch and at every place in it. For an exact file, `scores`
    (N, S) are what it must answer as well.
    """
    result = FileResult(precision, reference, criterion, scores)
    for run in plan_runs(criterion, len(rows)):
        if any(len(beyond) > SETTLED * len(rows) for beyond in result.beyond.values()):
            break  # more runs would show nothing new
        every_size = f"every batch size to {criterion.largest_batch}"
        report(f"{precision}: {run if run.is_whole else every_size}")
        candidate, images = candidates[run.threads], rows[run.rows]
        images = images if run.is_whole else shift(images)
        is_timed = run.is_whole and run.size == SPEED_BATCH
        try:
            if is_timed:
                candidate(images[: run.size])  # warm up: the first call of a runtime is slower
            start = time.perf_counter()
            outputs = predict(candidate, images, run.size)
            seconds = time.perf_counter() - start
            result.add(run, outputs)
        except CheckFailedError as error:
            result.problems.append(f"{run}: {error}")
            continue
        if is_timed:
            result.speeds[str(run.threads)] = len(images) / seconds
    return result


def shift(images: np.ndarray) -> np.ndarray:
    """Copy images (N, ...) to an unaligned address: one value after the start of an array."""
    moved = np.empty(images.size + 1, images.dtype)[1:].reshape(images.shape)
    moved[:] = images
    return moved


def make_verdict(result: FileResult) -> Verdict:
    """Return the verdict on a file after all its runs."""
    reference, criterion = result.reference, result.criterion
    first = reference.eager if result.first is None else result.first
    answers, expected = result.answers, read_answers(reference.outputs)[0]
    margin = margins(reference.outputs)
    images, largest = len(reference.labels), float(result.errors.max())
    flips = np.flatnonzero((answers != expected)[:images])
    listed = flips[:LISTED]
    columns = (listed, reference.labels[listed], expected[listed], answers[listed], margin[listed])
    eager_error = float(reference.errors.max())
    # If the eager error is 0, divide by the rounding error of float32 instead.
    least = float(np.finfo(np.float32).eps) * max(1.0, float(np.abs(reference.outputs).max()))
    ratio = largest / max(eager_error, least)
    lost = reference.accuracy(reference.outputs) - reference.accuracy(first)
    is_finite = bool(np.isfinite(largest))
    return Verdict(
        precision=result.precision,
        images=images,
        probes=len(expected) - images,
        batch_sizes=criterion.batch_sizes,
        largest_batch=criterion.largest_batch,
        threads=criterion.threads,
        accuracy=reference.accuracy(first),
        lost_accuracy=lost,
        flipped=len(flips),
        flips=tuple(Flip(*row) for row in zip(*(c.tolist() for c in columns), strict=True)),
        mcnemar_p=mcnemar(reference.is_right(reference.outputs), reference.is_right(first)),
        max_error=largest if is_finite else None,
        mean_error=float(result.errors.mean()) if is_finite else None,
        eager_error=eager_error,
        ratio=ratio if is_finite else None,
        safety_factor=float(margin[:images].min()) / largest if is_finite and largest else None,
        images_per_second=result.speeds,
        exact_sha256=None if result.scores is None else hash_scores(result.scores[:images]),
        problems=(*result.problems, *_list_problems(result, ratio, lost)),
    )


def _list_problems(result: FileResult, ratio: float, lost: float) -> list[str]:
    """List the problems of a file; `ratio` is that of the errors, `lost` the lost accuracy."""
    reference, bounds, errors = result.reference, result.bounds, result.errors
    precision, images = result.precision, len(reference.labels)
    criterion, problems = result.criterion, []
    if result.beyond:
        rows = np.unique(np.concatenate([*result.beyond.values()]))
        reason = f"row {rows[0]} differs from its answer in the first run"
        if precision == "fp32":
            worst = rows[(errors[rows] / bounds[rows]).argmax()]
            reason = f"row {worst} differs by {errors[worst]:.3g}, {bounds[worst]:.3g} is allowed"
        runs = list(result.beyond)
        where = "; ".join(runs[:3]) + (f" and {len(runs) - 3} more runs" if len(runs) > 3 else "")
        count = f"{len(rows):,} of {len(errors):,} rows"
        problems.append(f"{count} differ by more than their bound ({where}): {reason}")
    if precision == "fp32":
        # Only a few answers may change, each with a margin below its bound.
        answers, expected = result.answers, read_answers(reference.outputs)[0]
        is_changed = answers != expected
        bad = np.flatnonzero(is_changed & (margins(reference.outputs) >= bounds))
        if len(bad):
            row = f"row {bad[0]} from {expected[bad[0]]} to {answers[bad[0]]}"
            problems.append(f"{len(bad):,} rows change class with a margin over their bound: {row}")
        flips, most = int(is_changed[:images].sum()), allowed_flips(criterion, images)
        if flips > most:
            problems.append(f"{flips:,} images change class, at most {most} may")
        if not ratio <= criterion.ratio:
            allowed = f"{criterion.ratio:g} times is allowed"
            problems.append(f"the largest error is {ratio:,.3g} times eager float32's, {allowed}")
    may_lose = dict(criterion.lost_accuracy).get(precision, np.inf)
    if lost > may_lose + 1e-9:  # a small tolerance, because accuracies are rounded fractions
        advice = "give more images, or " if images * may_lose < 1 else ""
        problems.append(
            f"accuracy falls by {100 * lost:.2f} points against fp32 ({round(lost * images)} of "
            f"{images:,} images), {100 * may_lose:.2f} is allowed: {advice}leave {precision} out"
        )
    return problems


def probe_images(images: np.ndarray) -> np.ndarray:
    """Return probes (20, ...): images that no data set has, within the range of `images` (N, ...).

    They are a blank, a full, a single-pixel and a checkerboard image, and 16 of noise.
    """
    shape, low, high = images.shape[1:], images.min(), images.max()
    if images.dtype == np.uint8:
        low, high = np.uint8(0), np.uint8(255)
    blank, full = np.full(shape, low, images.dtype), np.full(shape, high, images.dtype)
    pixel = blank.copy()
    pixel[tuple(side // 2 for side in shape)] = high
    squares = np.where(np.indices(shape).sum(axis=0) % 2, full, blank)
    noise = np.random.default_rng(0).random((16, *shape)) * (float(high) - float(low))
    noisy = (noise + float(low)).astype(images.dtype)
    return np.concatenate([[blank, full, pixel, squares], noisy])


def list_accepted(candidate: Predictor, images: np.ndarray) -> list[str]:
    """List the inputs of wrong type, rank or size that a graph for `images` (N, ...) accepts."""
    two = images[:2]
    other = np.float32 if two.dtype != np.float32 else np.float64
    wrong = {
        f"{other.__name__} instead of {two.dtype}": two.astype(other),
        "an axis too many": two[..., np.newaxis],
        "an axis too few": two[:, 0],
    }
    for axis in range(1, two.ndim):
        first = two.take([0], axis=axis)
        wrong[f"axis {axis} longer by one"] = np.concatenate([two, first], axis=axis)
        if two.shape[axis] > 1:
            wrong[f"axis {axis} of length 1"] = first
    accepted = []
    for what, rows in wrong.items():
        with contextlib.suppress(CheckFailedError):
            candidate(rows)
            accepted.append(f"the graph accepts images with {what}, which it must refuse")
    return accepted

"""An exported file held against its module in float64, image by image. Needs numpy only."""

# Shape letters: N rows (images, then probes), M labelled images, K classes.

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.config import Criterion
from pipeline.errors import CheckFailedError
from pipeline.evaluate import Predictor, margins, mcnemar, predict
from pipeline.golden import row_errors

LISTED = 1000  # flips
SETTLED = 0.1  # of the rows beyond their bound: then the rest of the runs is spared
SPEED_BATCH = 64  # images a call where images per second are told
_ULP = 2**-23  # a unit in the last place of float32, of a number between 1 and 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """What the module says of the rows in float64, and eager PyTorch in float32."""

    outputs: np.ndarray  # float64 (N, K)
    eager: np.ndarray  # float32 (N, K)
    labels: np.ndarray  # int64 (M,): the true classes of the first M rows; the rest are probes
    is_labelled: bool = True  # whether somebody labelled them; else they are the reference's own

    @property
    def errors(self) -> np.ndarray:
        """Eager PyTorch's own error in each row, float64 (N,)."""
        return row_errors(self.outputs, self.eager)

    def accuracy(self, outputs: np.ndarray) -> float:
        """The fraction of the labelled rows that outputs (N, K) read rightly."""
        return float(self.is_right(outputs).mean())

    def is_right(self, outputs: np.ndarray) -> np.ndarray:
        """Whether each labelled row is read rightly, bool (M,)."""
        right: np.ndarray = outputs[: len(self.labels)].argmax(axis=1) == self.labels
        return right


def bounds(outputs: np.ndarray, known_errors: np.ndarray, criterion: Criterion) -> np.ndarray:
    """How far each row may lie from the reference's outputs (N, K), float64 (N,).

    Twice the larger of an error that is known of it and the floor, which grows with its outputs.
    """
    scale = np.maximum(1, np.abs(outputs).max(axis=1))
    allowed: np.ndarray = 2 * np.maximum(known_errors, criterion.floor * scale)
    return allowed


@dataclass(frozen=True)
class Flip:
    """An image whose class changed."""

    row: int
    label: int  # the true class
    reference: int  # the class that the reference gives it
    said: int
    margin: float  # by which the reference's class was ahead


@dataclass(frozen=True)
class Verdict:
    """How far an exported file lies from its module, and whether that passes."""

    precision: str
    images: int
    probes: int  # blank, full, single pixel, checkerboard, noise: beside the images
    batch_sizes: tuple[int, ...]
    threads: tuple[int, ...]
    accuracy: float  # fraction of the images, 0 to 1
    lost_accuracy: float  # against eager float32; negative when it is better
    flipped: int  # images whose class changed, allowed or not
    flips: tuple[Flip, ...]  # the first thousand of them
    mcnemar_p: float  # how probable so uneven a change is by chance
    max_error: float | None  # against the reference, over all rows and runs; None: not finite
    mean_error: float | None  # of the rows' largest errors
    eager_error: float  # eager float32's largest
    ratio: float | None  # of the two largest errors
    safety_factor: float | None  # the images' smallest margin over the largest error
    images_per_second: dict[str, float]  # by threads, in batches of 64
    problems: tuple[str, ...]  # in words; none means that it passed

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        error = "not finite" if self.max_error is None else f"{self.max_error:.1e}"
        ratio = "" if self.ratio is None else f" ({rounded(self.ratio)} times eager's)"
        factor = "unknown" if self.safety_factor is None else rounded(self.safety_factor)
        speeds = " and ".join(
            f"{speed:,.0f} images/s on {threads} thread{'s' * (int(threads) != 1)}"
            for threads, speed in self.images_per_second.items()
        )
        flips = f"{self.flipped:,} flip{'s' * (self.flipped != 1)}"
        return (
            f"{self.precision}: accuracy {self.accuracy:.2%}, {flips}, largest error "
            f"{error}{ratio}, safety factor {factor}" + (f", {speeds}" if speeds else "")
        )


def rounded(value: float) -> str:
    """A ratio to two digits or so."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


@dataclass
class Held:
    """All runs of one file over the rows, as they come in."""

    reference: Reference
    errors: np.ndarray  # float64 (N,): the largest of any run
    outputs: np.ndarray  # (N, K): each row in the run in which it was worst
    own: np.ndarray | None = None  # (N, K): of the first run
    beyond: dict[str, np.ndarray] = field(default_factory=dict)  # run -> rows beyond their bound
    speeds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def said(self, precision: str) -> np.ndarray:
        """The class of each row (N,): of fp32 in its worst run, of others in the first."""
        outputs = self.outputs if precision == "fp32" or self.own is None else self.own
        classes: np.ndarray = outputs.argmax(axis=1)
        return classes

    @property
    def is_settled(self) -> bool:
        """Whether more runs could say nothing new: some row in ten is wrong already."""
        return any(rows.mean() > SETTLED for rows in self.beyond.values())


def hold(
    precision: str,
    candidates: Mapping[int, Predictor],
    rows: np.ndarray,
    reference: Reference,
    criterion: Criterion,
    say: Say = lambda line: None,
) -> tuple[Verdict, Held]:
    """The verdict on a file over rows (N, ...), from a candidate for each number of threads.

    A row of fp32 is held against the reference, one of a lower precision against the file's own
    first answer: in whatever batch and place, it has to be the same.
    """
    held = Held(reference, np.zeros(len(rows)), reference.eager.copy())
    allowed = bounds(reference.outputs, reference.errors, criterion)
    if not np.isfinite(reference.outputs).all():
        held.problems.append("the reference itself is not finite")
    for threads, candidate in candidates.items():
        for size in sorted(criterion.batch_sizes, reverse=True):
            run = f"batch size {size}, {threads} thread{'s' * (threads > 1)}"
            say(f"{precision}: {run}")
            _run(held, precision, candidate, rows, size, threads, run, allowed)
            if held.is_settled:
                return _verdict(precision, rows, held, allowed, criterion), held
    return _verdict(precision, rows, held, allowed, criterion), held


def _run(
    held: Held,
    precision: str,
    candidate: Predictor,
    rows: np.ndarray,
    size: int,
    threads: int,
    run: str,
    allowed: np.ndarray,
) -> None:
    try:
        candidate(rows[:size])  # the first call of a runtime is not its speed
        start = time.perf_counter()
        outputs = predict(candidate, rows, size)
        seconds = time.perf_counter() - start
    except CheckFailedError as error:
        held.problems.append(f"{run}: {error}")
        return
    wanted = held.reference.eager
    if outputs.shape != wanted.shape or outputs.dtype != wanted.dtype:
        held.problems.append(
            f"{run}: answers {outputs.dtype} {outputs.shape} "
            f"instead of {wanted.dtype} {wanted.shape}"
        )
        return
    held.own = outputs if held.own is None else held.own
    errors = row_errors(held.reference.outputs, outputs)
    worse = errors > held.errors
    held.errors[worse], held.outputs[worse] = errors[worse], outputs[worse]
    apart = errors if precision == "fp32" else row_errors(held.own, outputs)
    if (apart > allowed).any():
        held.beyond[run] = apart > allowed
    if size == SPEED_BATCH:
        held.speeds[str(threads)] = len(rows) / seconds


def _verdict(
    precision: str, rows: np.ndarray, held: Held, allowed: np.ndarray, criterion: Criterion
) -> Verdict:
    reference = held.reference
    own = reference.eager if held.own is None else held.own
    changed = held.said(precision) != reference.outputs.argmax(axis=1)
    images, largest = len(reference.labels), float(held.errors.max())
    eager_error = float(reference.errors.max())
    # An eager run without any error leaves nothing to divide by but rounding itself.
    least = _ULP * max(1.0, float(np.abs(reference.outputs).max()))
    ratio = largest / max(eager_error, least)
    problems = [*held.problems, *_beyond(precision, held, allowed)]
    if precision == "fp32":
        problems += _forbidden(changed, held, allowed)
        if not ratio <= criterion.ratio:
            problems.append(
                f"the largest error is {ratio:,.3g} times eager float32's, "
                f"{criterion.ratio:g} times is allowed"
            )
    lost = reference.accuracy(reference.eager) - reference.accuracy(own)
    problems += _lost(precision, lost, images, criterion)
    smallest = float(margins(reference.outputs[:images]).min())
    is_known = bool(np.isfinite(largest))
    return Verdict(
        precision=precision,
        images=images,
        probes=len(rows) - images,
        batch_sizes=criterion.batch_sizes,
        threads=criterion.threads,
        accuracy=reference.accuracy(own),
        lost_accuracy=lost,
        flipped=int(changed[:images].sum()),
        flips=_flips(changed, held.said(precision), reference),
        mcnemar_p=mcnemar(reference.is_right(reference.eager), reference.is_right(own)),
        max_error=largest if is_known else None,
        mean_error=float(held.errors.mean()) if is_known else None,
        eager_error=eager_error,
        ratio=ratio if is_known else None,
        safety_factor=smallest / largest if is_known and largest else None,
        images_per_second=held.speeds,
        problems=tuple(problems),
    )


def _beyond(precision: str, held: Held, allowed: np.ndarray) -> list[str]:
    """Which rows lie beyond their bound and in which runs, in one sentence."""
    if not held.beyond:
        return []
    rows = np.logical_or.reduce([*held.beyond.values()])
    if precision == "fp32":
        worst = int(np.where(rows, held.errors / allowed, 0).argmax())
        said = f"row {worst} differs by {held.errors[worst]:.3g}, {allowed[worst]:.3g} is allowed"
    else:
        said = f"row {int(rows.argmax())} does not answer as in the first run"
    runs = list(held.beyond)
    where = "; ".join(runs[:3]) + (f" and {len(runs) - 3} more runs" if len(runs) > 3 else "")
    return [f"{int(rows.sum()):,} of {len(rows):,} rows lie beyond their bound ({where}): {said}"]


def _forbidden(changed: np.ndarray, held: Held, allowed: np.ndarray) -> list[str]:
    wrong = changed & (margins(held.reference.outputs) >= allowed)
    if not wrong.any():
        return []
    row = int(wrong.argmax())
    was, said = held.reference.outputs[row].argmax(), held.outputs[row].argmax()
    return [f"{int(wrong.sum()):,} rows change class and none may: row {row} from {was} to {said}"]


def _lost(precision: str, lost: float, images: int, criterion: Criterion) -> list[str]:
    allowed = dict(criterion.lost_accuracy).get(precision)
    # A hair above, because accuracies are counts over counts.
    if allowed is None or lost <= allowed + 1e-9:
        return []
    few = "" if images * allowed >= 1 else "; so few images show no smaller loss, give more"
    return [
        f"accuracy falls by {100 * lost:.2f} points against fp32 ({round(lost * images)} of "
        f"{images:,} images), {100 * allowed:.2f} may be lost{few}, or leave {precision} out"
    ]


def _flips(changed: np.ndarray, said: np.ndarray, reference: Reference) -> tuple[Flip, ...]:
    ahead, labels = margins(reference.outputs), reference.labels
    return tuple(
        Flip(
            row=int(row),
            label=int(labels[row]),
            reference=int(reference.outputs[row].argmax()),
            said=int(said[row]),
            margin=float(ahead[row]),
        )
        for row in np.flatnonzero(changed[: len(labels)])[:LISTED]
    )

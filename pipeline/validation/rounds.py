"""Golden set rounds: a server is asked image by image, in batches, and concurrently."""

# Shape letters: N images of the golden set, M answers to them, K classes.

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.client.client import Client
from pipeline.core.errors import CheckFailedError, ServerError
from pipeline.core.evaluate import Judgement, judge
from pipeline.repository.golden import Golden

THREADS = 16  # threads of the concurrent round, which share one client
SIZES = (2, 7)  # batch sizes for all images, in addition to the largest that the server takes
LARGEST = 256  # images in a batch, even if the server takes more
SEED = 0  # of the order and the sizes of the concurrent requests
SMALL = 8  # images, at most, in most concurrent requests: the server merges several into a batch
PATIENCE = 10  # a whole round may take this many timeouts
WORST = 5  # images that a round lists


@dataclass(frozen=True)
class WorstAnswer:
    """The answer to an image with the largest ratio of error to bound."""

    index: int  # of the image in the golden set
    expected: int  # class
    got: int | None  # None: not finite
    error: float | None  # None: not finite
    bound: float


@dataclass(frozen=True)
class Round:
    """Result of asking a server the golden set in one mode."""

    mode: str  # single, batched or concurrent
    requests: int
    images: int  # answers; an image may be asked about more than once
    differing: int  # answers with another class than the reference's, or not finite
    max_abs_diff: float | None  # None: an answer was not finite
    max_ratio: float | None  # of an error to its image's bound; at most 1 passes
    worst: tuple[WorstAnswer, ...]  # the largest ratio first
    versions: tuple[str, ...]  # of the model, that answered
    seconds: float
    problems: tuple[str, ...]  # in words; none means that it passed

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def cells(self) -> tuple[str, ...]:
        """The round as a row of `HEADER`."""
        apart = "not finite" if self.max_abs_diff is None else f"{self.max_abs_diff:.2e}"
        ratio = "-" if self.max_ratio is None else f"{self.max_ratio:.1%}"
        counts = f"{self.requests:,}", f"{self.images:,}", str(self.differing)
        return self.mode, *counts, apart, ratio, "right" if self.passed else "WRONG"


HEADER = ("", "requests", "answers", "differing", "max |diff|", "of allowed", "")


def plans(count: int, largest: int) -> dict[str, list[np.ndarray]]:
    """Plan the requests of each mode: the indices, below `count`, of the images in each request.

    `largest` is the server's largest batch; without batching (1 or less) there is no batched round.
    There are batches of every size up to `largest`, most sizes once, and some of copies of one
    image: a model may be wrong at a single size, or on copies. The concurrent requests are
    shuffled, always in the same way.
    """
    largest = max(1, min(largest, LARGEST))
    single = [np.array([index]) for index in range(count)]
    batched = [rows for size in sorted({*SIZES, largest}) for rows in _chunks(count, size, largest)]
    start = 0
    for size in sorted({*range(2, largest)} - {*SIZES}):
        batched.append(np.arange(start, start + size) % count)
        start += size
    copied = [size for size in sorted({*SIZES, largest}) if 1 < size <= largest]
    batched += [np.full(size, index) for index in (0, count // 2) for size in copied]
    rng = np.random.default_rng(SEED)
    mixed = [rows for _ in range(2) for rows in _mixed(rng, count, min(SMALL, largest))]
    mixed += [*_mixed(rng, count, largest), *single, *single]
    order = rng.permutation(len(mixed))
    asked = {"single": single, "batched": batched, "concurrent": [mixed[index] for index in order]}
    return {mode: requests for mode, requests in asked.items() if requests}


def _chunks(count: int, size: int, largest: int) -> list[np.ndarray]:
    """Split all images, in order, into batches of `size`; at least one of them is full."""
    if size == 1 or size > largest:
        return []
    rows = np.resize(np.arange(count), max(count, size))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _mixed(rng: np.random.Generator, count: int, largest: int) -> list[np.ndarray]:
    """Split all images, in random order, into batches of random sizes up to `largest`."""
    sizes = rng.integers(1, largest + 1, size=count)
    return [rows for rows in np.split(rng.permutation(count), np.cumsum(sizes)) if len(rows)]


_Answer = tuple[np.ndarray, np.ndarray, str]  # rows (R,), outputs (R, K), version


def ask_golden(client: Client, golden: Golden) -> list[Round]:
    """Ask a server the golden set in each mode, and judge every answer by its own image.

    Raises ServerError when a call takes longer than the client's timeout, or a round longer than
    PATIENCE times that.
    """
    rounds = []
    for mode, requests in plans(len(golden.images), client.config().max_batch_size).items():
        start = time.monotonic()
        threads = THREADS if mode == "concurrent" else 1
        answered = _answers(client, golden, requests, threads)
        rounds.append(_judged(mode, golden, answered, time.monotonic() - start))
    return rounds


def _answers(
    client: Client, golden: Golden, requests: Sequence[np.ndarray], threads: int
) -> list[_Answer]:
    """Return the answer to each request, asked by `threads` threads that share the client."""
    deadline = time.monotonic() + PATIENCE * client.timeout

    def answer(rows: np.ndarray) -> _Answer:
        if time.monotonic() > deadline:
            raise ServerError(
                f"{client.endpoint} needs more than {PATIENCE * client.timeout:g} s for "
                f"{len(requests)} requests: give it more with --timeout"
            )
        return rows, *client.infer(golden.images[rows])

    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(answer, requests))
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure, no more requests start


def _judged(mode: str, golden: Golden, answered: Sequence[_Answer], seconds: float) -> Round:
    """Judge every answer by its image's bound, and list the images with the worst answers."""
    rows = np.concatenate([asked for asked, _, _ in answered])  # (M,)
    try:
        judged = [
            judge(golden.outputs[asked], outputs, golden.bounds[asked])
            for asked, outputs, _ in answered
        ]
        judgement = Judgement(*map(np.concatenate, zip(*judged, strict=True)))
        problems = judgement.problems(rows)
    except CheckFailedError as error:
        wanted = golden.outputs[rows]
        judgement = judge(wanted, np.full_like(wanted, np.nan), golden.bounds[rows])
        problems = [str(error)]
    farthest: dict[int, int] = {}  # image -> its answer with the largest ratio
    for answer in np.argsort(-judgement.ratios, kind="stable"):
        farthest.setdefault(int(rows[answer]), int(answer))
    is_finite = np.isfinite(judgement.errors)
    return Round(
        mode=mode,
        requests=len(answered),
        images=len(rows),
        differing=int((judgement.is_changed | ~is_finite).sum()),
        max_abs_diff=_finite(judgement.errors.max()),
        max_ratio=_finite(judgement.ratios.max()),
        worst=tuple(
            WorstAnswer(
                index=index,
                expected=int(judgement.expected[answer]),
                got=int(judgement.classes[answer]) if is_finite[answer] else None,
                error=_finite(judgement.errors[answer]),
                bound=float(judgement.bounds[answer]),
            )
            for index, answer in list(farthest.items())[:WORST]
        ),
        versions=tuple(sorted({version for _, _, version in answered})),
        seconds=seconds,
        problems=tuple(problems),
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

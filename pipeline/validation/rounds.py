"""Rounds of a golden set through a server: image by image, in batches, and concurrently."""

# Shape letters: N images of the golden set, M answers to them, K classes.

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.client.client import Client
from pipeline.core.errors import CheckFailedError, ServerError
from pipeline.core.evaluate import Judgement, judge
from pipeline.core.signature import SCORES
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
    expected: int | str  # the reference's class, or string
    got: int | str | None  # None: not finite
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
    is_exact: bool = False  # whether an exact model's scores were compared as well

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def cells(self) -> tuple[str, ...]:
        """The round as a row of `HEADER`."""
        largest = "not finite" if self.max_abs_diff is None else f"{self.max_abs_diff:.2e}"
        ratio = "-" if self.max_ratio is None else f"{self.max_ratio:.1%}"
        counts = f"{self.requests:,}", f"{self.images:,}", str(self.differing)
        verdict = ("equal" if self.is_exact else "right") if self.passed else "WRONG"
        return self.mode, *counts, largest, ratio, verdict


HEADER = ("", "requests", "answers", "differing", "max |diff|", "of allowed", "")


def plan_requests(count: int, largest: int) -> dict[str, list[np.ndarray]]:
    """Plan the requests of each mode: the indices, below `count`, of the images in each request.

    `largest` is the server's largest batch; without batching (1 or less) there is no batched round.
    There are batches of every size up to `largest`, most sizes once, and some of copies of one
    image: a model may be wrong at a single size, or on copies. The concurrent requests are
    shuffled, always in the same way.
    """
    largest = max(1, min(largest, LARGEST))
    single = [np.array([index]) for index in range(count)]
    sizes = [size for size in sorted({*SIZES, largest}) if 1 < size <= largest]
    batched = []
    for size in sizes:  # all images, in order; at least one batch is full
        rows = np.resize(np.arange(count), max(count, size))
        batched += [rows[start : start + size] for start in range(0, len(rows), size)]
    start = 0
    for size in sorted({*range(2, largest)} - {*SIZES}):
        batched.append(np.arange(start, start + size) % count)
        start += size
    batched += [np.full(size, index) for index in (0, count // 2) for size in sizes]
    rng = np.random.default_rng(SEED)
    mixed = [rows for _ in range(2) for rows in _mix(rng, count, min(SMALL, largest))]
    mixed += [*_mix(rng, count, largest), *single, *single]
    order = rng.permutation(len(mixed))
    plan = {"single": single, "batched": batched, "concurrent": [mixed[index] for index in order]}
    return {mode: requests for mode, requests in plan.items() if requests}


def _mix(rng: np.random.Generator, count: int, largest: int) -> list[np.ndarray]:
    """Split all images' indices, in random order, into batches of random sizes up to `largest`."""
    sizes = rng.integers(1, largest + 1, size=count)
    return [rows for rows in np.split(rng.permutation(count), np.cumsum(sizes)) if len(rows)]


_Requests = list[np.ndarray]  # the rows (R,) of each
_Answer = tuple[np.ndarray, np.ndarray, str]  # rows (R,), outputs (R, K), version


def ask_golden(client: Client, golden: Golden) -> list[Round]:
    """Ask a server the golden set in each mode, and judge every answer by its own image.

    Raises ServerError when a call takes longer than the client's timeout, or a round longer than
    PATIENCE times that.
    """
    rounds = []
    for mode, requests in plan_requests(len(golden.images), client.config().max_batch_size).items():
        start = time.monotonic()
        threads = THREADS if mode == "concurrent" else 1
        answers, scores = _ask(client, golden, requests, threads), list[_Answer]()
        if golden.scores is not None:
            scores = _ask(client, golden, requests, threads, SCORES)
        seconds = time.monotonic() - start
        rounds.append(_judge_round(mode, golden, answers, seconds, scores))
    return rounds


def _ask(
    client: Client, golden: Golden, requests: _Requests, threads: int, output: str = ""
) -> list[_Answer]:
    """Return the answer to each request, sent by `threads` threads that share the client."""
    deadline = time.monotonic() + PATIENCE * client.timeout

    def answer(rows: np.ndarray) -> _Answer:
        if time.monotonic() > deadline:
            raise ServerError(
                f"{client.endpoint} takes more than {PATIENCE * client.timeout:g} s for "
                f"{len(requests)} requests. Allow more time with --timeout"
            )
        return rows, *client.infer(golden.images[rows], output=output)

    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(answer, requests))
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure, no more requests start


def _judge_round(
    mode: str,
    golden: Golden,
    answers: Sequence[_Answer],
    seconds: float,
    scores: Sequence[_Answer] = (),
) -> Round:
    """Judge every answer by its image's bound, and list the images with the worst answers.

    The `scores` of an exact model must be equal to those of the golden set.
    """
    rows = np.concatenate([images for images, _, _ in answers])  # (M,)
    try:
        parts = [judge(golden.outputs[i], outputs, golden.bounds[i]) for i, outputs, _ in answers]
        columns = zip(*((p.errors, p.bounds, p.outputs, p.reference) for p in parts), strict=True)
        judgement = Judgement(*map(np.concatenate, columns))
        problems = judgement.problems(rows)
    except CheckFailedError as error:
        wanted = golden.outputs[rows]
        judgement = judge(wanted, np.full_like(wanted, np.nan), golden.bounds[rows])
        problems = [str(error)]
    if golden.scores is not None:
        asked, values = (np.concatenate([answer[i] for answer in scores]) for i in (0, 1))
        wrong = asked[(values != golden.scores[asked]).any(axis=1)]
        if len(wrong):
            count = f"{len(wrong):,} of {len(asked):,} answers"
            problems.append(f"scores are not equal in {count}: the first is image {wrong.min()}")
    order = np.argsort(-judgement.ratios, kind="stable")
    # The place in that order of each image's worst answer.
    worst = np.sort(np.unique(rows[order], return_index=True)[1])
    is_finite = np.isfinite(judgement.errors)
    return Round(
        mode=mode,
        requests=len(answers),
        images=len(rows),
        differing=int((judgement.is_changed | ~is_finite).sum()),
        max_abs_diff=_finite(judgement.errors.max()),
        max_ratio=_finite(judgement.ratios.max()),
        worst=tuple(
            WorstAnswer(
                index=int(rows[answer]),
                expected=judgement.expected[answer].item(),
                got=judgement.answers[answer].item() if is_finite[answer] else None,
                error=_finite(judgement.errors[answer]),
                bound=float(judgement.bounds[answer]),
            )
            for answer in order[worst[:WORST]]
        ),
        versions=tuple(sorted({version for _, _, version in answers})),
        seconds=seconds,
        problems=tuple(problems),
        is_exact=golden.scores is not None,
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

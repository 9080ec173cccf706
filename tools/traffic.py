"""Clients in processes of their own that hold every answer against its own image's."""

# Shape letters: N images, B batch, K classes.

import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.repository.release import load_release

HANG_SECONDS = 60.0  # in which a client has started or come to its end
PAUSE_SECONDS = 0.05  # after a failure
KEPT = 100  # of the right answers, one in so many becomes an event
SIZES = (1, 1, 1, 1, 1, 1, 1, 5)  # images a request, in turn: single ones mostly

_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Traffic:
    """What one client asks, and what it must hear."""

    url: str
    name: str
    images: np.ndarray  # (N, ...)
    outputs_by_version: Mapping[int, np.ndarray]  # (N, K) each; no other version may answer
    tolerance: float  # for each of an answer's numbers
    timeout: float = 10.0  # seconds for a request
    sizes: tuple[int, ...] = SIZES  # none above the model's largest batch
    seed: int = 0
    pause: float = 0.0  # seconds after a request: the machine has other things to do as well


@dataclass(frozen=True)
class Event:
    """What became of one request."""

    sent: float  # by the monotonic clock, which all processes share
    answered: float
    kind: str  # right, wrong or failed
    message: str  # the version that answered, or why it is wrong or failed
    url: str
    client: int  # which of them


@dataclass(frozen=True)
class Tally:
    """What became of all requests. Events: all that were not right, and some that were."""

    requests: int = 0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    slowest: float = 0.0  # seconds of the slowest right answer
    by_version: Mapping[int, int] = field(default_factory=dict)  # right answers
    events: tuple[Event, ...] = ()  # in the order of sending

    def __add__(self, other: "Tally") -> "Tally":
        versions = sorted({*self.by_version, *other.by_version})
        return Tally(
            self.requests + other.requests,
            self.right + other.right,
            self.wrong + other.wrong,
            self.failed + other.failed,
            max(self.slowest, other.slowest),
            {n: self.by_version.get(n, 0) + other.by_version.get(n, 0) for n in versions},
            tuple(sorted((*self.events, *other.events), key=lambda event: event.sent)),
        )

    @property
    def problems(self) -> list[Event]:
        """The requests that were not answered rightly."""
        return [event for event in self.events if event.kind != "right"]


# What a request ends with that no server has accepted.
REFUSALS = ("has unloaded", "Connection refused")


def lost(tally: Tally) -> list[Event]:
    """The requests that a server may have accepted and did not answer.

    Each client has one connection while all goes well, so that only its first failure after a
    right answer can be such a request; the later ones came with connections of their own.
    """
    found = []
    for client in {event.client for event in tally.events}:
        was_right = True
        for event in (event for event in tally.events if event.client == client):
            if (
                was_right
                and event.kind == "failed"
                and not any(r in event.message for r in REFUSALS)
            ):
                found.append(event)
            was_right = event.kind == "right"
    return found


def expected(paths: Paths, versions: Sequence[int], images: np.ndarray) -> dict[int, np.ndarray]:
    """What each packaged version says of images (N, ...), by ONNX Runtime in this process."""
    from pipeline.export.runtime import onnx_predictor  # the clients need none

    return {n: onnx_predictor(load_release(paths, n).onnx)(images) for n in versions}


def judge(ask: Traffic, rows: slice, outputs: np.ndarray, version: str) -> str:
    """What is wrong with the outputs (B, K) of `version` for these images; empty: nothing."""
    known = ask.outputs_by_version.get(int(version) if version.isdigit() else -1)
    if known is None:
        return f"version {version!r} answered"
    expected = known[rows]
    if outputs.shape != expected.shape:
        return f"version {version} answered {outputs.shape} instead of {expected.shape}"
    apart = float(np.abs(outputs - expected).max())
    if not apart <= ask.tolerance:  # so written, NaN is wrong
        return f"version {version} is off by {apart:.3g} for the images from {rows.start}"
    return ""


class _Tallied:
    """One client's counts while it runs."""

    def __init__(self, ask: Traffic) -> None:
        self.url, self.client = ask.url, ask.seed
        self.counts = {"right": 0, "wrong": 0, "failed": 0}
        self.by_version: dict[int, int] = {}
        self.slowest = 0.0
        self.events: list[Event] = []
        self.was_right = False

    def add(self, sent: float, kind: str, message: str) -> None:
        answered = time.monotonic()
        self.counts[kind] += 1
        is_right = kind == "right"
        if is_right:
            self.slowest = max(self.slowest, answered - sent)
            self.by_version[int(message)] = self.by_version.get(int(message), 0) + 1
        # The first right answer after another tells when it was over.
        if not is_right or not self.was_right or self.counts["right"] % KEPT == 0:
            self.events.append(Event(sent, answered, kind, message, self.url, self.client))
        self.was_right = is_right

    def tally(self) -> Tally:
        requests = sum(self.counts.values())
        return Tally(
            requests,
            **self.counts,
            slowest=self.slowest,
            by_version=self.by_version,
            events=tuple(self.events),
        )


def _client(ask: Traffic, counter: Any, stop: Any, results: Any) -> None:
    """Ask until told to stop; go on, with a new connection, whatever goes wrong."""
    rng = np.random.default_rng(ask.seed)
    tallied, client, turn = _Tallied(ask), None, 0
    while not stop.is_set():
        client = client or Client(ask.url, ask.name, ask.timeout, retries=0)
        size = ask.sizes[turn % len(ask.sizes)]
        turn += 1
        start = int(rng.integers(len(ask.images) - size + 1))
        rows = slice(start, start + size)
        sent = time.monotonic()
        try:
            outputs, version = client.infer(ask.images[rows])
        except PipelineError as error:
            tallied.add(sent, "failed", str(error))
            client.close()
            client = None
            time.sleep(PAUSE_SECONDS)
        else:
            problem = judge(ask, rows, outputs, version)
            tallied.add(sent, "wrong" if problem else "right", problem or version)
        counter.value += 1
        if ask.pause:
            time.sleep(ask.pause)
    if client:
        client.close()
    results.put(tallied.tally())


class Running:
    """Clients that ask until they are stopped."""

    def __init__(self, asks: Sequence[Traffic]) -> None:
        self._stop, self._results = _spawn.Event(), _spawn.Queue()
        # Each has one writer: no lock.
        self._counters = [_spawn.Value("l", 0, lock=False) for _ in asks]
        self._processes = [
            _spawn.Process(target=_client, args=(ask, counter, self._stop, self._results))
            for ask, counter in zip(asks, self._counters, strict=True)
        ]
        self._tally: Tally | None = None
        for process in self._processes:
            process.start()

    @property
    def requests(self) -> int:
        """How many requests have come to an end so far."""
        return sum(counter.value for counter in self._counters)

    def await_more(self, requests: int, seconds: float = HANG_SECONDS) -> None:
        """Until each client has so many more requests behind it."""
        aims = [counter.value + requests for counter in self._counters]
        deadline = time.monotonic() + seconds
        while any(c.value < aim for c, aim in zip(self._counters, aims, strict=True)):
            assert all(process.is_alive() for process in self._processes), "a client died"
            assert time.monotonic() < deadline, "the clients hang"
            time.sleep(0.01)

    def stop(self) -> Tally:
        """Let each client end its request; what became of all of them."""
        if self._tally is None:
            self._stop.set()
            tallies = [self._results.get(timeout=HANG_SECONDS) for _ in self._processes]
            for process in self._processes:
                process.join(HANG_SECONDS)
            self._tally = sum(tallies, Tally())
        return self._tally

    def kill(self) -> None:
        """End what still runs."""
        for process in self._processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def traffic(urls: Sequence[str], ask: Traffic) -> Iterator[Running]:
    """A client for each URL, all asking what `ask` says, each with a seed of its own.

    The block begins once each has had its first answer.
    """
    running = Running([replace(ask, url=url, seed=ask.seed + n) for n, url in enumerate(urls)])
    try:
        running.await_more(1)
        yield running
    finally:
        running.kill()

"""Clients in separate processes that check every answer against the expected one."""

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

HANG_SECONDS = 60.0  # within which a client has started or ended
PAUSE_SECONDS = 0.05  # after a failure
KEPT = 100  # one in this many correct answers becomes an event
SIZES = (1, 1, 1, 1, 1, 1, 1, 5)  # images per request, in turn: mostly single ones

_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Traffic:
    """Requests of one client, and the expected answers."""

    url: str
    name: str
    images: np.ndarray  # (N, ...)
    outputs_by_version: Mapping[int, np.ndarray]  # (N, K) each; no other version may answer
    tolerance: float  # for each number of an answer
    timeout: float = 10.0  # seconds for a request
    sizes: tuple[int, ...] = SIZES  # at most the model's largest batch
    seed: int = 0
    pause: float = 0.0  # seconds after a request, to leave the machine time for other work


@dataclass(frozen=True)
class Event:
    """Result of one request."""

    sent: float  # monotonic clock, shared by all processes; seconds
    answered: float
    kind: str  # right, wrong or failed
    message: str  # the version that answered, or why it is wrong or failed
    url: str
    client: int  # the client's seed, different for each


@dataclass(frozen=True)
class Tally:
    """Results of all requests. Events: all requests with wrong or no answers, and some others."""

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
        """The requests without a correct answer."""
        return [event for event in self.events if event.kind != "right"]


# Parts of the errors of requests that no server has accepted.
REFUSALS = ("has unloaded", "Connection refused")


def lost(tally: Tally) -> list[Event]:
    """List the requests that a server may have accepted and did not answer.

    A client keeps one connection as long as requests succeed, so only its first failure after a
    correct answer can be such a request; each later one used a new connection.
    """
    lost = []
    for client in {event.client for event in tally.events}:
        was_right = True
        for event in (event for event in tally.events if event.client == client):
            if (
                was_right
                and event.kind == "failed"
                and not any(r in event.message for r in REFUSALS)
            ):
                lost.append(event)
            was_right = event.kind == "right"
    return lost


def expected(paths: Paths, versions: Sequence[int], images: np.ndarray) -> dict[int, np.ndarray]:
    """Return each packaged version's outputs for images (N, ...), by ONNX Runtime in process."""
    from pipeline.export.runtime import onnx_predictor  # the clients do not need it

    return {n: onnx_predictor(load_release(paths, n).onnx)(images) for n in versions}


def judge(ask: Traffic, rows: slice, outputs: np.ndarray, version: str) -> str:
    """Return what is wrong with the outputs (B, K) of `version` for these images, or ''."""
    recorded = ask.outputs_by_version.get(int(version) if version.isdigit() else -1)
    if recorded is None:
        return f"version {version!r} answered"
    expected = recorded[rows]
    if outputs.shape != expected.shape:
        return f"version {version} answered {outputs.shape} instead of {expected.shape}"
    apart = float(np.abs(outputs - expected).max())
    if not apart <= ask.tolerance:  # written this way, NaN is wrong
        return f"version {version} is off by {apart:.3g} for the images from {rows.start}"
    return ""


class _Tallied:
    """Counts of one client while it runs."""

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
        # The first correct answer after a failure shows when the outage ended.
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
    """Send requests until stopped; after any failure continue with a new connection."""
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
    """Clients that send requests until they are stopped."""

    def __init__(self, asks: Sequence[Traffic]) -> None:
        self._stop, self._results = _spawn.Event(), _spawn.Queue()
        # No lock, since each has one writer.
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
        """Number of requests finished so far."""
        return sum(counter.value for counter in self._counters)

    def await_more(self, requests: int, seconds: float = HANG_SECONDS) -> None:
        """Wait until each client has finished this many more requests.

        Raises AssertionError when a client died, or after `seconds`.
        """
        aims = [counter.value + requests for counter in self._counters]
        deadline = time.monotonic() + seconds
        while any(c.value < aim for c, aim in zip(self._counters, aims, strict=True)):
            assert all(process.is_alive() for process in self._processes), "a client died"
            assert time.monotonic() < deadline, "the clients hang"
            time.sleep(0.01)

    def stop(self) -> Tally:
        """Stop the clients after their current requests; return the results of all requests."""
        if self._tally is None:
            self._stop.set()
            tallies = [self._results.get(timeout=HANG_SECONDS) for _ in self._processes]
            for process in self._processes:
                process.join(HANG_SECONDS)
            self._tally = sum(tallies, Tally())
        return self._tally

    def kill(self) -> None:
        """Kill the clients that still run."""
        for process in self._processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def traffic(urls: Sequence[str], ask: Traffic) -> Iterator[Running]:
    """Run a client for each URL, with the requests of `ask` and a different seed for each.

    The block begins after each client's first request has finished.
    """
    running = Running([replace(ask, url=url, seed=ask.seed + n) for n, url in enumerate(urls)])
    try:
        running.await_more(1)
        yield running
    finally:
        running.kill()

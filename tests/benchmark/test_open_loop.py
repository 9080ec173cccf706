"""The open loop, and the closed one beside it, with a clock that tests turn."""

import heapq
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.benchmark.load import Done, draw_arrivals, drive
from pipeline.benchmark.timing import TimedRow, Window, run_closed_loop

SERVICE = 0.001  # seconds that the fake server takes for a request
STALL = (2.0, 3.0)  # when it does nothing


class Turned:
    """A clock that only tests move, and what is to happen by it."""

    def __init__(self) -> None:
        self.time = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []

    def now(self) -> float:
        return self.time

    def at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, len(self.events), happen))

    def wait(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.time, _, happen = heapq.heappop(self.events)
            happen()
        self.time = max(self.time, until)


class Stalling:
    """A server that answers one request after the other, and for a second none."""

    def __init__(self, clock: Turned) -> None:
        self.clock, self.free = clock, 0.0

    def answered_at(self) -> float:
        """When a request that comes now is answered."""
        start = max(self.clock.now(), self.free)
        if STALL[0] <= start < STALL[1]:
            start = STALL[1]
        self.free = start + SERVICE
        return self.free

    def send(self, turn: int, done: Done) -> None:
        self.clock.at(self.answered_at(), lambda: done(b"answer"))

    def predict(self, images: np.ndarray) -> np.ndarray:
        self.clock.wait(self.answered_at())
        return np.zeros((len(images), 2))


def percentiles(window: Window) -> dict[str, float]:
    return TimedRow("server", "grpc", 1, 1, (window,)).latency_ms()


def test_a_stall_of_a_second_shows_in_the_open_loop_and_is_hidden_in_the_closed_one() -> None:
    clock = Turned()
    sent = drive(Stalling(clock).send, draw_arrivals(500, 5.0, seed=1), clock, patience=9.0)
    opened = percentiles(Window(5.0, 1, sent.latencies, late=sent.late))
    clock = Turned()
    images, classes = [np.zeros((1, 1))], [np.zeros(1, int)]
    predictor = Stalling(clock).predict
    closed = percentiles(run_closed_loop(predictor, images, classes, 5.0, clock.now))
    assert opened["p50"] < 10
    assert opened["p90"] > 500  # a fifth of the requests were due while nothing was answered
    assert opened["p99"] > 900
    assert closed["p99"] == pytest.approx(1000 * SERVICE)  # one request was slow, of thousands
    assert np.all(sent.late == 0)


def test_arrivals_are_those_of_the_seed_at_the_rate_and_as_irregular_as_they_should_be() -> None:
    times = draw_arrivals(100, 50.0, seed=3)
    assert np.array_equal(times, draw_arrivals(100, 50.0, seed=3))
    assert not np.array_equal(times[:99], draw_arrivals(100, 50.0, seed=4)[:99])
    assert len(times) == pytest.approx(5000, rel=0.05)
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as exponential ones have it


def test_what_is_never_answered_has_no_latency_and_is_waited_for_so_long() -> None:
    clock = Turned()

    def send(turn: int, done: Done) -> None:
        if turn % 2:
            clock.at(clock.now() + 0.5, lambda: done(None if turn == 1 else b"answer"))

    sent = drive(send, np.arange(10) / 10, clock, patience=2.0)
    assert np.isfinite(sent.ended).tolist() == [turn % 2 == 1 and turn != 1 for turn in range(10)]
    assert sent.latencies == pytest.approx([0.5] * 4)
    assert clock.now() == pytest.approx(0.9 + 2.0, abs=0.02)
    assert len(sent.after(0.45).due) == 5


def test_a_client_that_cannot_keep_up_says_so() -> None:
    clock = Turned()

    def send(turn: int, done: Done) -> None:
        clock.wait(clock.now() + 0.01)  # it takes longer to send than requests are apart
        done(b"answer")

    sent = drive(send, draw_arrivals(500, 1.0, seed=0), clock, patience=1.0)
    row = TimedRow("m", "grpc", 1, 0, (Window(1.0, 1, sent.latencies, late=sent.late),), rate=500)
    assert row.is_behind
    assert row.record()["behind"] is True
    assert row.late_ms()["p95"] > 1000
    in_time = Window(1.0, 1, sent.latencies, late=np.zeros(len(sent.latencies)))
    assert not TimedRow("m", "grpc", 1, 0, (in_time,), rate=500).is_behind

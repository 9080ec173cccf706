"""Open loop: requests come when they come, whether or not those before them were answered.

A closed loop waits for an answer before it asks again, so a server that stalls is asked less while
it does, and one slow request is all that shows. Here arrivals are drawn beforehand, as of many
people who know nothing of each other (Poisson), and a latency counts from when its request was due.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

POLL = 0.01  # seconds

Done = Callable[[bytes | None], None]  # takes the answer, or None for none
Send = Callable[[int, Done], None]  # begins request number so, and returns at once


class Clock(Protocol):
    """Time in seconds, and a way to let it pass."""

    def now(self) -> float: ...
    def wait(self, until: float) -> None: ...


class SystemClock:
    """The time of this machine."""

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, until: float) -> None:
        if (left := until - self.now()) > 0:
            time.sleep(left)


@dataclass
class Sent:
    """What became of the requests, in the order in which they were due."""

    start: float  # of the clock
    due: np.ndarray  # float64, seconds of the clock
    begun: np.ndarray  # when each was sent
    ended: np.ndarray  # when each was answered; infinite: never
    answers: list[bytes | None] = field(default_factory=list)

    @property
    def latencies(self) -> np.ndarray:
        """Seconds from when a request was due to its answer, of those that were answered."""
        known = np.isfinite(self.ended)
        latencies: np.ndarray = self.ended[known] - self.due[known]
        return latencies

    @property
    def late(self) -> np.ndarray:
        """Seconds by which the client itself was late."""
        late: np.ndarray = self.begun - self.due
        return late

    def after(self, begin: float) -> "Sent":
        """Those that were due from then on."""
        first = int(np.searchsorted(self.due, begin))
        return Sent(
            begin, self.due[first:], self.begun[first:], self.ended[first:], self.answers[first:]
        )


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """When requests are due, float64 seconds from 0, so many a second in the mean."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate * seconds)
    return np.sort(rng.uniform(0, seconds, count))


def drive(send: Send, times: np.ndarray, clock: Clock, patience: float) -> Sent:
    """Send each request when it is due, counted from now, and wait for the last answer."""
    count = len(times)
    start = clock.now()
    sent = Sent(start, start + times, np.zeros(count), np.full(count, np.inf), [None] * count)
    open_requests = set(range(count))

    def answered(turn: int) -> Done:
        def done(answer: bytes | None) -> None:
            if answer is not None:
                sent.ended[turn], sent.answers[turn] = clock.now(), answer
            open_requests.discard(turn)

        return done

    for turn, due in enumerate(sent.due):
        clock.wait(float(due))
        sent.begun[turn] = clock.now()
        send(turn, answered(turn))
    deadline = clock.now() + patience
    while open_requests and clock.now() < deadline:
        clock.wait(clock.now() + POLL)
    return sent

"""Latency and throughput of a predictor or server: windows, and the rows they are combined into.

A window is an interval of time in which one thing is measured. Things to compare take turns, window
by window, so that other load on the machine affects all of them. Rounds of windows are repeated
until the speeds have settled.
"""

# Shape letters: N images, B batch, K classes.

import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from pipeline.client.faults import Fault
from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, read_answers
from pipeline.core.machine import others_seconds

WARM_UP = 0.3  # seconds before a window that are not counted, at most
PERCENTILES = (50, 90, 95, 99)
BEYOND = 10  # a percentile is stated only if at least this many requests are slower
WITHIN = 0.10  # distance from their mean at which the last windows agree, as in perf_analyzer
LAST = 3  # windows that must agree
BEHIND = 0.25  # fraction of the latency that an open loop's client itself may cause


@dataclass(frozen=True)
class Window:
    """The answers of one interval of time, without its warm-up unless a field says otherwise."""

    seconds: float
    batch: int  # images per request
    latencies: np.ndarray  # float64, seconds; one for each request that was answered
    wrong: int = 0  # images whose class was wrong, warm-up included
    failed: int = 0  # requests without an answer, warm-up included
    split: dict[str, float] = field(default_factory=dict)  # the server's own times
    client: dict[str, float] = field(default_factory=dict)  # mean send_us and recv_us of latencies
    faults: tuple[Fault, ...] = ()  # why requests failed, in a closed loop
    late: np.ndarray = field(default_factory=lambda: np.zeros(0))  # seconds, see Sent.late
    others: float = 0.0  # fraction of the machine's cores that other processes used meanwhile

    @property
    def images_per_second(self) -> float:
        return len(self.latencies) * self.batch / self.seconds

    @property
    def fastest_ms(self) -> float:
        """The third fastest answer, which other load hardly disturbs even on a busy machine."""
        return float(np.sort(self.latencies)[:3][-1] * 1e3) if len(self.latencies) else np.nan


def join_windows(windows: Sequence[Window]) -> Window:
    """Join windows of one setup, measured at different times, into one long window."""
    return replace(
        windows[0],
        seconds=sum(window.seconds for window in windows),
        latencies=np.concatenate([window.latencies for window in windows]),
        late=np.concatenate([window.late for window in windows]),
        wrong=sum(window.wrong for window in windows),
        failed=sum(window.failed for window in windows),
        faults=tuple(fault for window in windows for fault in window.faults),
        others=statistics.mean(window.others for window in windows),
    )


def warm_up(seconds: float) -> float:
    """Return the seconds of warm-up for a window of `seconds`."""
    return min(WARM_UP, seconds / 2)


def is_settled(speeds: Sequence[float], within: float = WITHIN) -> bool:
    """Return whether the last LAST windows lie within a fraction `within` of their mean."""
    last = speeds[-LAST:]
    mean = statistics.mean(last)
    return len(last) == LAST and all(abs(speed - mean) <= within * mean for speed in last)


@dataclass(frozen=True)
class Score:
    """The accuracy on the test split, and the memory it takes."""

    images: int
    accuracy: float  # fraction of images, 0 to 1
    differing: int  # images whose class is not eager PyTorch's
    peak_bytes: int = 0  # of its processes, libraries included


@dataclass(frozen=True)
class TimedRow:
    """One measured setup, over all its windows."""

    name: str
    way: str  # grpc, http or in process
    batch: int
    concurrency: int  # 0: an open loop, without a limit
    windows: tuple[Window, ...]
    rate: float = 0.0  # of an open loop: requests per second
    score: Score | None = None

    @property
    def speed(self) -> float:
        """The median of the windows' images per second."""
        return statistics.median(self.speeds)

    @property
    def speeds(self) -> list[float]:
        return [window.images_per_second for window in self.windows]

    @property
    def joined(self) -> Window:
        return join_windows(self.windows)

    def latency_ms(self) -> dict[str, float]:
        """Return percentiles over the requests of all windows, if enough requests are slower."""
        return _compute_percentiles(self.joined.latencies)

    def late_ms(self) -> dict[str, float]:
        """Return percentiles of how late an open loop's client sent its requests."""
        return _compute_percentiles(self.joined.late)

    @property
    def is_behind(self) -> bool:
        """Whether an open loop's client was so late that its own delay was measured too."""
        late, latencies = self.joined.late, self.joined.latencies
        return bool(len(late)) and bool(late.mean() > BEHIND * latencies.mean())

    @property
    def others(self) -> float:
        """The fraction of the machine's cores that other processes used, as a median of windows."""
        return statistics.median(window.others for window in self.windows)

    @property
    def is_settled(self) -> bool:
        return is_settled(self.speeds)

    def split(self) -> dict[str, float]:
        """Return the median over the windows of each of the server's own times."""
        rounds = _list_rounds([window.split for window in self.windows])
        return {name: statistics.median(values) for name, values in rounds.items()}

    def client(self) -> dict[str, float]:
        """Return the median over the windows of each of the client's own times."""
        rounds = _list_rounds([window.client for window in self.windows])
        return {name: statistics.median(values) for name, values in rounds.items()}

    @property
    def average_ms(self) -> float | None:
        """The mean latency of the requests of all windows; None without an answer."""
        latencies = self.joined.latencies
        return float(latencies.mean() * 1e3) if len(latencies) else None

    def record(self) -> dict[str, Any]:
        """Return the row as values for JSON."""
        joined = self.joined
        speeds = {"median": self.speed, "min": min(self.speeds), "max": max(self.speeds)}
        open_loop = {"rate": self.rate, "late_ms": self.late_ms(), "behind": self.is_behind}
        return {
            **{key: getattr(self, key) for key in ("name", "way", "batch", "concurrency")},
            **(open_loop if self.rate else {}),
            "images_per_second": {**speeds, "rounds": self.speeds},
            "latency_ms": self.latency_ms(),
            "average_ms": self.average_ms,
            "fastest_ms": {"rounds": [w.fastest_ms for w in self.windows if len(w.latencies)]},
            "client": self.client(),
            "server": self.split(),
            "server_rounds": _list_rounds([window.split for window in self.windows]),
            "requests": len(joined.latencies),
            "wrong": joined.wrong,
            "failed": joined.failed,
            "settled": self.is_settled,
            "others": self.others,
            **(asdict(self.score) if self.score else {}),
        }


def _list_rounds(windows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return each time of the windows that have it, by its name."""
    parts = [window for window in windows if window]
    return {name: [part[name] for part in parts if name in part] for name in chain(*parts)}


def _compute_percentiles(seconds: np.ndarray) -> dict[str, float]:
    """Return percentiles in milliseconds, those with enough slower requests."""
    parts = [part for part in PERCENTILES if len(seconds) * (100 - part) >= 100 * BEYOND]
    return {f"p{part}": float(np.percentile(seconds, part) * 1e3) for part in parts}


def require_answers(rows: Sequence[TimedRow]) -> None:
    """Raise CheckFailedError if an answer was wrong or missing: its speed means nothing then."""
    failures = [
        f"{row.name}, batch {row.batch}, concurrency {row.concurrency}: {row.joined.wrong} wrong, "
        f"{row.joined.failed} missing"
        for row in rows
        if row.joined.wrong or row.joined.failed or not all(row.speeds)
    ]
    if failures:
        raise CheckFailedError(f"answers were wrong or missing: {'; '.join(failures)}")


def divide_speeds(row: TimedRow, of: TimedRow) -> dict[str, Any]:
    """Return the row's speed divided by the other's: of medians, and of each pair of windows."""
    pairs = [ours / theirs for ours, theirs in zip(row.speeds, of.speeds, strict=True)]
    return {
        "median_of_pairs": statistics.median(pairs),
        "min": min(pairs),
        "max": max(pairs),
        "of_medians": row.speed / of.speed,
    }


def measure_answered(measure: Callable[[float], Window], seconds: float) -> Window:
    """Measure a window; double its length until it has at least one answer or failure."""
    while True:
        window = measure(seconds)
        if len(window.latencies) or window.wrong or window.failed:
            return window
        seconds *= 2


def count_errors(outputs: np.ndarray, classes: np.ndarray) -> int:
    """Count the rows of outputs (B, ...) whose answer is not that of `classes` (B,)."""
    if outputs.shape[:1] != classes.shape:
        return len(classes)
    return int((read_answers(outputs)[0] != classes).sum())


def run_closed_loop(
    predictor: Predictor,
    batches: Sequence[np.ndarray],
    classes: Sequence[np.ndarray],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Window:
    """Ask the batches (B, ...) one after the other in a cycle, and check every class."""
    latencies, outputs = [], []
    now, turn = clock(), 0
    begin = now + warm_up(seconds)
    end = begin + seconds
    while now < end:
        outputs.append(predictor(batches[turn % len(batches)]))
        then, now = now, clock()
        turn += 1
        if begin <= now < end:
            latencies.append(now - then)
    wrong = sum(count_errors(o, classes[turn % len(classes)]) for turn, o in enumerate(outputs))
    return Window(seconds, len(batches[0]), np.array(latencies), wrong)


QUIET = 0.08  # fraction of the cores; if other processes use more, a window is measured again
AGAIN = 0.15  # fraction of the windows that may be measured again
Key = TypeVar("Key", bound=Hashable)
Measure = Callable[[], Window]


@dataclass(frozen=True)
class Until:
    """When to stop: after `least` windows once the speed has settled, or after `most`."""

    least: int
    most: int
    within: float = WITHIN


UNTIL = Until(least=5, most=7)


def take_turns(
    measures: Mapping[Key, Measure],
    group: Mapping[Key, Hashable],
    until: Until,
    report: Callable[[str], None] = lambda line: None,
) -> dict[Key, list[Window]]:
    """Measure windows of each key, in rounds; every other round runs backwards.

    A group continues until all its keys have settled, so that they have the same rounds. A key
    without a group is a yardstick, and is measured in every round. Windows that other processes
    disturbed are measured again, within limits; their wrong answers still count.
    """
    windows: dict[Key, list[Window]] = {key: [] for key in measures}
    spare = round(AGAIN * until.least * len(measures))
    for turn in range(until.most):
        restless = {
            group[key]
            for key in group
            if turn < until.least
            or not is_settled([window.images_per_second for window in windows[key]], until.within)
        }
        if not restless:
            break
        present = [key for key in measures if key not in group or group[key] in restless]
        report(f"round {turn + 1} of {until.most} at most: {len(present)} windows")
        for key in present if turn % 2 == 0 else reversed(present):
            window = _measure_others(measures[key])
            if window.others > QUIET and spare:
                spare -= 1
                second = _measure_others(measures[key])
                wrong, failed = window.wrong + second.wrong, window.failed + second.failed
                quieter = min(window, second, key=lambda window: window.others)
                window = replace(quieter, wrong=wrong, failed=failed)
            windows[key].append(window)
    return windows


def _measure_others(measure: Measure) -> Window:
    """Measure a window and the fraction of the cores that other processes used meanwhile."""
    start, before = time.perf_counter(), others_seconds()
    window = measure()
    taken = others_seconds() - before
    spent = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return replace(window, others=min(1.0, max(0.0, taken / spent)))

"""Latency and throughput of whatever answers batches of images: windows, and what they add up to.

A window is a stretch of time in which one thing is measured. Two things are compared by taking
turns, window by window, so that whatever else a machine does meets both.
"""

# Shape letters: N images, B batch, K classes.

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.evaluate import Predictor

WARM_UP = 0.3  # seconds at the beginning of a window that do not count
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Window:
    """What was answered in one stretch of time, warm-up left out."""

    seconds: float
    batch: int  # images a request
    latencies: np.ndarray  # float64, seconds; one for each request that was answered
    wrong: int = 0  # images whose class was not theirs, warm-up included
    failed: int = 0  # requests without an answer, warm-up included
    split: dict[str, float] = field(default_factory=dict)  # what the server says of its part

    @property
    def images_per_second(self) -> float:
        return len(self.latencies) * self.batch / self.seconds


@dataclass(frozen=True)
class Row:
    """One way to ask, over all its windows."""

    name: str
    way: str  # grpc, http or in process
    batch: int
    concurrency: int
    windows: tuple[Window, ...]

    @property
    def speed(self) -> float:
        """The median of the windows' images a second."""
        return statistics.median(self.speeds)

    @property
    def speeds(self) -> list[float]:
        return [window.images_per_second for window in self.windows]

    @property
    def wrong(self) -> int:
        return sum(window.wrong for window in self.windows)

    @property
    def failed(self) -> int:
        return sum(window.failed for window in self.windows)

    def latency_ms(self) -> dict[str, float]:
        """Percentiles over the requests of all windows."""
        every = np.concatenate([window.latencies for window in self.windows])
        if not len(every):
            return {}
        found = np.percentile(every, PERCENTILES) * 1e3
        return {f"p{part}": float(ms) for part, ms in zip(PERCENTILES, found, strict=True)}

    def split(self) -> dict[str, float]:
        """The median over the windows of each part that the server states."""
        parts = [window.split for window in self.windows if window.split]
        names = parts[0] if parts else {}
        return {name: statistics.median(part[name] for part in parts) for name in names}

    def record(self) -> dict[str, Any]:
        """The row as JSON has it."""
        described = asdict(self)
        del described["windows"]
        speeds = {"median": self.speed, "min": min(self.speeds), "max": max(self.speeds)}
        return {
            **described,
            "images_per_second": {**speeds, "rounds": self.speeds},
            "latency_ms": self.latency_ms(),
            "server": self.split(),
            "requests": sum(len(window.latencies) for window in self.windows),
            "wrong": self.wrong,
            "failed": self.failed,
        }

    def __str__(self) -> str:
        latency = self.latency_ms()
        p50, p99 = latency.get("p50", np.nan), latency.get("p99", np.nan)
        formed = f"{self.split()['batch']:.1f}" if self.split() else ""
        return (
            f"{self.name:<22} {self.way:<10} {self.batch:>5} {self.concurrency:>6} "
            f"{self.speed:>9,.0f} {min(self.speeds):>9,.0f} {max(self.speeds):>9,.0f} "
            f"{p50:>8.2f} {p99:>8.2f} {formed:>6}"
        )


HEADER = (
    f"{'':<22} {'':<10} {'batch':>5} {'asking':>6} {'images/s':>9} {'least':>9} {'most':>9} "
    f"{'p50 ms':>8} {'p99 ms':>8} {'formed':>6}"
)


def ratio(row: Row, of: Row) -> dict[str, Any]:
    """The row's speed as a part of the other's: of medians, and of each pair of windows."""
    pairs = [ours / theirs for ours, theirs in zip(row.speeds, of.speeds, strict=True)]
    return {
        "median_of_pairs": statistics.median(pairs),
        "min": min(pairs),
        "max": max(pairs),
        "of_medians": row.speed / of.speed,
    }


def wrong_classes(outputs: np.ndarray, classes: np.ndarray) -> int:
    """How many rows (B, K) of outputs are not of the classes (B,) that they should be."""
    if outputs.shape[:1] != classes.shape:
        return len(classes)
    return int((outputs.argmax(axis=1) != classes).sum())


def closed_loop(
    predictor: Predictor,
    batches: Sequence[np.ndarray],
    classes: Sequence[np.ndarray],
    seconds: float,
) -> Window:
    """Ask one batch (B, ...) after the other, round and round, each answer held to its classes."""
    latencies, outputs = [], []
    begin = time.perf_counter() + WARM_UP
    end = begin + seconds
    now, turn = time.perf_counter(), 0
    while now < end:
        outputs.append(predictor(batches[turn % len(batches)]))
        then, now = now, time.perf_counter()
        turn += 1
        if begin <= now < end:
            latencies.append(now - then)
    wrong = sum(wrong_classes(o, classes[turn % len(classes)]) for turn, o in enumerate(outputs))
    return Window(seconds, len(batches[0]), np.array(latencies), wrong)

"""Latency and throughput of whatever answers batches of images: windows, and what they add up to.

A window is a stretch of time in which one thing is measured. Two things are compared by taking
turns, window by window, so that whatever else a machine does meets both.
"""

# Shape letters: N images, B batch, K classes.

import csv
import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.evaluate import Predictor

WARM_UP = 0.3  # seconds at the beginning of a window that do not count
PERCENTILES = (50, 90, 95, 99)
BEYOND = 10  # requests slower than a percentile, at least, for it to be claimed


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


def together(windows: Sequence[Window]) -> Window:
    """Windows of the same requests as one."""
    return replace(
        windows[0],
        seconds=sum(window.seconds for window in windows),
        latencies=np.concatenate([window.latencies for window in windows]),
        wrong=sum(window.wrong for window in windows),
        failed=sum(window.failed for window in windows),
    )


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
        """Percentiles over the requests of all windows, where enough lie beyond to claim one."""
        every = np.concatenate([window.latencies for window in self.windows])
        parts = [part for part in PERCENTILES if len(every) * (100 - part) >= 100 * BEYOND]
        found = np.percentile(every, parts) * 1e3 if parts else np.zeros(0)
        return {f"p{part}": float(ms) for part, ms in zip(parts, found, strict=True)}

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
            f"{self.name:<28} {self.way:<10} {self.batch:>5} {self.concurrency:>6} "
            f"{self.speed:>9,.0f} {min(self.speeds):>9,.0f} {max(self.speeds):>9,.0f} "
            f"{_shown(p50)} {_shown(p99)} {formed:>6}"
        )


def _shown(milliseconds: float) -> str:
    """A percentile, or nothing where it could not be claimed."""
    return f"{'':>8}" if np.isnan(milliseconds) else f"{milliseconds:>8.2f}"


HEADER = (
    f"{'':<28} {'':<10} {'batch':>5} {'asking':>6} {'images/s':>9} {'least':>9} {'most':>9} "
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


# perf_analyzer's names, where it has one; what it measures and we do not is left out.
CSV = (
    *("Model", "Way", "Batch", "Concurrency", "Inferences/Second"),
    *("Server Queue", "Server Compute Input", "Server Compute Infer", "Server Compute Output"),
    *("p50 latency", "p90 latency", "p95 latency", "p99 latency"),
)


def csv_of(rows: Sequence[Row]) -> str:
    """The rows as CSV, in perf_analyzer's columns and units: microseconds."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(CSV)
    for row in rows:
        split, latency = row.split(), row.latency_ms()
        parts = ("queue_us", "compute_input_us", "compute_infer_us", "compute_output_us")
        microseconds = [latency.get(f"p{part}", np.nan) * 1e3 for part in PERCENTILES]
        table.writerow(
            [
                *(row.name, row.way, row.batch, row.concurrency, f"{row.speed:.1f}"),
                *(f"{split[part]:.0f}" if part in split else "" for part in parts),
                *("" if np.isnan(one) else f"{one:.0f}" for one in microseconds),
            ]
        )
    return text.getvalue()

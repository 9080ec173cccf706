"""How fast a packaged model is served, beside what its server and its runtime could do at most."""

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.benchmark import load
from pipeline.benchmark.beside import MANY, NOOP, PROFILE, Beside, copied, profiled, put_beside
from pipeline.benchmark.load_open import open_loop
from pipeline.benchmark.served_score import Scored, score_served
from pipeline.benchmark.table import table
from pipeline.benchmark.timing import (
    Row,
    Score,
    Window,
    answered,
    closed_loop,
    ratio,
    require_right,
)
from pipeline.benchmark.turns import UNTIL, Until, take_turns
from pipeline.benchmark.workers import RUNTIME, YARDSTICK, sure_batches, yardstick, yardstick_row
from pipeline.core.files import write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.repository.release import Release, selected_releases
from pipeline.serving.serve import Server, running_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import KEY_HEADER

WAYS = ("grpc", "http")
# Images a request, requests at once. One after the other, large ones show what computing costs.
ASKED = ((1, 1), (1, 8), (1, 32), (8, 8), (MANY, 1))
SHARE = 0.5  # of the closed loop's rate, that arrives in the open one unless told
BESIDE = 6  # cells from one window of the yardstick to the next
LEAST_ARRIVALS = 20  # in a window of an open loop, in the mean: hardly ever is there none


@dataclass(frozen=True)
class ServeBenchmark:
    """How long to measure: every cell has a window in every round."""

    until: Until = UNTIL
    seconds: float = 1.0  # of each window, after its warm-up
    open_seconds: float = 3.0  # of each window with an open loop; longer where few arrive
    rate: float | None = None  # requests a second in it; None: half of what the closed loop did
    seed: int = 0  # of its arrivals


SHORT = ServeBenchmark(Until(least=3, most=3), seconds=0.3, open_seconds=1.0)


@dataclass(frozen=True)
class Cell:
    """One way to ask: whom, how many images a request, how many requests at once."""

    name: str
    way: str  # grpc, http or in process
    batch: int
    concurrency: int


@dataclass(frozen=True)
class Serving:
    """What the measurement found."""

    name: str
    version: int
    sha256: str  # of the model.onnx that was served
    threads: int  # that compute under the throughput profile, and in process
    config: ServeBenchmark
    rows: tuple[Row, ...]
    scores: dict[str, Score] = field(default_factory=dict)  # by the rows' names and ways

    def ratios(self) -> dict[str, dict[str, Any]]:
        """The two that say what serving costs: see `ratio`."""
        found = {Cell(row.name, row.way, row.batch, row.concurrency): row for row in self.rows}
        single = Cell(self.name, "grpc", 1, 32)
        many = Cell(profiled(self.name), "http", MANY, 8)
        in_process = Cell(RUNTIME, "in process", MANY, 1)
        return {
            "single_of_noop": ratio(found[single], found[replace(single, name=NOOP)]),
            "batch64_of_in_process": ratio(found[many], found[in_process]),
        }

    def record(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {
            "what": "serve",
            **machine(),
            "name": self.name,
            "version": self.version,
            "sha256": self.sha256,
            "threads": self.threads,
            "config": asdict(self.config),
            "rows": [row.record() for row in self.rows],
            "scores": {name: asdict(found) for name, found in self.scores.items()},
            "ratios": {name: parts["of_medians"] for name, parts in self.ratios().items()},
            "pairs": self.ratios(),
        }

    def told_ratios(self) -> list[str]:
        """The ratios in words."""
        said = {
            "single_of_noop": "single images, 32 at once, beside a model that computes nothing",
            "batch64_of_in_process": (
                f"batches of {MANY} under the {PROFILE} profile, beside ONNX Runtime in process, "
                f"{self.threads} threads each"
            ),
        }
        return [
            f"{parts['of_medians']:.2f} ({parts['min']:.2f} to {parts['max']:.2f}) {said[name]}"
            for name, parts in self.ratios().items()
        ]

    def __str__(self) -> str:
        return Lines(table(self.rows), *self.told_ratios())


def cells(name: str) -> list[Cell]:
    """What is measured, in the order of a round: what is compared stands side by side."""
    of_both = [
        Cell(model, way, batch, concurrency)
        for batch, concurrency in ASKED
        for way in WAYS
        for model in (name, NOOP)
    ]
    many = [Cell(name, way, MANY, 8) for way in WAYS]
    profile = [Cell(profiled(name), "http", MANY, 8), Cell(RUNTIME, "in process", MANY, 1)]
    return [*of_both, *many, *profile]


def benchmark_serving(
    paths: Paths,
    config: ServeBenchmark = ServeBenchmark(),
    report: Callable[[str], None] = lambda line: None,
    reference: np.ndarray | None = None,
) -> Serving:
    """Serve the selected version beside a no-op model, measure both, write serving.json.

    `reference` is what eager PyTorch says of the test split, where that is known already.
    Raises CheckFailedError when an answer was wrong or missing.
    """
    with tempfile.TemporaryDirectory(prefix="handwriting-benchmark-") as scratch:
        served = copied(paths, Path(scratch) / "models")
        release = selected_releases(served)[paths.name]
        with running_server(served, with_free_ports(ServeConfig()), report=report) as (server, _):
            http, grpc = f"127.0.0.1:{server.http_port}", f"127.0.0.1:{server.grpc_port}"
            with load.Server(http, grpc, server.admin_key, KEY_HEADER) as asked:
                beside = put_beside(served)
                for added in beside.added:
                    asked.load(added)
                scored = score_served(paths, server, release, beside, reference, report)
                bench = _Bench(server, asked, beside, release, config)
                rows = bench.rows(report, scored)
    require_right(rows)
    result = Serving(
        paths.name,
        release.version,
        release.sha256,
        beside.threads,
        config,
        rows,
        {f"{row.name}, {row.way}": row.score for row in rows if row.score},
    )
    write_json(paths.serving, result.record())
    return result


@dataclass(frozen=True)
class _Bench:
    """A server with all the models on it, and how long to measure."""

    server: Server
    asked: load.Server
    beside: Beside
    release: Release
    config: ServeBenchmark

    def rows(self, report: Callable[[str], None], scored: Scored) -> tuple[Row, ...]:
        """A row for each cell, the yardstick's first and those with an open loop last."""
        measures: dict[Cell, Callable[[], Window]] = {}
        group: dict[Cell, tuple[int, int]] = {}
        for cell in cells(self.beside.served.name):
            if len(measures) % (BESIDE + 1) == 0:
                place = Cell(YARDSTICK, "numpy", len(measures), 1)
                measures[place] = functools.partial(yardstick, self.config.seconds / 2)
            measures[cell] = self._measure(cell)
            is_profile = cell.name in (RUNTIME, profiled(self.beside.served.name))
            group[cell] = (cell.batch, 0 if is_profile else cell.concurrency)
        windows = take_turns(measures, group, self.config.until, report)
        rows = [yardstick_row([windows[cell] for cell in measures if cell.name == YARDSTICK])]
        rows += [
            Row(cell.name, cell.way, cell.batch, cell.concurrency, tuple(windows[cell]))
            for cell in group
        ]
        rows += self._open_rows(rows, report)
        sizes = scored.sized(self.server)
        return tuple(replace(row, score=sizes.get((row.name, row.way))) for row in rows)

    def _measure(self, cell: Cell) -> Callable[[], Window]:
        """What measures one window of a cell."""
        seconds = self.config.seconds
        if cell.name == RUNTIME:
            from pipeline.export.runtime import onnx_predictor

            predictor = onnx_predictor(self.release.onnx, self.beside.threads)
            batches = sure_batches(self.release.golden, cell.batch)
            ask = functools.partial(closed_loop, predictor, *batches)
            return functools.partial(answered, ask, seconds)
        asked = self._questions(cell)
        return lambda: self.asked.measure(cell.name, asked, cell.concurrency, seconds)

    def _questions(self, cell: Cell) -> load.Questions:
        images, classes = sure_batches(self.release.golden, cell.batch)
        if cell.name == NOOP:  # zeros: the first class is the largest
            classes = [np.zeros_like(of_batch) for of_batch in classes]
        return load.questions(self.beside.configs[cell.name], images, classes, cell.way)

    def _open_rows(self, closed: list[Row], report: Callable[[str], None]) -> list[Row]:
        """Single images as they come, over either protocol."""
        name = self.beside.served.name
        require_right(closed)  # of whose speeds the rates are made
        rates = {
            row.way: self.config.rate or SHARE * row.speed
            for row in closed
            if (row.name, row.batch, row.concurrency) == (name, 1, 32)
        }
        seeds = itertools.count(self.config.seed)  # another one for each window
        measures = {
            way: functools.partial(self._open, self._questions(Cell(name, way, 1, 0)), rate, seeds)
            for way, rate in rates.items()
        }
        report("open loop: " + ", ".join(f"{way} {rate:,.0f}/s" for way, rate in rates.items()))
        until = Until(3, 3)
        windows = take_turns(measures, {way: way for way in measures}, until)
        return [Row(name, way, 1, 0, tuple(windows[way]), rate=rate) for way, rate in rates.items()]

    def _open(self, asked: load.Questions, rate: float, seeds: Iterator[int]) -> Window:
        address = self.asked.addresses[asked.way]
        seconds = max(self.config.open_seconds, LEAST_ARRIVALS / rate)
        return self.asked.counted(
            self.beside.served.name,
            lambda: open_loop(address, asked, rate, seconds, next(seeds)),
        )

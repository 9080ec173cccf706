"""How fast a packaged model is served, next to what its server and its runtime could do at most.

The model is served from a repository for the occasion, with a model that computes nothing and the
model under its throughput profile; scored on the whole test split; and asked in every way in turns.
"""

import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from pipeline.benchmark import load, timing, workers
from pipeline.benchmark.load import open_loop
from pipeline.benchmark.timing import Score, TimedRow, Until, Window
from pipeline.benchmark.workers import EAGER, RUNTIME, YARDSTICK, LocalRuntime
from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import PipelineError
from pipeline.core.files import write_json
from pipeline.core.machine import machine, peak_bytes
from pipeline.core.paths import Paths
from pipeline.export.runtime import onnx_predictor
from pipeline.repository import config_pbtxt
from pipeline.repository.release import Release, selected_releases
from pipeline.serving import tritonserver
from pipeline.serving.serve import Server, processes_of, running_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import KEY_HEADER

WAYS = ("grpc", "http")
NOOP = "no-op"
PROFILE = "throughput"  # which large requests are meant for
MANY = 64  # images in a large request
# Images a request, requests at once. One after the other, large ones show what computing costs.
ASKED = ((1, 1), (1, 8), (1, 32), (8, 8), (MANY, 1))
SHARE = 0.5  # of the closed loop's rate, that arrives in the open one unless told
BESIDE = 6  # cells from one window of the yardstick to the next
LEAST_ARRIVALS = 20  # in a window of an open loop, in the mean: hardly ever is there none
Report = Callable[[str], None]
Configs = dict[str, config_pbtxt.ModelConfig]  # of all models that are asked, by name


@dataclass(frozen=True)
class ServeBenchmark:
    """How long to measure: every cell has a window in every round."""

    until: Until = timing.UNTIL
    seconds: float = 1.0  # of each window, after its warm-up
    open_seconds: float = 3.0  # of each window with an open loop; longer where few arrive
    rate: float | None = None  # requests a second in it; None: half of what the closed loop did
    seed: int = 0  # of its arrivals


SHORT = ServeBenchmark(Until(least=3, most=3), seconds=0.3, open_seconds=1.0)


def profiled(name: str) -> str:
    """What the model is called that runs under the throughput profile."""
    return f"{name}-{PROFILE}"


def copy_packaged(paths: Paths, repository: Path) -> Paths:
    """Copy the packaged model alone into a repository of its own."""
    if not (paths.packaged / "config.pbtxt").exists():
        raise PipelineError(f"no model at {paths.packaged}: run 'pipeline package' first")
    largest = config_pbtxt.read(paths.packaged / "config.pbtxt").max_batch_size
    if largest < MANY:
        raise PipelineError(
            f"{paths.packaged} takes batches of {largest} at most, and {MANY} are measured: "
            f"package it with --max-batch-size {MANY}"
        )
    shutil.copytree(paths.packaged, repository / paths.name)
    return replace(paths, repository_folder=repository)


def add_models(served: Paths) -> Configs:
    """Add a model that computes nothing, and the model under its profile; all configs."""
    own = config_pbtxt.read(served.packaged / "config.pbtxt")
    profile = config_pbtxt.read(config_pbtxt.profile_file(served.packaged, PROFILE))
    profile.name = profiled(served.name)
    shutil.copytree(served.packaged, served.repository / profile.name)

    noop = config_pbtxt.read(served.packaged / "config.pbtxt")
    noop.name, noop.backend = NOOP, "python"
    for only_ours in ("version_policy", "model_warmup", "optimization", "parameters"):
        noop.ClearField(only_ours)
    for output in noop.output:
        output.ClearField("label_filename")
    code = served.repository / NOOP / "1" / "model.py"
    code.parent.mkdir(parents=True)
    shutil.copy(tritonserver.BACKENDS / "noop.py", code)

    for config in (noop, profile):
        file = served.repository / config.name / "config.pbtxt"
        file.write_text(config_pbtxt.to_text(config))
    return {config.name: config for config in (own, noop, profile)}


def threads_of(message: config_pbtxt.ModelConfig) -> int:
    """How many threads compute for a model: those of a session, times the sessions."""
    of_session = int(config_pbtxt.parameter(message, "intra_op_thread_count") or 0)
    return of_session * sum(int(group.count) for group in message.instance_group)


class Cell(NamedTuple):
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
    rows: tuple[TimedRow, ...]

    def ratios(self) -> dict[str, dict[str, Any]]:
        """The two that say what serving costs: see `ratio`."""
        rows = {(row.name, row.way, row.batch, row.concurrency): row for row in self.rows}
        single, noop = (rows[name, "grpc", 1, 32] for name in (self.name, NOOP))
        many = rows[profiled(self.name), "http", MANY, 8]
        return {
            "single_of_noop": timing.ratio(single, noop),
            "batch64_of_in_process": timing.ratio(many, rows[RUNTIME, "in process", MANY, 1]),
        }

    def record(self) -> dict[str, Any]:
        """The result as JSON has it."""
        pairs = self.ratios()
        return {
            "what": "serve",
            **machine(),
            **{key: getattr(self, key) for key in ("name", "version", "sha256", "threads")},
            "config": asdict(self.config),
            "rows": [row.record() for row in self.rows],
            "scores": {
                f"{row.name}, {row.way}": asdict(row.score) for row in self.rows if row.score
            },
            "ratios": {name: parts["of_medians"] for name, parts in pairs.items()},
            "pairs": pairs,
        }

    def ratio_lines(self) -> list[str]:
        """The ratios in words."""
        meanings = (
            "single images, 32 at once, next to a model that computes nothing",
            f"batches of {MANY} under the {PROFILE} profile, next to ONNX Runtime in process, "
            f"{self.threads} threads each",
        )
        return [
            f"{parts['of_medians']:.2f} ({parts['min']:.2f} to {parts['max']:.2f}) {meaning}"
            for parts, meaning in zip(self.ratios().values(), meanings, strict=True)
        ]


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
    report: Report = lambda line: None,
    reference: np.ndarray | None = None,
) -> Serving:
    """Serve the selected version next to a no-op model, measure both, write serving.json.

    `reference` is what eager PyTorch says of the test split, where that is known already.
    Raises CheckFailedError when an answer was wrong or missing.
    """
    with tempfile.TemporaryDirectory(prefix="handwriting-benchmark-") as scratch:
        served = copy_packaged(paths, Path(scratch) / "models")
        release = selected_releases(served)[paths.name]
        with running_server(served, with_free_ports(ServeConfig()), report=report) as (server, _):
            http, grpc = f"127.0.0.1:{server.http_port}", f"127.0.0.1:{server.grpc_port}"
            with load.ServerLoad(http, grpc, server.admin_key, KEY_HEADER) as asked:
                configs = add_models(served)
                for name in configs:
                    if name != served.name:
                        asked.load(name)
                scores = score_served(paths, server, release, list(configs), reference, report)
                bench = _Bench(asked, served.name, configs, release, config)
                rows = bench.rows(report)
                scores = {
                    (name, way): replace(score, peak_bytes=served_bytes(server, name))
                    for (name, way), score in scores.items()
                }
    timing.require_answers(rows)
    rows = tuple(replace(row, score=scores.get((row.name, row.way))) for row in rows)
    result = Serving(paths.name, release.version, release.sha256, bench.threads, config, rows)
    write_json(paths.serving, result.record())
    return result


def score_served(
    paths: Paths,
    server: Server,
    release: Release,
    names: list[str],
    reference: np.ndarray | None = None,
    report: Report = lambda line: None,
) -> dict[tuple[str, str], Score]:
    """Put the whole test split to the served models; scores by name and protocol.

    Both ways, and under the profile over HTTP alone; without the memory, which only grows later.
    Held against what eager PyTorch says, or against `reference` where it has said it already.
    Where the export or its data are not here any more, says so and scores nothing.
    """
    exported = replace(paths, name=str(release.manifest["name"]))
    try:
        images, labels = workers.scored_images(exported, release.manifest)
        if reference is None:
            eager = LocalRuntime(EAGER, "fp32", 1)
            report(f"{eager}: the test split")
            with workers.worker(exported, eager, release.manifest) as ask:
                reference = ask("score")[1]
    except PipelineError as error:
        report(f"accuracy is left out: {error}")
        return {}
    scores = {}
    for way, url in (("grpc", server.grpc_url), ("http", server.http_url)):
        for name in names:
            if name == NOOP or (name, way) == (profiled(paths.name), "grpc"):
                continue  # it has no answers, or no row
            report(f"{name} over {way}: the test split")
            with Client(url, name) as client:
                accuracy, classes = workers.scored(triton_predictor(client), images, labels)
            scores[name, way] = Score(len(classes), accuracy, int((classes != reference).sum()))
    return scores


def served_bytes(server: Server, name: str) -> int:
    """The most memory that tritonserver and a model's stubs have had, what they share in each."""
    total = 0
    for pid in processes_of(server.id):
        try:
            is_of_model = any(f"/{name}/" in part for part in psutil.Process(pid).cmdline())
        except psutil.Error:  # it ended while we looked
            continue
        total += peak_bytes(pid) if pid == server.pid or is_of_model else 0
    return total


@dataclass(frozen=True)
class _Bench:
    """A server with all the models on it, and how long to measure."""

    asked: load.ServerLoad
    name: str  # of the packaged model
    configs: Configs
    release: Release
    config: ServeBenchmark

    @property
    def threads(self) -> int:
        """How many threads compute under the profile, and in process."""
        return threads_of(self.configs[profiled(self.name)])

    def rows(self, report: Report) -> tuple[TimedRow, ...]:
        """A row for each cell, the yardstick's first and those with an open loop last."""
        measures: dict[Cell, Callable[[], Window]] = {}
        group: dict[Cell, tuple[int, int]] = {}
        for cell in cells(self.name):
            if len(measures) % (BESIDE + 1) == 0:
                place = Cell(YARDSTICK, "numpy", len(measures), 1)
                measures[place] = functools.partial(workers.yardstick, self.config.seconds / 2)
            measures[cell] = self._measure(cell)
            is_profile = cell.name in (RUNTIME, profiled(self.name))
            group[cell] = (cell.batch, 0 if is_profile else cell.concurrency)
        windows = timing.take_turns(measures, group, self.config.until, report)
        rows = [
            workers.yardstick_row([windows[cell] for cell in measures if cell.name == YARDSTICK])
        ]
        rows += [TimedRow(*cell, tuple(windows[cell])) for cell in group]
        return (*rows, *self._open_rows(rows, report))

    def _measure(self, cell: Cell) -> Callable[[], Window]:
        """What measures one window of a cell."""
        seconds = self.config.seconds
        if cell.name == RUNTIME:
            predictor = onnx_predictor(self.release.onnx, self.threads)
            batches = workers.sure_batches(self.release.golden, cell.batch)
            ask = functools.partial(timing.closed_loop, predictor, *batches)
            return functools.partial(timing.answered, ask, seconds)
        asked = self._questions(cell)
        return lambda: self.asked.measure(cell.name, asked, cell.concurrency, seconds)

    def _questions(self, cell: Cell) -> load.Questions:
        images, classes = workers.sure_batches(self.release.golden, cell.batch)
        if cell.name == NOOP:  # zeros: the first class is the largest
            classes = [np.zeros_like(of_batch) for of_batch in classes]
        return load.questions(self.configs[cell.name], images, classes, cell.way)

    def _open_rows(self, closed: list[TimedRow], report: Report) -> list[TimedRow]:
        """Single images as they come, over either protocol."""
        timing.require_answers(closed)  # of whose speeds the rates are made
        rates = {
            row.way: self.config.rate or SHARE * row.speed
            for row in closed
            if (row.name, row.batch, row.concurrency) == (self.name, 1, 32)
        }
        report("open loop: " + ", ".join(f"{way} {rate:,.0f}/s" for way, rate in rates.items()))
        seeds = itertools.count(self.config.seed)  # another one for each window
        measures = {
            way: functools.partial(
                self._open, self._questions(Cell(self.name, way, 1, 0)), rate, seeds
            )
            for way, rate in rates.items()
        }
        windows = timing.take_turns(measures, {way: way for way in measures}, Until(3, 3))
        return [
            TimedRow(self.name, way, 1, 0, tuple(windows[way]), rate=rate)
            for way, rate in rates.items()
        ]

    def _open(self, asked: load.Questions, rate: float, seeds: Iterator[int]) -> Window:
        """Measure a window of an open loop, long enough for requests to arrive."""
        seconds = max(self.config.open_seconds, LEAST_ARRIVALS / rate)
        address = self.asked.addresses[asked.way]
        return self.asked.counted(
            self.name, lambda: open_loop(address, asked, rate, seconds, next(seeds))
        )

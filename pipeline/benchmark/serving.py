"""How fast a packaged model is served, beside what its server and its runtime could do at most.

What a benchmark serves: a packaged model alone, and beside it what it is measured against.

What a served model answers to the whole test split, and the memory that it takes for it.
"""

import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.benchmark import load
from pipeline.benchmark.load import open_loop
from pipeline.benchmark.table import table
from pipeline.benchmark.timing import (
    UNTIL,
    Row,
    Score,
    Until,
    Window,
    answered,
    closed_loop,
    ratio,
    require_right,
    take_turns,
)
from pipeline.benchmark.workers import (
    EAGER,
    RUNTIME,
    YARDSTICK,
    Runtime,
    scored,
    scored_images,
    sure_batches,
    worker,
    yardstick,
    yardstick_row,
)
from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import PipelineError
from pipeline.core.files import write_json
from pipeline.core.machine import machine, peak_bytes
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.repository import config_pbtxt
from pipeline.repository.release import Release, selected_releases
from pipeline.serving import tritonserver
from pipeline.serving.serve import Server, processes_of, running_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import KEY_HEADER

WAYS = ("grpc", "http")
# Images a request, requests at once. One after the other, large ones show what computing costs.
NOOP = "no-op"
PROFILE = "throughput"  # which large requests are meant for
MANY = 64  # images in a large request


def profiled(name: str) -> str:
    """What the model is called that runs under the throughput profile."""
    return f"{name}-{PROFILE}"


@dataclass(frozen=True)
class Beside:
    """A repository for the occasion, and the configs of its models."""

    served: Paths  # the packaged model, which is there from the start
    configs: dict[str, config_pbtxt.ModelConfig]  # of all that can be asked, by name

    @property
    def added(self) -> list[str]:
        """The models that are to be loaded once the server runs."""
        return [name for name in self.configs if name != self.served.name]

    @property
    def threads(self) -> int:
        """How many threads compute under the profile: those of a session, times the sessions."""
        return threads_of(self.configs[profiled(self.served.name)])


def copied(paths: Paths, repository: Path) -> Paths:
    """The packaged model alone, in a repository of its own."""
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


def put_beside(served: Paths) -> Beside:
    """Put a model that computes nothing, and the model under its profile, beside the served one."""
    own = config_pbtxt.read(served.packaged / "config.pbtxt")
    messages = (own, _add_noop(served.repository, served), _add_profiled(served.repository, served))
    return Beside(served, {message.name: message for message in messages})


def _add_profiled(repository: Path, served: Paths) -> config_pbtxt.ModelConfig:
    """Put the model beside itself, under its throughput profile; that config."""
    message = config_pbtxt.read(config_pbtxt.profile_file(served.packaged, PROFILE))
    message.name = profiled(served.name)
    folder = repository / message.name
    shutil.copytree(served.packaged, folder)
    (folder / "config.pbtxt").write_text(config_pbtxt.to_text(message))
    return message


def _add_noop(repository: Path, served: Paths) -> config_pbtxt.ModelConfig:
    """Put a model beside it that computes nothing, configured as it is; that config."""
    noop = config_pbtxt.read(served.packaged / "config.pbtxt")
    noop.name, noop.backend = NOOP, "python"
    for only_ours in ("version_policy", "model_warmup", "optimization", "parameters"):
        noop.ClearField(only_ours)
    for output in noop.output:
        output.ClearField("label_filename")
    folder = repository / NOOP
    (folder / "1").mkdir(parents=True)
    shutil.copy(tritonserver.BACKENDS / "noop.py", folder / "1" / "model.py")
    (folder / "config.pbtxt").write_text(config_pbtxt.to_text(noop))
    return noop


def threads_of(message: config_pbtxt.ModelConfig) -> int:
    """How many threads compute for a model: those of a session, times the sessions."""
    of_session = int(config_pbtxt.parameter(message, "intra_op_thread_count") or 0)
    instances = sum(int(group.count) for group in message.instance_group)
    return of_session * instances


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
class Scored:
    """Scores by a model's name and the protocol; without the memory that only grows later."""

    scores: dict[tuple[str, str], Score]

    def sized(self, server: Server) -> dict[tuple[str, str], Score]:
        """The scores with the most memory that each model's processes have had."""
        return {
            (name, way): replace(score, peak_bytes=served_bytes(server, name))
            for (name, way), score in self.scores.items()
        }


def score_served(
    paths: Paths,
    server: Server,
    release: Release,
    beside: Beside,
    reference: np.ndarray | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Scored:
    """Put the whole test split to the served model both ways, and under its profile over HTTP.

    Held against what eager PyTorch says, or against `reference` where it has said it already.
    Where the export or its data are not here any more, says so and scores nothing.
    """
    exported = replace(paths, name=str(release.manifest["name"]))
    try:
        images, labels = scored_images(exported, release.manifest)
        if reference is None:
            eager = Runtime(EAGER, "fp32", 1)
            report(f"{eager}: the test split")
            with worker(exported, eager, release.manifest) as ask:
                reference = ask("score")[1]
    except PipelineError as error:
        report(f"accuracy is left out: {error}")
        return Scored({})
    found = {}
    for way, url in (("grpc", server.grpc_url), ("http", server.http_url)):
        for name in beside.configs:
            if name == NOOP or (name, way) == (profiled(paths.name), "grpc"):
                continue  # it has no answers, or no row
            report(f"{name} over {way}: the test split")
            with Client(url, name) as client:
                accuracy, said = scored(triton_predictor(client), images, labels)
            found[name, way] = Score(len(said), accuracy, int((said != reference).sum()))
    return Scored(found)


def served_bytes(server: Server, name: str) -> int:
    """The most memory that tritonserver and a model's stubs have had, what they share in each."""
    return sum(
        peak_bytes(pid)
        for pid in processes_of(server.id)
        if pid == server.pid or f"/{name}/" in _command(pid)
    )


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it ended while we looked
        return ""


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

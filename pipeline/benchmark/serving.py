"""Speed of a packaged model on a server, next to the limits of the server and the runtime.

A temporary server runs three models: the packaged one, a no-op model that computes nothing, and the
packaged one under its throughput profile. The first and the last are scored on the whole test
split; then all take turns, over both protocols and at several batch sizes and concurrencies.
"""

import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from pipeline.benchmark import load, timing, workers
from pipeline.benchmark.load import run_open_loop
from pipeline.benchmark.timing import Score, TimedRow, Until, Window
from pipeline.benchmark.workers import EAGER, RUNTIME, YARDSTICK, LocalRuntime
from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import read_answers
from pipeline.core.files import write_json
from pipeline.core.machine import machine, peak_bytes
from pipeline.core.paths import Paths
from pipeline.export.runtime import onnx_predictor
from pipeline.repository import config_pbtxt
from pipeline.repository.release import Release, load_selected_releases
from pipeline.repository.running import Server
from pipeline.serving import tritonserver
from pipeline.serving.admin import Admin
from pipeline.serving.process import find_processes
from pipeline.serving.serve import run_server, with_free_ports
from pipeline.serving.settings import ServeConfig

WAYS = ("grpc", "http")
NOOP = "no-op"
PROFILE = "throughput"  # the profile for large requests
MANY = 64  # images in a large request
# Images per request, concurrency. Large requests without concurrency show the cost of computing.
ASKED = ((1, 1), (1, 8), (1, 32), (8, 8), (MANY, 1))
SHARE = 0.5  # default rate of the open loop, as a fraction of the closed loop's
CELLS = 6  # between two windows of the yardstick
LEAST_ARRIVALS = 20  # mean in a window of an open loop, so that a window is hardly ever empty
Report = Callable[[str], None]
Configs = dict[str, config_pbtxt.ModelConfig]  # of all measured models, by name


@dataclass(frozen=True)
class ServeBenchmark:
    """Settings of the measurement: every cell gets a window in every round."""

    until: Until = timing.UNTIL
    seconds: float = 1.0  # of each window, after its warm-up
    open_seconds: float = 3.0  # of each window of an open loop; longer at a low rate
    rate: float | None = None  # requests per second in it; None: half of the closed loop's
    seed: int = 0  # of its arrivals


SHORT = ServeBenchmark(Until(least=3, most=3), seconds=0.3, open_seconds=1.0)


def profile_name(name: str) -> str:
    """Return the name of the model that runs under the throughput profile."""
    return f"{name}-{PROFILE}"


def add_models(served: Paths) -> Configs:
    """Add the no-op model, and the model under its profile; return the configs of all three."""
    own = config_pbtxt.read(served.packaged / "config.pbtxt")
    profile = config_pbtxt.read(config_pbtxt.profile_file(served.packaged, PROFILE))
    profile.name = profile_name(served.name)
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
        file.write_text(config_pbtxt.to_text(config), "utf-8")
    return {config.name: config for config in (own, noop, profile)}


class Cell(NamedTuple):
    """One measured setup: the model, the way, images per request and concurrency."""

    name: str
    way: str  # grpc, http or in process
    batch: int
    concurrency: int


@dataclass(frozen=True)
class Serving:
    """The result of the measurement."""

    name: str
    version: int
    sha256: str  # of the model.onnx that was served
    threads: int  # that compute under the throughput profile, and in process
    config: ServeBenchmark
    rows: tuple[TimedRow, ...]

    def ratios(self) -> dict[str, dict[str, Any]]:
        """Return the two ratios that show the cost of serving: see `timing.divide_speeds`."""
        rows = {(row.name, row.way, row.batch, row.concurrency): row for row in self.rows}
        many, local = (profile_name(self.name), "http", MANY, 8), (RUNTIME, "in process", MANY, 1)
        pairs = {
            "single_of_noop": ((self.name, "grpc", 1, 32), (NOOP, "grpc", 1, 32)),
            "batch64_of_in_process": (many, local),
        }
        return {name: timing.divide_speeds(rows[a], rows[b]) for name, (a, b) in pairs.items()}

    def record(self) -> dict[str, Any]:
        """Return the result as values for JSON."""
        pairs = self.ratios()
        return {
            "what": "serve",
            **machine(),
            **{key: getattr(self, key) for key in ("name", "version", "sha256", "threads")},
            "config": asdict(self.config),
            "rows": [row.record() for row in self.rows],
            "scores": {f"{r.name}, {r.way}": asdict(r.score) for r in self.rows if r.score},
            "ratios": {name: parts["of_medians"] for name, parts in pairs.items()},
            "pairs": pairs,
        }

    def ratio_lines(self) -> list[str]:
        """Return the two ratios as lines of text."""
        meanings = (
            "single images, concurrency 32, compared with a model that computes nothing",
            f"batches of {MANY}, {PROFILE} profile, compared with ONNX Runtime in process",
        )
        return [
            f"{parts['of_medians']:.2f} ({parts['min']:.2f} to {parts['max']:.2f}) {meaning}"
            for parts, meaning in zip(self.ratios().values(), meanings, strict=True)
        ]


def benchmark_serving(
    paths: Paths,
    config: ServeBenchmark = ServeBenchmark(),
    report: Report = lambda line: None,
    reference: np.ndarray | None = None,
) -> Serving:
    """Serve the selected version next to a no-op model, measure both, write serving.json.

    `reference` holds eager PyTorch's classes of the test split (N,), if already known.
    Raises CheckFailedError if an answer was wrong or missing, and PipelineError if there is no
    packaged model, or if it does not accept batches of MANY.
    """
    if not (paths.packaged / "config.pbtxt").exists():
        raise PipelineError(f"there is no model at {paths.packaged}: run 'pipeline package' first")
    largest = config_pbtxt.read(paths.packaged / "config.pbtxt").max_batch_size
    if largest < MANY:
        fix = f"package it with --max-batch-size {MANY}"
        raise PipelineError(f"{paths.packaged} takes batches of {largest}: {fix}")
    with tempfile.TemporaryDirectory(prefix="handwriting-benchmark-") as scratch:
        served = replace(paths, repository_folder=Path(scratch) / "models")
        shutil.copytree(paths.packaged, served.packaged)
        release = load_selected_releases(served)[paths.name]
        with (
            run_server(served, with_free_ports(ServeConfig()), report=report) as (server, _),
            Admin(server.grpc_url, server.admin_key, load.TIMEOUT) as admin,
        ):
            configs = add_models(served)
            for name in configs:
                if name != served.name:
                    admin.load(name)
            scores = score_served(paths, server, release, list(configs), reference, report)
            urls = {"grpc": server.grpc_url, "http": server.http_url}
            bench = _Bench(admin, urls, served.name, configs, release, config)
            rows = bench.rows(report)
            scores = {
                (name, way): replace(score, peak_bytes=measure_peak_bytes(server, name))
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
    """Score the served models on the whole test split; return scores by name and protocol.

    Over both protocols, but under the profile only over HTTP. Peak memory is left at 0, since it
    still grows. Classes are compared with eager PyTorch's, or with `reference` (N,) if given. If
    the export or its data are missing, reports it and returns no scores.
    """
    exported = replace(paths, name=str(release.manifest["name"]))
    try:
        images, labels = workers.load_scored_images(exported, release.manifest)
        if reference is None:
            eager = LocalRuntime(EAGER, "fp32", 1)
            report(f"{eager}: the test split")
            with workers.start_worker(exported, eager, release.manifest) as ask:
                reference = ask("score")[1]
    except PipelineError as error:
        report(f"accuracy is left out: {error}")
        return {}
    scores = {}
    for way, url in (("grpc", server.grpc_url), ("http", server.http_url)):
        for name in names:
            if name == NOOP or (name, way) == (profile_name(paths.name), "grpc"):
                continue  # a no-op has no accuracy; the other has no row
            report(f"{name} over {way}: the test split")
            with Client(url, name) as client:
                accuracy, classes = workers.score_predictor(
                    triton_predictor(client), images, labels
                )
            scores[name, way] = Score(len(classes), accuracy, int((classes != reference).sum()))
    return scores


def measure_peak_bytes(server: Server, name: str) -> int:
    """Return the peak memory of tritonserver plus that of the model's stubs, in bytes.

    Memory that several processes share is counted once for each of them.
    """
    total = 0
    for pid in find_processes(server.id):
        try:
            is_of_model = any(f"/{name}/" in part for part in psutil.Process(pid).cmdline())
        except psutil.Error:  # the process just ended
            continue
        total += peak_bytes(pid) if pid == server.pid or is_of_model else 0
    return total


@dataclass(frozen=True)
class _Bench:
    """A server with all models loaded, and the settings of the measurement."""

    admin: Admin
    urls: Mapping[str, str]  # by protocol
    name: str  # of the packaged model
    configs: Configs
    release: Release
    config: ServeBenchmark

    @property
    def threads(self) -> int:
        """The threads of all sessions, under the profile and in process."""
        config = self.configs[profile_name(self.name)]
        of_session = config_pbtxt.thread_count(config)
        return of_session * sum(int(group.count) for group in config.instance_group)

    def rows(self, report: Report) -> tuple[TimedRow, ...]:
        """Measure a row for each cell, with the yardstick's first and the open loops' last."""
        measures: dict[Cell, Callable[[], Window]] = {}
        group: dict[Cell, tuple[int, int]] = {}
        profile = profile_name(self.name)
        cells = (  # those to be compared are next to each other
            *(Cell(name, way, *of) for of in ASKED for way in WAYS for name in (self.name, NOOP)),
            *(Cell(self.name, way, MANY, 8) for way in WAYS),
            *(Cell(profile, "http", MANY, 8), Cell(RUNTIME, "in process", MANY, 1)),
        )
        for cell in cells:
            if len(measures) % (CELLS + 1) == 0:
                place = Cell(YARDSTICK, "numpy", len(measures), 1)
                measures[place] = functools.partial(workers.run_yardstick, self.config.seconds / 2)
            measures[cell] = self._measure(cell)
            is_profile = cell.name in (RUNTIME, profile)
            group[cell] = (cell.batch, 0 if is_profile else cell.concurrency)
        windows = timing.take_turns(measures, group, self.config.until, report)
        yardstick = [windows[cell] for cell in measures if cell.name == YARDSTICK]
        rows = [workers.join_yardstick(yardstick)]
        rows += [TimedRow(*cell, tuple(windows[cell])) for cell in group]
        return (*rows, *self._open_rows(rows, report))

    def _measure(self, cell: Cell) -> Callable[[], Window]:
        """Return the function that measures one window of a cell."""
        seconds = self.config.seconds
        if cell.name == RUNTIME:
            predictor = onnx_predictor(self.release.onnx, self.threads)
            batches = workers.choose_batches(self.release.golden, cell.batch)
            ask = functools.partial(timing.run_closed_loop, predictor, *batches)
            return functools.partial(timing.measure_answered, ask, seconds)
        questions = self._build_questions(cell)
        return lambda: load.measure(self.admin, questions, cell.concurrency, seconds)

    def _build_questions(self, cell: Cell) -> load.Questions:
        images, classes = workers.choose_batches(self.release.golden, cell.batch)
        if cell.name == NOOP:  # it answers zeros
            (zero,), _ = read_answers(np.zeros_like(self.release.golden.outputs[:1]))
            classes = [np.full_like(of_batch, zero) for of_batch in classes]
        return load.build_questions(self.configs[cell.name], images, classes, self.urls[cell.way])

    def _open_rows(self, closed: list[TimedRow], report: Report) -> list[TimedRow]:
        """Measure open loops of single images, one per protocol."""
        timing.require_answers(closed)  # the rates are computed from their speeds
        rates = {
            Cell(self.name, row.way, 1, 0): self.config.rate or SHARE * row.speed
            for row in closed
            if (row.name, row.batch, row.concurrency) == (self.name, 1, 32)
        }
        report("open loop: " + ", ".join(f"{c.way} {rate:,.0f}/s" for c, rate in rates.items()))
        seeds = itertools.count(self.config.seed)  # a new seed for each window
        measures = {
            cell: functools.partial(self._run_open_loop, self._build_questions(cell), rate, seeds)
            for cell, rate in rates.items()
        }
        windows = timing.take_turns(measures, {cell: cell for cell in rates}, Until(3, 3))
        return [TimedRow(*cell, tuple(windows[cell]), rate=rate) for cell, rate in rates.items()]

    def _run_open_loop(
        self, questions: load.Questions, rate: float, seeds: Iterator[int]
    ) -> Window:
        """Measure a window of an open loop, long enough for LEAST_ARRIVALS requests on average."""
        seconds = max(self.config.open_seconds, LEAST_ARRIVALS / rate)
        ask = functools.partial(run_open_loop, questions, rate, seconds)
        return load.count_during(self.admin, questions.target, lambda: ask(next(seeds)))

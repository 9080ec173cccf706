"""How fast a packaged model is served, beside what its server and its runtime could do at most."""

# Shape letters: N images, B batch, K classes.

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import load, triton
from pipeline.config import ServeConfig
from pipeline.errors import CheckFailedError, PipelineError
from pipeline.evaluate import margins
from pipeline.files import write_json
from pipeline.golden import Golden
from pipeline.machine import machine
from pipeline.paths import Paths
from pipeline.replay import Release, selected_releases
from pipeline.serve import running_server, with_free_ports
from pipeline.timing import HEADER, Row, Window, closed_loop, ratio
from pipeline.tritonserver import BACKENDS, KEY_HEADER

NOOP = "no-op"
IN_PROCESS = "ONNX Runtime"
PROFILE = "throughput"  # which large requests are meant for
MANY = 64  # images in a large request


@dataclass(frozen=True)
class ServeBenchmark:
    """How long to measure: every cell has a window in every round."""

    rounds: int = 9
    seconds: float = 2.0  # of each window, after its warm-up


SHORT = ServeBenchmark(rounds=3, seconds=1.0)


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

    def ratios(self) -> dict[str, dict[str, Any]]:
        """The two that say what serving costs: see `ratio`."""
        found = {(row.name, row.batch, row.concurrency): row for row in self.rows}
        ours, many = found[profiled(self.name), MANY, 8], found[IN_PROCESS, MANY, 1]
        return {
            "single_of_noop": ratio(found[self.name, 1, 32], found[NOOP, 1, 32]),
            "batch64_of_in_process": ratio(ours, many),
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
            "ratios": {name: parts["of_medians"] for name, parts in self.ratios().items()},
            "pairs": self.ratios(),
        }

    def __str__(self) -> str:
        said = {
            "single_of_noop": "single images, 32 at once, beside a model that computes nothing",
            "batch64_of_in_process": (
                f"batches of {MANY} under the {PROFILE} profile, beside ONNX Runtime in process, "
                f"{self.threads} threads each"
            ),
        }
        ratios = [
            f"{parts['of_medians']:.2f} ({parts['min']:.2f} to {parts['max']:.2f}) {said[name]}"
            for name, parts in self.ratios().items()
        ]
        return "\n".join([HEADER, *map(str, self.rows), *ratios])


def profiled(name: str) -> str:
    """What the model is called that runs under the throughput profile."""
    return f"{name}-{PROFILE}"


def cells(name: str) -> list[Cell]:
    """What is measured, in the order of a round: what is compared stands side by side."""
    return [
        Cell(name, "grpc", 1, 32),
        Cell(NOOP, "grpc", 1, 32),
        Cell(profiled(name), "http", MANY, 8),
        Cell(IN_PROCESS, "in process", MANY, 1),
        Cell(name, "grpc", MANY, 8),
        Cell(name, "grpc", 1, 8),
        Cell(name, "grpc", 1, 1),
    ]


def benchmark_serving(
    paths: Paths,
    config: ServeBenchmark = ServeBenchmark(),
    report: Callable[[str], None] = lambda line: None,
) -> Serving:
    """Serve the selected version beside a no-op model, measure both, write serving.json.

    Raises CheckFailedError when an answer was wrong or missing.
    """
    with tempfile.TemporaryDirectory(prefix="handwriting-benchmark-") as scratch:
        repository = Path(scratch) / "models"
        served = _copied(paths, repository)
        release = selected_releases(served)[paths.name]
        with running_server(served, with_free_ports(ServeConfig()), report=report) as (server, _):
            http, grpc = f"127.0.0.1:{server.http_port}", f"127.0.0.1:{server.grpc_port}"
            with load.Server(http, grpc, server.admin_key, KEY_HEADER) as asked:
                configs = [
                    triton.read(served.packaged / "config.pbtxt"),
                    _add_noop(repository, served),
                    _add_profiled(repository, served),
                ]
                for added in configs[1:]:
                    asked.load(added.name)
                threads = _threads(configs[-1])
                rows = _rounds(asked, configs, threads, release, config, report)
    _require_right(rows)
    result = Serving(paths.name, release.version, release.sha256, threads, config, rows)
    write_json(paths.serving, result.record())
    return result


def _copied(paths: Paths, repository: Path) -> Paths:
    """The packaged model alone, in a repository of its own."""
    if not (paths.packaged / "config.pbtxt").exists():
        raise PipelineError(f"no model at {paths.packaged}: run 'pipeline package' first")
    largest = triton.read(paths.packaged / "config.pbtxt").max_batch_size
    if largest < MANY:
        raise PipelineError(
            f"{paths.packaged} takes batches of {largest} at most, and {MANY} are measured: "
            f"package it with --max-batch-size {MANY}"
        )
    shutil.copytree(paths.packaged, repository / paths.name)
    return replace(paths, repository_folder=repository)


def _add_profiled(repository: Path, served: Paths) -> triton.ModelConfig:
    """Put the model beside itself, under its throughput profile; that config."""
    message = triton.read(triton.profile_file(served.packaged, PROFILE))
    message.name = profiled(served.name)
    folder = repository / message.name
    shutil.copytree(served.packaged, folder)
    (folder / "config.pbtxt").write_text(triton.to_text(message))
    return message


def _add_noop(repository: Path, served: Paths) -> triton.ModelConfig:
    """Put a model beside it that computes nothing, configured as it is; that config."""
    noop = triton.read(served.packaged / "config.pbtxt")
    noop.name, noop.backend = NOOP, "python"
    for only_ours in ("version_policy", "model_warmup", "optimization", "parameters"):
        noop.ClearField(only_ours)
    for output in noop.output:
        output.ClearField("label_filename")
    folder = repository / NOOP
    (folder / "1").mkdir(parents=True)
    shutil.copy(BACKENDS / "noop.py", folder / "1" / "model.py")
    (folder / "config.pbtxt").write_text(triton.to_text(noop))
    return noop


def _rounds(
    server: load.Server,
    configs: list[triton.ModelConfig],
    threads: int,
    release: Release,
    config: ServeBenchmark,
    report: Callable[[str], None],
) -> tuple[Row, ...]:
    of_name = {message.name: message for message in configs}
    measures = {
        cell: _served(cell, server, of_name[cell.name], release, config.seconds)
        if cell.name in of_name
        else _in_process(cell, threads, release, config.seconds)
        for cell in cells(configs[0].name)
    }
    windows: dict[Cell, list[Window]] = {cell: [] for cell in measures}
    for turn in range(config.rounds):
        report(f"round {turn + 1} of {config.rounds}")
        order = list(measures) if turn % 2 == 0 else list(reversed(measures))
        for cell in order:
            windows[cell].append(measures[cell]())
    return tuple(
        Row(cell.name, cell.way, cell.batch, cell.concurrency, tuple(found))
        for cell, found in windows.items()
    )


def _served(
    cell: Cell,
    server: load.Server,
    message: triton.ModelConfig,
    release: Release,
    seconds: float,
) -> Callable[[], Window]:
    """What measures one window of a served model."""
    images, classes = _batches(release.golden, cell.batch)
    if cell.name == NOOP:  # zeros: the first class is the largest
        classes = [np.zeros_like(of_batch) for of_batch in classes]
    asked = load.questions(message, images, classes, cell.way)
    return lambda: server.measure(cell.name, asked, cell.concurrency, seconds)


def _in_process(cell: Cell, threads: int, release: Release, seconds: float) -> Callable[[], Window]:
    """What measures one window of ONNX Runtime without a server."""
    from pipeline.runtime import onnx_predictor

    images, classes = _batches(release.golden, cell.batch)
    predictor = onnx_predictor(release.onnx, threads)
    return lambda: closed_loop(predictor, images, classes, seconds)


def _batches(golden: Golden, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Batches of the golden set's images whose class no rounding can change, and their classes."""
    is_sure = margins(golden.outputs) > 2 * golden.bounds
    images, classes = golden.images[is_sure], golden.outputs[is_sure].argmax(axis=1)
    if not len(images):
        raise CheckFailedError("the golden set has no image whose class is sure: train for longer")
    batches = len(images) if size == 1 else 8
    rows = np.arange(batches * size).reshape(batches, size) % len(images)
    return [images[row] for row in rows], [classes[row] for row in rows]


def _threads(message: triton.ModelConfig) -> int:
    """How many threads compute for the model: those of a session, times the sessions."""
    of_session = int(triton.parameter(message, "intra_op_thread_count") or 0)
    instances = sum(int(group.count) for group in message.instance_group)
    return of_session * instances


def _require_right(rows: tuple[Row, ...]) -> None:
    """Raise where an answer was wrong or missing: how fast it came is no figure then."""
    bad = [
        f"{row.name}, {row.batch} images a request, {row.concurrency} at once: "
        f"{row.wrong} wrong, {row.failed} failed"
        for row in rows
        if row.wrong or row.failed or not all(row.speeds)
    ]
    if bad:
        raise CheckFailedError(f"answers were wrong or missing: {'; '.join(bad)}")

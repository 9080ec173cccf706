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
from pipeline.evaluate import Predictor, margins
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
    way: str  # grpc or in process
    batch: int
    concurrency: int


@dataclass(frozen=True)
class Serving:
    """What the measurement found."""

    name: str
    version: int
    sha256: str  # of the model.onnx that was served
    config: ServeBenchmark
    rows: tuple[Row, ...]

    def ratios(self) -> dict[str, dict[str, Any]]:
        """The two that say what serving costs: see `ratio`."""
        found = {(row.name, row.batch, row.concurrency): row for row in self.rows}
        many = found[IN_PROCESS, MANY, 1]
        return {
            "single_of_noop": ratio(found[self.name, 1, 32], found[NOOP, 1, 32]),
            "batch64_of_in_process": ratio(found[self.name, MANY, 8], many),
        }

    def record(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {
            "what": "serve",
            **machine(),
            "name": self.name,
            "version": self.version,
            "sha256": self.sha256,
            "config": asdict(self.config),
            "rows": [row.record() for row in self.rows],
            "ratios": {name: parts["of_medians"] for name, parts in self.ratios().items()},
            "pairs": self.ratios(),
        }

    def __str__(self) -> str:
        said = {
            "single_of_noop": "single images, 32 at once, beside a model that computes nothing",
            "batch64_of_in_process": "batches of 64, beside ONNX Runtime in process",
        }
        ratios = [
            f"{parts['of_medians']:.2f} ({parts['min']:.2f} to {parts['max']:.2f}) {said[name]}"
            for name, parts in self.ratios().items()
        ]
        return "\n".join([HEADER, *map(str, self.rows), *ratios])


def cells(name: str) -> list[Cell]:
    """What is measured, in the order of a round: what is compared stands side by side."""
    return [
        Cell(name, "grpc", 1, 32),
        Cell(NOOP, "grpc", 1, 32),
        Cell(name, "grpc", MANY, 8),
        Cell(IN_PROCESS, "in process", MANY, 1),
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
            address = f"127.0.0.1:{server.grpc_port}"
            with load.Server(address, server.admin_key, KEY_HEADER) as asked:
                message = triton.read(served.packaged / "config.pbtxt")
                asked.load(_add_noop(repository, message))
                rows = _rounds(asked, message, release, config, report)
    _require_right(rows)
    result = Serving(paths.name, release.version, release.sha256, config, rows)
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


def _add_noop(repository: Path, message: triton.ModelConfig) -> str:
    """Put the no-op model beside ours, configured as ours is; its name."""
    noop = triton.ModelConfig()
    noop.CopyFrom(message)
    noop.name, noop.backend = NOOP, "python"
    for only_ours in ("version_policy", "model_warmup", "optimization", "parameters"):
        noop.ClearField(only_ours)
    for output in noop.output:
        output.ClearField("label_filename")
    folder = repository / NOOP
    (folder / "1").mkdir(parents=True)
    shutil.copy(BACKENDS / "noop.py", folder / "1" / "model.py")
    (folder / "config.pbtxt").write_text(triton.to_text(noop))
    return NOOP


def _rounds(
    server: load.Server,
    message: triton.ModelConfig,
    release: Release,
    config: ServeBenchmark,
    report: Callable[[str], None],
) -> tuple[Row, ...]:
    measures = {
        cell: _measure(cell, server, message, release, config.seconds)
        for cell in cells(message.name)
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


def _measure(
    cell: Cell,
    server: load.Server,
    message: triton.ModelConfig,
    release: Release,
    seconds: float,
) -> Callable[[], Window]:
    """What measures one window of the cell."""
    images, classes = _batches(release.golden, cell.batch)
    if cell.way == "in process":
        predictor = _onnx_runtime(release, _threads(message))
        return lambda: closed_loop(predictor, images, classes, seconds)
    model = triton.ModelConfig()
    model.CopyFrom(message)
    model.name = cell.name
    if cell.name == NOOP:  # zeros: the first class is the largest
        classes = [np.zeros_like(of_batch) for of_batch in classes]
    asked = load.questions(model, images, classes)
    return lambda: server.measure(cell.name, asked, cell.concurrency, seconds)


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
    """How many threads compute in the server: those of a session, times the sessions."""
    of_session = int(triton.parameter(message, "intra_op_thread_count") or 0)
    instances = sum(int(group.count) for group in message.instance_group)
    return of_session * instances


def _onnx_runtime(release: Release, threads: int) -> Predictor:
    from pipeline.runtime import onnx_predictor

    return onnx_predictor(release.onnx, threads)


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

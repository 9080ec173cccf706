"""How fast an export is in this process's runtimes: eager PyTorch, and ONNX Runtime's variants.

Each runtime lives in a process of its own, so that threads do not disturb each other and peak
memory is its own. All take turns, window by window, with a yardstick that no change of ours can
move: two measurements of different days are compared as parts of it.
"""

# Shape letters: N images, B batch, K classes.

import multiprocessing
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import scored_split
from pipeline.errors import PipelineError
from pipeline.evaluate import Predictor, margins, predict, score
from pipeline.files import check_digest, read_json, write_json
from pipeline.golden import unpack_golden
from pipeline.machine import machine
from pipeline.paths import Paths
from pipeline.sample import read_sample
from pipeline.timing import HEADER, Row, Window, closed_loop, together

YARDSTICK = "yardstick"
EAGER, RUNTIME = "eager PyTorch", "ONNX Runtime"
SIDE = 96  # of the yardstick's matrices: too small for a second thread
BESIDE = 4  # cells from one window of the yardstick to the next
EXPORT = "run 'pipeline export' again"


@dataclass(frozen=True)
class InferBenchmark:
    """How long to measure: every cell has a window in every round."""

    rounds: int = 7
    seconds: float = 0.5  # of each window, after its warm-up
    batches: tuple[int, ...] = (1, 8, 64)
    threads: tuple[int, ...] = (1, 2)


SHORT = InferBenchmark(rounds=3, seconds=0.25, batches=(1, 64))


@dataclass(frozen=True)
class Runtime:
    """One way to run the export in a process."""

    name: str
    precision: str
    threads: int

    def __str__(self) -> str:
        variant = f" {self.precision}" if self.name == RUNTIME else ""
        return f"{self.name}{variant}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Score:
    """What a runtime answers to the test split, and what it needs for it."""

    images: int
    accuracy: float  # fraction of images, 0 to 1
    differing: int  # images whose class is not eager PyTorch's
    peak_bytes: int = 0  # of its process, libraries included


@dataclass(frozen=True)
class Inference:
    """What the measurement found."""

    name: str
    sha256: str  # of the export's model.onnx
    config: InferBenchmark
    rows: tuple[Row, ...]
    scores: dict[str, Score] = field(default_factory=dict)  # by the rows' names

    def record(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {
            "what": "infer",
            **machine(),
            "name": self.name,
            "sha256": self.sha256,
            "config": asdict(self.config),
            "rows": [row.record() for row in self.rows],
            "scores": {name: asdict(found) for name, found in self.scores.items()},
        }

    def __str__(self) -> str:
        lines = [HEADER, *map(str, self.rows), "", f"{'':<30} accuracy differing peak memory"]
        lines += [
            f"{name:<30} {found.accuracy:>8.2%} {found.differing:>9} "
            f"{found.peak_bytes / (1 << 20):>7,.0f} MiB"
            for name, found in self.scores.items()
        ]
        return "\n".join(lines)


def benchmark_inference(
    paths: Paths,
    config: InferBenchmark = InferBenchmark(),
    report: Callable[[str], None] = lambda line: None,
) -> Inference:
    """Measure the export `paths.name` in every runtime, in turns; write inference.json."""
    manifest = read_json(paths.manifest, EXPORT)
    runtimes = [
        Runtime(name, precision, threads)
        for name, precisions in ((EAGER, ["fp32"]), (RUNTIME, _precisions(paths, manifest)))
        for precision in precisions
        for threads in config.threads
    ]
    with ExitStack() as stack:
        workers = {one: stack.enter_context(_worker(paths, one)) for one in runtimes}
        answers = {}
        for one, worker in workers.items():
            report(f"{one}: the test split")
            answers[one] = worker("score")
        rows = _rounds(workers, config, report)
        peaks = {one: int(worker("peak")) for one, worker in workers.items()}
    said = answers[runtimes[0]][1]
    scores = {
        str(one): Score(len(classes), accuracy, int((classes != said).sum()), peaks[one])
        for one, (accuracy, classes) in answers.items()
    }
    digest = str(manifest["files"][paths.onnx.name])
    result = Inference(paths.name, digest, config, rows, scores)
    write_json(paths.inference, result.record())
    return result


def _precisions(paths: Paths, manifest: dict[str, Any]) -> list[str]:
    return [
        precision for precision in ("fp32", "fp16", "int8") if precision in manifest["precisions"]
    ]


def _rounds(
    workers: dict[Runtime, "Ask"], config: InferBenchmark, report: Callable[[str], None]
) -> tuple[Row, ...]:
    cells = [(one, batch) for batch in config.batches for one in workers]
    windows: dict[tuple[Runtime, int], list[Window]] = {cell: [] for cell in cells}
    yardsticks: list[Window] = []
    for turn in range(config.rounds):
        report(f"round {turn + 1} of {config.rounds}")
        beside: list[Window] = []
        for place, (one, batch) in enumerate(cells if turn % 2 == 0 else reversed(cells)):
            if place % BESIDE == 0:
                beside.append(yardstick(config.seconds))
            windows[one, batch].append(workers[one]("measure", batch, config.seconds))
        yardsticks.append(together(beside))
    rows = [Row(YARDSTICK, "numpy", 1, 1, tuple(yardsticks))]
    for (one, batch), found in windows.items():
        rows.append(Row(str(one), "in process", batch, 1, tuple(found)))
    return tuple(rows)


def yardstick(seconds: float) -> Window:
    """A window of matrix products in numpy, on one thread: what this machine can do just now."""
    matrix = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
    outputs = np.eye(1, SIDE, dtype=np.float32)

    def products(images: np.ndarray) -> np.ndarray:
        for _ in range(20):
            np.dot(images, images)
        return outputs

    return _answered(products, [matrix], [np.zeros(1, np.int64)], seconds)


Ask = Callable[..., Any]


@contextmanager
def _worker(paths: Paths, runtime: Runtime) -> Iterator[Ask]:
    """A process with the runtime in it, as a function that asks it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, paths, runtime), daemon=True)
    process.start()
    theirs.close()

    def ask(*question: Any) -> Any:
        try:
            ours.send(question)
            answer = ours.recv()
        except (EOFError, OSError) as error:
            raise PipelineError(f"the process with {runtime} ended: out of memory?") from error
        if isinstance(answer, PipelineError):
            raise answer
        return answer

    try:
        yield ask
    finally:
        ours.close()
        process.join(5)
        process.kill()


def _work(connection: Connection, paths: Paths, runtime: Runtime) -> None:
    """Answer questions until nobody asks any more."""
    os.environ["OMP_NUM_THREADS"] = str(runtime.threads)
    try:
        predictor, images, labels = _prepare(paths, runtime)
    except PipelineError as error:
        predictor, failure = None, error
    while True:
        try:
            kind, *arguments = connection.recv()
        except EOFError:
            return
        if predictor is None:
            connection.send(failure)
        elif kind == "score":
            outputs = predict(predictor, images)
            connection.send((score(outputs, labels).accuracy, outputs.argmax(axis=1)))
        elif kind == "measure":
            connection.send(_measure(predictor, paths, runtime.precision, *arguments))
        else:
            connection.send(_peak_bytes())


def _peak_bytes() -> int:
    """The most memory that this process has had; getrusage would count its parent's in."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(peak) * 1024


def _prepare(paths: Paths, runtime: Runtime) -> tuple[Predictor, np.ndarray, np.ndarray]:
    """The predictor, and the split that the export is proven on."""
    manifest = read_json(paths.manifest, EXPORT)
    if runtime.name == EAGER:
        import torch

        from pipeline.model import eager_predictor
        from pipeline.subject import exported_subject

        torch.set_num_threads(runtime.threads)
        predictor = eager_predictor(exported_subject(paths, manifest).model)
    else:
        from pipeline.runtime import onnx_predictor

        content = paths.variant(runtime.precision).read_bytes()
        predictor = onnx_predictor(content, runtime.threads)
    if manifest.get("module"):
        check_digest(paths.images, manifest.get("images_sha256"), EXPORT)
        sample = read_sample(paths.images)
        labels = (
            predict(predictor, sample.images).argmax(1) if sample.labels is None else sample.labels
        )
        return predictor, sample.images, labels
    training = manifest["training"]
    test = scored_split(training, manifest["data_sha256"], paths.data(training["dataset"]))
    return predictor, test.images, test.labels


def _measure(
    predictor: Predictor, paths: Paths, precision: str, batch: int, seconds: float
) -> Window:
    """A window on images of the golden set whose class no rounding can change."""
    golden = unpack_golden(paths.variant_golden(precision).read_bytes(), EXPORT)
    is_sure = margins(golden.outputs) > 2 * golden.bounds
    images, classes = golden.images[is_sure], golden.outputs[is_sure].argmax(axis=1)
    if not len(images):
        raise PipelineError("the golden set has no image whose class is sure: train for longer")
    rows = np.arange(8 * batch).reshape(8, batch) % len(images)
    batches, answers = [images[row] for row in rows], [classes[row] for row in rows]
    return _answered(predictor, batches, answers, seconds)


def _answered(
    predictor: Predictor, batches: list[np.ndarray], classes: list[np.ndarray], seconds: float
) -> Window:
    """A window with an answer in it, however busy the machine is: as long as that takes."""
    while True:
        window = closed_loop(predictor, batches, classes, seconds)
        if len(window.latencies):
            return window
        seconds *= 2

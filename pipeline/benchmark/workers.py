"""Runtimes in separate processes, and the yardstick that measures the machine's speed.

Separate processes keep the runtimes' threads from disturbing each other, and give each its own peak
memory. The yardstick does not depend on this package's code.
"""

# Shape letters: N images, B batch, K classes.

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pipeline.benchmark.timing import (
    TimedRow,
    Window,
    join_windows,
    measure_answered,
    run_closed_loop,
)
from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import Predictor, margins, predict, read_answers, score
from pipeline.core.files import check_digest
from pipeline.core.machine import peak_bytes
from pipeline.core.paths import Paths
from pipeline.data.splits import load_scored_split
from pipeline.export.sample import read_sample
from pipeline.repository.golden import Golden, unpack_golden

YARDSTICK = "yardstick"
EAGER, RUNTIME = "eager PyTorch", "ONNX Runtime"
SIDE = 96  # of the yardstick's matrices: too small for a second thread
EXPORT = "run 'pipeline export' again"


@dataclass(frozen=True)
class LocalRuntime:
    """One way to run the export in a process."""

    name: str
    precision: str
    threads: int

    def __str__(self) -> str:
        variant = f" {self.precision}" if self.name == RUNTIME else ""
        return f"{self.name}{variant}, {self.threads} thread{'s' * (self.threads > 1)}"


def run_yardstick(seconds: float) -> Window:
    """Measure a window of numpy matrix products on one thread: the machine's current speed."""
    matrix = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
    outputs = np.eye(1, SIDE, dtype=np.float32)

    def products(images: np.ndarray) -> np.ndarray:
        for _ in range(20):
            np.dot(images, images)
        return outputs

    ask = functools.partial(run_closed_loop, products, [matrix], [np.zeros(1, np.int64)])
    return measure_answered(ask, seconds)


def join_yardstick(windows: list[list[Window]]) -> TimedRow:
    """Return the yardstick's row: its windows of one round, joined into one, for every round.

    `windows` has a list for each place in a round, with one window for each round.
    """
    rounds = zip(*windows, strict=True)
    return TimedRow(YARDSTICK, "numpy", 1, 1, tuple(join_windows(of_round) for of_round in rounds))


Ask = Callable[..., Any]


@contextmanager
def start_worker(paths: Paths, runtime: LocalRuntime, manifest: Mapping[str, Any]) -> Iterator[Ask]:
    """Start a process that holds the runtime; yield a function that sends it a question."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, paths, runtime, dict(manifest))
    process = context.Process(target=_work, args=arguments, daemon=True)
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


def _work(
    connection: Connection, paths: Paths, runtime: LocalRuntime, manifest: dict[str, Any]
) -> None:
    """Answer questions until the asking process closes the connection."""
    os.environ["OMP_NUM_THREADS"] = str(runtime.threads)
    load = functools.cache(functools.partial(_load_predictor, paths, runtime, manifest))
    while True:
        try:
            kind, *arguments = connection.recv()
        except EOFError:
            return
        try:
            predictor = load()
            if kind == "score":
                connection.send(score_predictor(predictor, *load_scored_images(paths, manifest)))
            elif kind == "measure":
                golden = paths.variant_golden(runtime.precision).read_bytes()
                batch, seconds = arguments
                batches = choose_batches(unpack_golden(golden, EXPORT), batch)
                ask = functools.partial(run_closed_loop, predictor, *batches)
                connection.send(measure_answered(ask, seconds))
            else:
                connection.send(peak_bytes())
        except PipelineError as error:
            connection.send(error)


def _load_predictor(paths: Paths, runtime: LocalRuntime, manifest: dict[str, Any]) -> Predictor:
    """Return the runtime's predictor; import torch only for eager PyTorch, as it takes memory."""
    if runtime.name == EAGER:
        import torch

        from pipeline.export.subject import load_subject
        from pipeline.training.networks import eager_predictor

        torch.set_num_threads(runtime.threads)
        return eager_predictor(load_subject(paths, manifest).model)
    from pipeline.export.runtime import onnx_predictor

    return onnx_predictor(paths.variant(runtime.precision).read_bytes(), runtime.threads)


def load_scored_images(
    paths: Paths, manifest: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images (N, ...) that an export is validated on, and their classes if known."""
    if manifest.get("module"):
        check_digest(paths.images, manifest.get("images_sha256"), EXPORT)
        sample = read_sample(paths.images)
        return sample.images, sample.labels
    training = manifest["training"]
    test = load_scored_split(training, manifest["data_sha256"], paths.data(training["dataset"]))
    return test.images, test.labels


def score_predictor(
    predictor: Predictor, images: np.ndarray, labels: np.ndarray | None, batch: int = 64
) -> tuple[float, np.ndarray]:
    """Return the accuracy on images (N, ...) and the predicted classes (N,).

    Without `labels` the predictions count as correct, so the accuracy is 1.
    """
    outputs = predict(predictor, images, batch)
    classes = read_answers(outputs)[0]
    return score(outputs, classes if labels is None else labels).accuracy, classes


def choose_batches(golden: Golden, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return batches of golden images, and their classes; only images whose class is safe.

    A class is safe if its margin is more than twice the image's bound.
    """
    is_sure = margins(golden.outputs) > 2 * golden.bounds
    images, classes = golden.images[is_sure], read_answers(golden.outputs[is_sure])[0]
    if not len(images):
        raise PipelineError("the golden set has no image whose class is sure: train for longer")
    batches = len(images) if size == 1 else 8
    rows = np.arange(batches * size).reshape(batches, size) % len(images)
    return [images[row] for row in rows], [classes[row] for row in rows]

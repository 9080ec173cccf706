"""Speed of an export in this machine's runtimes: eager PyTorch and ONNX Runtime, per precision.

All runtimes take turns, window by window, with a yardstick that does not depend on this package's
code: measurements of different days are compared relative to it.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.benchmark import timing, workers
from pipeline.benchmark.timing import UNTIL, Score, TimedRow, Until, Window
from pipeline.benchmark.workers import EAGER, EXPORT, RUNTIME, YARDSTICK, Ask, LocalRuntime
from pipeline.core.files import check_digest, read_json, write_json
from pipeline.core.machine import machine
from pipeline.core.paths import PRECISIONS, Paths

CELLS = 4  # between two windows of the yardstick
VALIDATE = "run 'pipeline validate' first"


@dataclass(frozen=True)
class InferBenchmark:
    """Settings of the measurement: every cell gets a window in every round."""

    until: Until = UNTIL
    seconds: float = 0.5  # of each window, after its warm-up
    batches: tuple[int, ...] = (1, 8, 64)
    threads: tuple[int, ...] = (1, 2)


SHORT = InferBenchmark(Until(least=3, most=3), seconds=0.25, batches=(1, 64))


@dataclass(frozen=True)
class Inference:
    """The result of the measurement."""

    name: str
    sha256: str  # of the export's model.onnx
    config: InferBenchmark
    rows: tuple[TimedRow, ...]
    classes: np.ndarray | None = None  # int64 (N,): eager PyTorch's classes of the test split

    def record(self) -> dict[str, Any]:
        """Return the result as values for JSON."""
        return {
            "what": "infer",
            **machine(),
            "name": self.name,
            "sha256": self.sha256,
            "config": asdict(self.config),
            "rows": [row.record() for row in self.rows],
            "scores": {row.name: asdict(row.score) for row in self.rows if row.score},
        }


def benchmark_inference(
    paths: Paths,
    config: InferBenchmark = InferBenchmark(),
    report: Callable[[str], None] = lambda line: None,
) -> Inference:
    """Measure the export `paths.name` in every runtime, in turns; write inference.json.

    Raises CheckFailedError if an answer was wrong, CorruptError if a file is not the one that was
    exported and validated.
    """
    manifest = read_json(paths.manifest, EXPORT)
    precisions = [precision for precision in PRECISIONS if precision in manifest["precisions"]]
    for precision in precisions:
        model, golden = paths.variant(precision), paths.variant_golden(precision)
        check_digest(model, manifest["files"].get(model.name), EXPORT)
        check_digest(golden, manifest["files"].get(golden.name), VALIDATE)
    runtimes = [
        LocalRuntime(name, precision, threads)
        for name, precision in ((EAGER, "fp32"), *((RUNTIME, each) for each in precisions))
        for threads in config.threads
    ]
    with ExitStack() as stack:
        asks = {
            str(runtime): stack.enter_context(workers.start_worker(paths, runtime, manifest))
            for runtime in runtimes
        }
        answers = {}
        for name, ask in asks.items():
            report(f"{name}: the test split")
            answers[name] = ask("score")
        windows = _measure(asks, config, report)
        peaks = {name: int(ask("peak")) for name, ask in asks.items()}
    reference = answers[str(runtimes[0])][1]
    scores = {
        name: Score(len(classes), accuracy, int((classes != reference).sum()), peaks[name])
        for name, (accuracy, classes) in answers.items()
    }
    yardstick = [of_cell for (name, _), of_cell in windows.items() if name == YARDSTICK]
    rows = (
        workers.join_yardstick(yardstick),
        *(
            TimedRow(name, "in process", batch, 1, tuple(of_cell), score=scores[name])
            for (name, batch), of_cell in windows.items()
            if name != YARDSTICK
        ),
    )
    timing.require_answers(rows)
    digest = str(manifest["files"][paths.onnx.name])
    result = Inference(paths.name, digest, config, rows, reference)
    write_json(paths.inference, result.record())
    return result


def _measure(
    asks: dict[str, Ask], config: InferBenchmark, report: Callable[[str], None]
) -> dict[tuple[str, int], list[Window]]:
    """Measure windows by runtime and batch size, or by place in a round for the yardstick."""
    cells: dict[tuple[str, int], Callable[[], Window]] = {}
    for batch in config.batches:
        for name, ask in asks.items():
            if len(cells) % (CELLS + 1) == 0:
                cells[YARDSTICK, len(cells)] = functools.partial(
                    workers.run_yardstick, config.seconds
                )
            cells[name, batch] = functools.partial(ask, "measure", batch, config.seconds)
    group = {cell: cell for cell in cells if cell[0] != YARDSTICK}
    return timing.take_turns(cells, group, config.until, report)

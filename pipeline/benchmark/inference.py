"""How fast an export is in this machine's runtimes: eager PyTorch, and ONNX Runtime's variants.

All take turns, window by window, with a yardstick that no change of ours can move: two measurements
of different days are compared as parts of it.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.benchmark.table import table
from pipeline.benchmark.timing import UNTIL, Row, Score, Until, Window, require_right, take_turns
from pipeline.benchmark.workers import (
    EAGER,
    EXPORT,
    RUNTIME,
    YARDSTICK,
    Ask,
    Runtime,
    worker,
    yardstick,
    yardstick_row,
)
from pipeline.core.files import check_digest, read_json, write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths

BESIDE = 4  # cells from one window of the yardstick to the next
VALIDATE = "run 'pipeline validate' first"


@dataclass(frozen=True)
class InferBenchmark:
    """How long to measure: every cell has a window in every round."""

    until: Until = UNTIL
    seconds: float = 0.5  # of each window, after its warm-up
    batches: tuple[int, ...] = (1, 8, 64)
    threads: tuple[int, ...] = (1, 2)


SHORT = InferBenchmark(Until(least=3, most=3), seconds=0.25, batches=(1, 64))


@dataclass(frozen=True)
class Inference:
    """What the measurement found."""

    name: str
    sha256: str  # of the export's model.onnx
    config: InferBenchmark
    rows: tuple[Row, ...]
    scores: dict[str, Score] = field(default_factory=dict)  # by the rows' names
    classes: np.ndarray | None = None  # int64 (N,): what eager PyTorch says of the test split

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
        return table(self.rows)


def benchmark_inference(
    paths: Paths,
    config: InferBenchmark = InferBenchmark(),
    report: Callable[[str], None] = lambda line: None,
) -> Inference:
    """Measure the export `paths.name` in every runtime, in turns; write inference.json.

    Raises CheckFailedError when an answer was wrong, CorruptError when a file is not what was
    exported and validated.
    """
    manifest = read_json(paths.manifest, EXPORT)
    _require_whole(paths, manifest)
    runtimes = [
        Runtime(name, precision, threads)
        for name, precisions in ((EAGER, ["fp32"]), (RUNTIME, _precisions(manifest)))
        for precision in precisions
        for threads in config.threads
    ]
    with ExitStack() as stack:
        workers = {one: stack.enter_context(worker(paths, one, manifest)) for one in runtimes}
        answers = {}
        for one, ask in workers.items():
            report(f"{one}: the test split")
            answers[one] = ask("score")
        windows = _windows(workers, config, report)
        peaks = {one: int(ask("peak")) for one, ask in workers.items()}
    said = answers[runtimes[0]][1]
    scores = {
        str(one): Score(len(classes), accuracy, int((classes != said).sum()), peaks[one])
        for one, (accuracy, classes) in answers.items()
    }
    rows = _rows(windows, scores)
    require_right(rows)
    digest = str(manifest["files"][paths.onnx.name])
    result = Inference(paths.name, digest, config, rows, scores, said)
    write_json(paths.inference, result.record())
    return result


def _require_whole(paths: Paths, manifest: dict[str, Any]) -> None:
    """Raise where a model or its golden set is missing, or has other bytes than are recorded."""
    for precision in _precisions(manifest):
        model, golden = paths.variant(precision), paths.variant_golden(precision)
        check_digest(model, manifest["files"].get(model.name), EXPORT)
        check_digest(golden, manifest["files"].get(golden.name), VALIDATE)


def _precisions(manifest: dict[str, Any]) -> list[str]:
    return [
        precision for precision in ("fp32", "fp16", "int8") if precision in manifest["precisions"]
    ]


Cell = tuple[str, int]  # a runtime's name and images a batch; of the yardstick its place


def _windows(
    workers: dict[Runtime, Ask], config: InferBenchmark, report: Callable[[str], None]
) -> dict[Cell, list[Window]]:
    cells: dict[Cell, Callable[[], Window]] = {}
    for batch in config.batches:
        for one, ask in workers.items():
            if len(cells) % (BESIDE + 1) == 0:
                cells[YARDSTICK, len(cells)] = functools.partial(yardstick, config.seconds)
            cells[str(one), batch] = functools.partial(ask, "measure", batch, config.seconds)
    group = {cell: cell for cell in cells if cell[0] != YARDSTICK}
    return take_turns(cells, group, config.until, report)


def _rows(windows: dict[Cell, list[Window]], scores: dict[str, Score]) -> tuple[Row, ...]:
    beside = [found for (name, _), found in windows.items() if name == YARDSTICK]
    rows = [yardstick_row(beside)]
    for (name, batch), found in windows.items():
        if name != YARDSTICK:
            rows.append(Row(name, "in process", batch, 1, tuple(found), score=scores[name]))
    return tuple(rows)

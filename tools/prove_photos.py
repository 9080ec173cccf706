"""How well an exported model reads digits in the pictures that people have, by condition.

python -m tools.prove_photos RESULT [--name NAME] [--short]
"""

# Shape letters: N images, K classes.

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import Predictor, calibration_error, predict, score
from pipeline.core.files import sha256
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.data.splits import Split, load_split
from pipeline.export.runtime import onnx_predictor
from pipeline.images.read import read_image
from tools.edge import print_now, run_tool
from tools.photos import HELD_BACK, SCENES, pictures
from tools.readme import keep_result


@dataclass(frozen=True)
class PhotoBenchmark:
    """How many digits of each condition, and from which seed."""

    digits: int = 200
    seed: int = 0


SHORT = PhotoBenchmark(digits=20)


@dataclass(frozen=True)
class Condition:
    """What a model scored on pictures of one kind, or of several."""

    name: str
    images: int
    accuracy: float  # fraction of images, 0 to 1
    confidence: float  # mean probability of the likeliest class, 0 to 1
    calibration_error: float  # expected, 0 to 1

    def __str__(self) -> str:
        return (
            f"{self.name:20} {self.images:6} {self.accuracy:9.2%} {self.confidence:11.2%} "
            f"{self.calibration_error:6.3f}"
        )


@dataclass(frozen=True)
class Photos:
    """What the measurement found."""

    name: str
    sha256: str  # of the model.onnx
    config: PhotoBenchmark
    rows: tuple[Condition, ...]
    tuned: Condition  # of the conditions that the rules were made with
    held_back: Condition  # of those that they were not
    total: Condition

    def record(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {"what": "photos", **machine(), **asdict(self), "held_back_names": HELD_BACK}

    def __str__(self) -> str:
        head = f"{'condition':20} {'images':>6} {'accuracy':>9} {'confidence':>11} {'ECE':>6}"
        sums = (self.tuned, self.held_back, self.total)
        return Lines(head, *self.rows, *sums)


def benchmark_photos(
    paths: Paths,
    config: PhotoBenchmark = PhotoBenchmark(),
    report: Callable[[str], None] = lambda line: None,
) -> Photos:
    """Read pictures of test digits with the exported model in ONNX Runtime."""
    if not paths.onnx.exists():
        raise PipelineError(f"no model at {paths.onnx}: run 'pipeline export' first")
    content = paths.onnx.read_bytes()
    predictor = onnx_predictor(content, 1)
    digits = load_split("mnist", paths.data("mnist"), "test")
    found = {}
    for name in SCENES:
        report(f"{name}: {config.digits} digits")
        found[name] = _answers(predictor, digits, name, config)
    sums = {
        "all but held back": [name for name in found if name not in HELD_BACK],
        "held back": list(HELD_BACK),
        "total": list(found),
    }
    summed = [
        _condition(said, *map(np.concatenate, zip(*(found[name] for name in names), strict=True)))
        for said, names in sums.items()
    ]
    rows = tuple(_condition(name, *answers) for name, answers in found.items())
    return Photos(paths.name, sha256(content), config, rows, *summed)


def _answers(
    predictor: Predictor, split: Split, condition: str, config: PhotoBenchmark
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (N, K) and labels (N,) of digits under a condition."""
    rng = np.random.default_rng((config.seed, list(SCENES).index(condition)))
    chosen = rng.choice(len(split), config.digits, replace=False)
    files = pictures(condition, split.images[chosen], config.seed)
    images = np.stack([read_image(content) for content in files])
    return predict(predictor, images), split.labels[chosen]


def _condition(name: str, outputs: np.ndarray, labels: np.ndarray) -> Condition:
    return Condition(
        name,
        len(labels),
        score(outputs, labels).accuracy,
        float(np.exp(outputs.max(axis=1)).mean()),
        calibration_error(outputs, labels),
    )


def main(arguments: list[str]) -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--name", default=Paths.name, help="the exported model")
    parser.add_argument("--short", action="store_true", help="for seconds, not minutes")
    given = parser.parse_args(arguments)
    measured = benchmark_photos(
        Paths(name=given.name), SHORT if given.short else PhotoBenchmark(), print_now
    )
    print(measured)
    keep_result("photos", given.result, f"make prove-photos NAME={given.name}", measured.record())


if __name__ == "__main__":
    run_tool(main)

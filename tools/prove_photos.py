"""How well an exported model reads digits in the pictures that people have, by condition.

python -m tools.prove_photos RESULT [--name NAME] [--short]
"""

# Shape letters: N images, K classes.

from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import calibration_error, predict, score
from pipeline.core.files import sha256
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.data.splits import load_split
from pipeline.export.runtime import onnx_predictor
from pipeline.images.read import read_image
from tools.edge import make_result_parser, print_now, run_tool
from tools.photos import HELD_BACK, SCENES, make_pictures
from tools.readme import keep_result

DIGITS, SHORT = 200, 20  # of each condition
SEED = 0


@dataclass(frozen=True)
class Condition:
    """Scores of a model on pictures of one condition, or of several."""

    name: str
    images: int
    accuracy: float  # fraction of images, 0 to 1
    confidence: float  # mean probability of the likeliest class, 0 to 1
    calibration_error: float  # expected, 0 to 1


@dataclass(frozen=True)
class Photos:
    """Result of the measurement."""

    name: str
    sha256: str  # of the model.onnx
    digits: int  # of each condition
    rows: tuple[Condition, ...]
    tuned: Condition  # of the conditions that the rules were tuned on
    held_back: Condition  # of the conditions that they were not tuned on
    total: Condition

    def record(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        fields = asdict(self)
        config = {"digits": fields.pop("digits"), "seed": SEED}
        fixed = {"what": "photos", "config": config, "held_back_names": HELD_BACK}
        return {**fixed, **machine(), **fields}

    def __str__(self) -> str:
        rows = map(astuple, (*self.rows, self.tuned, self.held_back, self.total))
        headers = ("condition", "images", "accuracy", "confidence", "ECE")
        formats = ("", "", ".2%", ".2%", ".3f")
        return str(Lines(*tabulate(rows, headers, floatfmt=formats).splitlines()))


def benchmark_photos(
    paths: Paths, count: int = DIGITS, report: Callable[[str], None] = lambda line: None
) -> Photos:
    """Read pictures of test digits with the exported model in ONNX Runtime."""
    if not paths.onnx.exists():
        raise PipelineError(f"there is no model at {paths.onnx}: run 'pipeline export' first")
    content = paths.onnx.read_bytes()
    predictor = onnx_predictor(content, 1)
    digits = load_split("mnist", paths.data("mnist"), "test")
    answers = {}  # log-probabilities (N, K) and labels (N,) of digits under each condition
    for place, name in enumerate(SCENES):
        report(f"{name}: {count} digits")
        chosen = np.random.default_rng((SEED, place)).choice(len(digits), count, replace=False)
        files = make_pictures(name, digits.images[chosen], SEED)
        outputs = predict(predictor, np.stack([read_image(content) for content in files]))
        answers[name] = outputs, digits.labels[chosen]
    tuned = [name for name in answers if name not in HELD_BACK]
    sums = {"all but held back": tuned, "held back": list(HELD_BACK), "total": list(answers)}
    rows = tuple(_score(name, [answer]) for name, answer in answers.items())
    summed = (_score(row, [answers[name] for name in names]) for row, names in sums.items())
    return Photos(paths.name, sha256(content), count, rows, *summed)


def _score(name: str, answers: list[tuple[np.ndarray, np.ndarray]]) -> Condition:
    """Score the outputs (N, K) and labels (N,) of one or several conditions together."""
    outputs, labels = map(np.concatenate, zip(*answers, strict=True))
    accuracy, confidence = score(outputs, labels).accuracy, np.exp(outputs.max(axis=1)).mean()
    error = calibration_error(outputs, labels)
    return Condition(name, len(labels), accuracy, float(confidence), error)


def main(arguments: list[str]) -> None:
    """Measure, and keep the result."""
    parser = make_result_parser(__doc__)
    parser.add_argument("--short", action="store_true", help="for seconds, not minutes")
    given = parser.parse_args(arguments)
    count = SHORT if given.short else DIGITS
    measured = benchmark_photos(Paths(name=given.name), count, print_now)
    print(measured)
    keep_result("photos", given.result, f"make prove-photos NAME={given.name}", measured.record())


if __name__ == "__main__":
    run_tool(main)

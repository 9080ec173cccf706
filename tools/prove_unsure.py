"""How often a model is not sure: of things that are no digits, and of digits, right and wrong.

python -m tools.prove_unsure RESULT [--name NAME]
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import is_refused, predict
from pipeline.core.files import check_digest, check_manifest
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.data.splits import load_scored_split
from pipeline.export.runtime import onnx_predictor
from tools.edge import make_result_parser, run_tool
from tools.nondigits import make_kinds
from tools.readme import keep_result

EXPORT = "run 'pipeline export' again"


@dataclass(frozen=True)
class Row:
    """Counts for one kind: images, and those of which the model is not sure."""

    name: str
    images: int
    refused: int
    is_counted: bool = True  # has to be refused

    @property
    def share(self) -> float:
        """The fraction refused, 0 to 1; 0 without images."""
        return self.refused / max(1, self.images)


@dataclass(frozen=True)
class Unsure:
    """Result: what a model is not sure of, by kind."""

    name: str
    sha256: str  # of the measured model.onnx
    min_probability: float  # below it the model refuses to answer
    rows: tuple[Row, ...]  # things that are not digits
    digits: Row  # the whole test split
    right: Row  # the digits that are classified correctly
    wrong: Row

    @property
    def share(self) -> float:
        """The fraction refused of what is not a digit, with equal weight for each counted kind."""
        counted = [row.share for row in self.rows if row.is_counted]
        return sum(counted) / len(counted)

    def record(self) -> dict[str, Any]:
        """Return the result as a JSON object, with time and machine of the measurement."""
        return {**asdict(self), "share": self.share, **machine()}

    def __str__(self) -> str:
        rows = [*self.rows, self.digits, self.right, self.wrong]
        cells = [(row.name, f"{row.images:,}", f"{row.share:.2%}") for row in rows]
        return Lines(
            *tabulate(cells, ("not sure of", "images", "refused")).splitlines(),
            f"refused (probability below {self.min_probability:g}): {self.share:.2%} of what is "
            "not a digit, as the mean of its kinds without lookalike letters and signs",
        )


def measure_unsure(paths: Paths) -> Unsure:
    """Measure what the exported model, run by ONNX Runtime, is not sure of.

    Raises PipelineError for a model that was not trained on MNIST, or without a threshold.
    """
    manifest = check_manifest(paths.export, EXPORT)
    training, threshold = manifest.get("training"), manifest.get("min_probability")
    if not training or training["dataset"] != "mnist":
        raise PipelineError(f"{paths.name} was not trained on MNIST: choose another --name")
    if threshold is None:
        run = manifest["run"]
        fix = f"run 'pipeline train --run {run}', then 'pipeline export --run {run}'"
        raise PipelineError(f"{paths.name} is an old model without a threshold: {fix}")
    content = check_digest(paths.onnx, manifest["files"].get(paths.onnx.name), EXPORT)
    test = load_scored_split(training, manifest["data_sha256"], paths.data("mnist"))
    predictor = onnx_predictor(content)
    outputs = predict(predictor, test.images)
    refused, right = is_refused(outputs, threshold), outputs.argmax(axis=1) == test.labels

    def count(name: str, refused: np.ndarray, is_counted: bool = True) -> Row:
        return Row(name, len(refused), int(refused.sum()), is_counted)

    rows = (
        count(kind.name, is_refused(predict(predictor, kind.images), threshold), kind.is_counted)
        for kind in make_kinds(paths.data("fashion-mnist"))
    )
    return Unsure(
        name=paths.name,
        sha256=manifest["files"][paths.onnx.name],
        min_probability=threshold,
        rows=tuple(rows),
        digits=count("test digits", refused),
        right=count("read rightly", refused[right]),
        wrong=count("read wrongly", refused[~right]),
    )


def main(arguments: list[str]) -> None:
    """Measure, and keep the result."""
    given = make_result_parser(__doc__).parse_args(arguments)
    measured = measure_unsure(Paths(name=given.name))
    print(measured)
    keep_result("unsure", given.result, f"make prove-unsure NAME={given.name}", measured.record())


if __name__ == "__main__":
    run_tool(main)

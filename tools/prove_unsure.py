"""How often a model is not sure: of things that are no digits, and of digits, right and wrong.

python -m tools.prove_unsure RESULT [--name NAME]
"""

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import is_refused, predict
from pipeline.core.files import check_digest, check_manifest
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.data.splits import scored_split
from pipeline.export.runtime import onnx_predictor
from tools.edge import result_parser, run_tool
from tools.nondigits import kinds
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
            f"what is no digit: {self.share:.2%} refused, the mean of its kinds without the "
            "letters that may be digits and the signs; refused is what is below "
            f"{self.min_probability:g}",
        )


def measure_unsure(paths: Paths) -> Unsure:
    """Measure what the exported model, run by ONNX Runtime, is not sure of.

    Raises PipelineError for a model that was not trained on MNIST, or without a threshold.
    """
    manifest = check_manifest(paths.export, EXPORT)
    training, threshold = manifest.get("training"), manifest.get("min_probability")
    if not training or training["dataset"] != "mnist":
        raise PipelineError(
            f"{paths.name} reads no digits, and what it should refuse is not known here: choose a "
            "model of MNIST with --name"
        )
    if threshold is None:
        raise PipelineError(
            f"{paths.name} has no threshold, it was trained before there was one: run 'pipeline "
            f"train --run {manifest['run']}', then 'pipeline export --run {manifest['run']}'"
        )
    content = check_digest(paths.onnx, manifest["files"].get(paths.onnx.name), EXPORT)
    test = scored_split(training, manifest["data_sha256"], paths.data("mnist"))
    predictor = onnx_predictor(content)
    outputs = predict(predictor, test.images)
    refused, right = is_refused(outputs, threshold), outputs.argmax(axis=1) == test.labels
    rows = []
    for kind in kinds(paths.data("fashion-mnist")):
        of_kind = is_refused(predict(predictor, kind.images), threshold)
        rows.append(Row(kind.name, len(of_kind), int(of_kind.sum()), kind.is_counted))
    return Unsure(
        name=paths.name,
        sha256=manifest["files"][paths.onnx.name],
        min_probability=threshold,
        rows=tuple(rows),
        digits=Row("test digits", len(test), int(refused.sum())),
        right=Row("read rightly", int(right.sum()), int(refused[right].sum())),
        wrong=Row("read wrongly", int((~right).sum()), int(refused[~right].sum())),
    )


def main(arguments: list[str]) -> None:
    """Measure, and keep the result."""
    given = result_parser(__doc__).parse_args(arguments)
    measured = measure_unsure(Paths(name=given.name))
    print(measured)
    keep_result("unsure", given.result, f"make prove-unsure NAME={given.name}", measured.record())


if __name__ == "__main__":
    run_tool(main)

"""Check of one exported file: what it is compared with, and why it fails.

A failed validation leaves its record, and the worst rows to look at and replay.
"""

# Shape letters: N rows (images, then probes), M labelled images.

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, margins, read_answers
from pipeline.core.files import pack_arrays, remove, write_bytes, write_json
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.export import graph
from pipeline.export.export import library_versions
from pipeline.export.first_run import require_first_run
from pipeline.export.runtime import onnx_predictor
from pipeline.export.sample import Sample
from pipeline.export.subject import Subject
from pipeline.images.read import encode_png, to_picture
from pipeline.training.networks import eager_predictor
from pipeline.validation import compare
from pipeline.validation.compare import FileResult, Verdict
from pipeline.validation.exact import compare_levels
from pipeline.validation.explain import compare_graphs, compare_weights, diagnose
from pipeline.validation.reference import reference_predictor, require_steady

WORST = 10  # rows that are kept of a failed file


@dataclass
class FileTrial:
    """What the files of one export are compared with: their module's answers to all rows.

    Raises CheckFailedError when these are not finite, not steady, or not stable in float32.
    """

    paths: Paths
    subject: Subject
    sample: Sample
    criterion: compare.Criterion
    provider: str
    report: compare.Report
    options: str = ""  # of the command that checks these files, each after a space
    scores: np.ndarray | None = None  # int32 (N, S): an exact file's, to all rows
    rows: np.ndarray = field(init=False)  # (N, ...): the images, then the probes
    reference: compare.Reference = field(init=False)

    def __post_init__(self) -> None:
        images = self.sample.images
        self.rows = np.concatenate([images, compare.probe_images(images)])
        self.report(f"running the module in float64 on {len(self.rows):,} images")
        reference = run_reference(self.subject, self.rows, self.sample, self.criterion)
        for outputs, dtype in ((reference.outputs, "float64"), (reference.eager, "float32")):
            is_finite = np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
            if not is_finite.all():
                row = f"row {is_finite.argmin()} in {dtype}"
                raise CheckFailedError(f"the module answers {row} with values that are not finite")
        self.reference = compare.require_stable(reference, self.criterion)


def run_reference(
    subject: Subject, rows: np.ndarray, sample: Sample, criterion: compare.Criterion
) -> compare.Reference:
    """Run the module on rows (N, ...) in float64 and in eager float32, twice each.

    Both use the same batches: a module that mixes its rows must not widen its own bounds that way.
    Without labels, the reference's own answers take their place.
    """
    double, single = reference_predictor(subject.model), eager_predictor(subject.model)
    outputs = require_steady(double, rows, criterion, "in float64")
    eager = require_steady(single, rows, criterion, "in float32")
    if sample.labels is not None:
        return compare.Reference(outputs, eager, sample.labels)
    return compare.Reference(outputs, eager, read_answers(outputs[: len(sample.images)])[0], False)


def load_predictors(
    content: bytes,
    criterion: compare.Criterion,
    provider: str,
    is_ours: bool = False,
    outputs: Sequence[int] = (0,),
) -> dict[int, Predictor]:
    """Return predictors of the file in ONNX Runtime, by number of threads.

    Unless `is_ours`, a limited first run comes before. Ours is a file that equals the export of its
    module, byte for byte.
    """
    if not is_ours:
        require_first_run(content)
    return {
        threads: onnx_predictor(content, threads, provider, outputs)
        for threads in criterion.threads
    }


def try_file(
    trial: FileTrial, precision: str, content: bytes, made: Mapping[str, bytes]
) -> FileResult:
    """Compare a file with its module.

    `made` has the files that its module exports to, by precision; it is empty for a file from
    another tool. Raises CheckFailedError with the reasons, and writes the findings, if it fails.
    """
    subject, reference, is_made = trial.subject, trial.reference, precision in made
    is_ours, scores = made.get(precision) == content, trial.scores if precision == "exact" else None
    outputs = (0,) if scores is None else (0, 1)
    predictors = load_predictors(content, trial.criterion, trial.provider, is_ours, outputs)
    result = compare.compare_file(
        precision, predictors, trial.rows, reference, trial.criterion, trial.report, scores
    )
    if scores is not None:
        result.problems += compare_levels(content, trial.rows, scores)
    verdict, candidate = compare.make_verdict(result), onnx_predictor(content)
    problems = [*verdict.problems, *compare.list_accepted(candidate, trial.rows)]
    weights = {name: t.cpu().numpy() for name, t in subject.model.state_dict().items()}
    model = graph.parse(content, "the file")
    if is_made and not is_ours:
        problems.append("the file differs from the export of its module")
    # A tensor that differs in some values only is a weight of the module that was not fused.
    if precision == "fp32" and not made and compare_weights(weights, model, few=0):
        problems.append("the file has other weights than its module")
    if not problems:
        return result
    images = trial.rows[: len(reference.labels)]
    reasons = diagnose(candidate, images, reference.outputs, subject.classes)
    if is_made:
        changes = compare_graphs(graph.parse(made[precision], "the export"), model)
        reasons += [f"against its module's export, {change}" for change in changes]
    elif precision == "fp32":
        reasons += [f"against the module, {text}" for text in compare_weights(weights, model)]
    raise _write_failure(trial, replace(verdict, problems=(*reasons[:10], *problems)), result)


def _write_failure(trial: FileTrial, verdict: Verdict, result: FileResult) -> CheckFailedError:
    """Write the record and the worst rows, as pictures and as arrays; return the error to raise.

    In a lower precision, flips come first: larger errors alone are not a failure there.
    """
    paths, reference = trial.paths, trial.reference
    remove(paths.failed)
    record = {**make_record(trial), "passed": False, "variants": [asdict(verdict)]}
    write_json(paths.failed / paths.validation.name, record)
    replay = []
    if result.errors.any():  # otherwise the file never ran
        rank = result.errors / result.bounds
        if verdict.precision != "fp32":
            rank[[flip.row for flip in verdict.flips]] = np.inf
        worst = np.argsort(-rank, kind="stable")[:WORST]
        own = read_answers(reference.outputs)[0]
        arrays = {
            "images": trial.rows,
            "labels": np.concatenate([reference.labels, own[len(reference.labels) :]]),
            "reference": reference.outputs,
            "eager": reference.eager,
            "outputs": result.outputs,
            "allowed": result.bounds,
        }
        chosen = {name: array[worst] for name, array in arrays.items()}
        write_bytes(paths.worst, pack_arrays({**chosen, "rows": worst}))
        for place, row in enumerate(worst, 1):
            if (picture := to_picture(trial.rows[row])) is not None:
                write_bytes(paths.failed / f"worst-{place:02d}-row-{row}.png", encode_png(picture))
        file = paths.worst.relative_to(paths.root)
        replay.append(f"Replay them: pipeline validate{trial.options} --replay {file}")
    return CheckFailedError(
        Lines(
            f"{paths.name} ({verdict.precision}) does not answer as its module does:",
            *(f"  {problem}" for problem in verdict.problems[:10]),
            f"The worst rows, as pictures and arrays: {paths.failed}",
            *replay,
        )
    )


def make_record(trial: FileTrial) -> dict[str, Any]:
    """Return the fields of validation.json that all files share."""
    reference = trial.reference
    images = len(reference.labels)
    return {
        "name": trial.paths.name,
        "reference": "eager PyTorch in float64",
        "candidate": f"ONNX Runtime, {trial.provider}",
        "images": images,
        "probes": len(trial.rows) - images,
        "is_labelled": reference.is_labelled,
        "classes": list(trial.subject.classes),
        "criterion": asdict(trial.criterion),
        "reference_accuracy": reference.accuracy(reference.outputs),
        "eager_accuracy": reference.accuracy(reference.eager),
        "eager_error": float(reference.errors.max()),
        "smallest_margin": float(margins(reference.outputs[:images]).min()),
        "versions": library_versions(),
    }

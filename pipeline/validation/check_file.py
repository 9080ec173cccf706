"""Check of one exported file: what it is compared with, and why it fails.

A failed validation leaves its record, and the worst rows to look at and replay.
"""

# Shape letters: N rows (images, then probes), M labelled images.

import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor, margins
from pipeline.core.files import remove, write_bytes, write_json
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.export import graph
from pipeline.export.export import library_versions
from pipeline.export.first_run import require_first_run
from pipeline.export.runtime import onnx_predictor
from pipeline.export.sample import Sample
from pipeline.export.subject import Subject
from pipeline.images.read import pictured, png
from pipeline.training.networks import eager_predictor
from pipeline.validation import compare
from pipeline.validation.explain import between, diagnose, from_weights
from pipeline.validation.reference import reference_predictor, steady_answers

WORST = 10  # rows that are kept of a failed file
Say = Callable[[str], None]


@dataclass(frozen=True)
class FileTrial:
    """What the files of one export are compared with."""

    paths: Paths
    subject: Subject
    rows: np.ndarray  # (N, ...): the images, then the probes
    reference: compare.Reference
    criterion: compare.Criterion
    provider: str
    report: Say
    options: str  # of the command that checks these files


def trial_of(
    paths: Paths,
    subject: Subject,
    sample: Sample,
    criterion: compare.Criterion,
    provider: str,
    report: Say,
    options: str,
) -> FileTrial:
    """Prepare the check of an export's files: let its module answer every image and probe.

    Raises CheckFailedError when its answers are not finite, not steady, or not stable in float32.
    """
    rows = np.concatenate([sample.images, compare.probe_images(sample.images)])
    report(f"the module in float64 on {len(rows):,} images")
    reference = reference_of(subject, rows, sample, criterion)
    for outputs, what in ((reference.outputs, "float64"), (reference.eager, "float32")):
        if not np.isfinite(outputs).all():
            row = int(np.flatnonzero(~np.isfinite(outputs).all(axis=1))[0])
            wrong = f"answers row {row} with values that are not finite"
            raise CheckFailedError(f"the module itself {wrong} in {what}: fix the module")
    reference = compare.require_stable(reference, criterion)
    return FileTrial(paths, subject, rows, reference, criterion, provider, report, options)


def reference_of(
    subject: Subject, rows: np.ndarray, sample: Sample, criterion: compare.Criterion
) -> compare.Reference:
    """Run the module on rows (N, ...) in float64 and in eager float32, twice each.

    Both use the same batches: a module that mixes its rows must not widen its own bounds that way.
    Without labels, the reference's own classes take their place.
    """
    double, single = reference_predictor(subject.model), eager_predictor(subject.model)
    outputs = steady_answers(double, rows, criterion, "in float64")
    eager = steady_answers(single, rows, criterion, "in float32")
    if sample.labels is not None:
        return compare.Reference(outputs, eager, sample.labels)
    return compare.Reference(outputs, eager, outputs[: len(sample.images)].argmax(axis=1), False)


def predictors_of(
    content: bytes, criterion: compare.Criterion, provider: str, is_ours: bool = False
) -> dict[int, Predictor]:
    """Return predictors of the file in ONNX Runtime, by number of threads.

    Unless `is_ours`, a limited first run comes before. Ours is a file that equals the export of its
    module, byte for byte.
    """
    if not is_ours:
        require_first_run(content)
    return {threads: onnx_predictor(content, threads, provider) for threads in criterion.threads}


def try_file(
    trial: FileTrial, precision: str, content: bytes, made: Mapping[str, bytes]
) -> tuple[compare.Verdict, compare.Held]:
    """Check a file; return its verdict and all its runs.

    `made` has the files that its module exports to, by precision; it is empty for a file from
    another tool. Raises CheckFailedError with the reasons, and writes the findings, if it fails.
    """
    predictors = predictors_of(
        content, trial.criterion, trial.provider, is_ours=made.get(precision) == content
    )
    verdict, held = compare.hold(
        precision, predictors, trial.rows, trial.reference, trial.criterion, trial.report
    )
    candidate = next(iter(predictors.values()))
    problems = [*verdict.problems, *compare.refusals(candidate, trial.rows)]
    weights = {name: t.cpu().numpy() for name, t in trial.subject.model.state_dict().items()}
    found = graph.parse(content, "the file")
    if precision in made and made[precision] != content:
        problems.append("the file is not what its module exports to, byte for byte")
    # A tensor that differs in some values only is a weight of the module that was not fused.
    if precision == "fp32" and not made and from_weights(weights, found, few=0):
        problems.append("the file has other weights than its module")
    if not problems:
        return verdict, held
    images = trial.rows[: len(trial.reference.labels)]
    reasons = diagnose(candidate, images, trial.reference.outputs, trial.subject.classes)
    if precision in made:
        wanted = graph.parse(made[precision], "the export")
        reasons += [f"against its module's export, {said}" for said in between(wanted, found)]
    elif precision == "fp32":
        reasons += [f"against the module, {said}" for said in from_weights(weights, found)]
    raise _failure(trial, replace(verdict, problems=(*reasons[:10], *problems)), held)


def _failure(trial: FileTrial, verdict: compare.Verdict, held: compare.Held) -> CheckFailedError:
    """Write the record and the worst rows, as pictures and as arrays; return the error to raise.

    In a lower precision, flips come first: larger errors alone are not a failure there.
    """
    paths, reference = trial.paths, trial.reference
    remove(paths.failed)
    record = {**record_of(trial), "passed": False, "variants": [asdict(verdict)]}
    write_json(paths.failed / paths.validation.name, record)
    replay = []
    if held.errors.any():  # otherwise the file never ran
        rank = held.errors / held.allowed
        if verdict.precision != "fp32":
            rank[[flip.row for flip in verdict.flips]] = np.inf
        worst = np.argsort(-rank, kind="stable")[:WORST]
        own = reference.outputs.argmax(axis=1)
        labels = np.concatenate([reference.labels, own[len(reference.labels) :]])
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            images=trial.rows[worst],
            labels=labels[worst],
            rows=worst,
            reference=reference.outputs[worst],
            eager=reference.eager[worst],
            outputs=held.outputs[worst],
            allowed=held.allowed[worst],
        )
        write_bytes(paths.worst, buffer.getvalue())
        for place, row in enumerate(worst, 1):
            if (picture := pictured(trial.rows[row])) is not None:
                write_bytes(paths.failed / f"worst-{place:02d}-row-{row}.png", png(picture))
        is_below = paths.root in paths.worst.parents
        file = paths.worst.relative_to(paths.root) if is_below else paths.worst
        command = " ".join(["pipeline validate", *trial.options.split(), f"--replay {file}"])
        replay.append(f"Replay them: {command}")
    return CheckFailedError(
        Lines(
            f"{paths.name} ({verdict.precision}) is not what its module says:",
            *(f"  {problem}" for problem in verdict.problems[:10]),
            f"The worst rows, as pictures and arrays: {paths.failed}",
            *replay,
        )
    )


def record_of(trial: FileTrial) -> dict[str, Any]:
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

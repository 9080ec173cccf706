"""The proof of an export: each of its files, on the bytes that ship, against its module."""

# Shape letters: N rows (images, then probes), M labelled images.

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import margins
from pipeline.core.files import (
    check_digest,
    check_manifest,
    read_json,
    remove,
    write_bytes,
    write_json,
)
from pipeline.core.paths import MODEL_NAMES, Paths
from pipeline.export.export import (
    check_onnx,
    export_config,
    export_program,
    matching_signature,
    metadata_of,
    signature_of,
    to_onnx,
    variant,
    versions,
    write_export,
)
from pipeline.export.runtime import onnx_predictor
from pipeline.export.sample import Sample
from pipeline.export.subject import EXPORT, Subject, exported_sample, exported_subject
from pipeline.export.targets import ExportConfig
from pipeline.repository.golden import choose_golden, pack_golden
from pipeline.repository.reference_profile import packed
from pipeline.validation.card import model_card
from pipeline.validation.check_file import (
    Result,
    Say,
    Trial,
    predictors_of,
    record_of,
    reference_of,
    trial_of,
    try_file,
)
from pipeline.validation.compare import Criterion, Held, Verdict, bounds, hold
from pipeline.validation.profile import profile_export


@dataclass(frozen=True)
class Proof:
    """An export whose files were all held against their module, and passed."""

    verdicts: tuple[Verdict, ...]  # fp32 first
    accuracy: float  # of eager float32, 0 to 1
    is_labelled: bool  # whether that is against true classes; else against the reference's
    sha256: str  # of the fp32 file that ran


def prove_export(
    paths: Paths,
    criterion: Criterion = Criterion(),
    provider: str = "cpu",
    report: Say = lambda line: None,
) -> Proof:
    """Run each exported file in ONNX Runtime and hold it against its module, image by image.

    Writes validation.json, golden sets, evidence.npz and a model card beside them. Raises
    CheckFailedError when one disagrees, with the findings under `failed/`, and then no proof is
    left.
    """
    manifest = check_manifest(paths.export, EXPORT)
    subject = exported_subject(paths, manifest)
    sample = exported_sample(paths, manifest)
    contents = _contents(paths, manifest)
    wanted = signature_of(subject, export_config(manifest))
    if provider != "cpu":  # where there is none, an earlier proof stays what it is
        check_onnx(contents["fp32"], wanted, str(paths.onnx))
        onnx_predictor(contents["fp32"], provider=provider)
    _withdraw(paths)
    for precision, content in contents.items():
        check_onnx(content, wanted, str(paths.variant(precision)))
    named = "" if paths.name == MODEL_NAMES["mnist"] else f"--name {paths.name}"
    trial = trial_of(paths, subject, sample, criterion, provider, report, named)
    made = _made_again(trial, sample, manifest)
    results = {name: try_file(trial, name, content, made) for name, content in contents.items()}
    return _keep(trial, results)


def prove_onnx(
    paths: Paths,
    content: bytes,
    subject: Subject,
    sample: Sample,
    criterion: Criterion = Criterion(),
    provider: str = "cpu",
    report: Say = lambda line: None,
    options: str = "",
) -> Proof:
    """Hold an ONNX file that something else exported against its module, as `prove_export` does.

    When it passes, it becomes the export `exported/<name>/`, in place of what was there.
    """
    found = matching_signature(content, subject.images, subject.outputs)
    origin = {**subject.origin, "is_given": True}
    named = replace(subject, images=found.images, outputs=found.outputs, origin=origin)
    trial = trial_of(paths, named, sample, criterion, provider, report, options)
    result = try_file(trial, "fp32", content, {})
    config = ExportConfig(found.opset, found.ir_version)
    write_export(paths, named, sample, config, {"fp32": content}, None)
    return _keep(trial, {"fp32": result})


def replay_export(
    paths: Paths, sample: Sample, criterion: Criterion = Criterion(), provider: str = "cpu"
) -> list[Verdict]:
    """The verdict on each exported file over other images, the worst ones say. Writes nothing."""
    manifest = check_manifest(paths.export, EXPORT)
    subject = exported_subject(paths, manifest)
    return replay(subject, _contents(paths, manifest), sample, criterion, provider)


def replay(
    subject: Subject,
    contents: Mapping[str, bytes],
    sample: Sample,
    criterion: Criterion = Criterion(),
    provider: str = "cpu",
) -> list[Verdict]:
    """The verdict on files, by precision, over a few images of the subject. Writes nothing."""
    given, wanted = sample.images, subject.images
    if (str(given.dtype), given.shape[1:]) != (wanted.dtype, wanted.shape):
        raise PipelineError(
            f"the images are {given.dtype} {given.shape[1:]}, the module takes {wanted}"
        )
    reference = reference_of(subject, sample.images, sample, criterion)
    return [
        hold(
            precision,
            predictors_of(content, criterion, provider),
            sample.images,
            reference,
            criterion,
        )[0]
        for precision, content in contents.items()
    ]


def _contents(paths: Paths, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes of each exported file by precision, every one checked against its digest."""
    files = manifest["files"]
    named = {precision: paths.variant(precision) for precision in manifest["precisions"]}
    return {p: check_digest(path, files.get(path.name), EXPORT) for p, path in named.items()}


def _made_again(trial: Trial, sample: Sample, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """What exporting the module once more gives, by precision: it has to be the same bytes.

    Empty where something else made the file. Raises CheckFailedError when other versions of the
    libraries did: with them nobody can tell.
    """
    if manifest.get("is_given"):
        return {}
    if manifest["versions"] != versions():
        raise CheckFailedError(
            f"{trial.paths.export} was exported with {manifest['versions']}, and here are "
            f"{versions()}: its bytes cannot be made again to compare them. {EXPORT}"
        )
    trial.report("the export once more, to compare its bytes")
    subject, config = trial.subject, export_config(dict(manifest))
    program = export_program(subject.model, subject.images)
    made = {"fp32": to_onnx(program, signature_of(subject, config), metadata_of(subject))}
    for precision in manifest["precisions"][1:]:
        made[precision] = variant(made["fp32"], precision, config.ir_version, sample.calibration)
    return made


def _keep(trial: Trial, results: Mapping[str, Result]) -> Proof:
    """Write the proof beside the files and into their manifest."""
    paths, reference = trial.paths, trial.reference
    manifest = read_json(paths.manifest, EXPORT)
    files, variants = dict(manifest["files"]), []
    allowed = {precision: _allowed(trial, result.held) for precision, result in results.items()}
    golden = {precision: _golden(trial, bound) for precision, bound in allowed.items()}
    for precision, result in results.items():
        path = paths.variant_golden(precision)
        files[path.name] = write_bytes(path, golden[precision])
        profile = profile_export(paths, manifest, precision, trial.rows[: len(reference.labels)])
        norm = paths.variant_profile(precision)
        files[norm.name] = write_bytes(norm, packed(profile))
        variants.append(
            {
                **asdict(result.verdict),
                "file": paths.variant(precision).name,
                "sha256": result.sha256,
                "size": result.size,
                "golden": path.name,
                "golden_sha256": files[path.name],
                # How far a served row may lie from eager float32, and how many may change class.
                "allowed_error": float(allowed[precision].max() + reference.errors.max()),
                "allowed_flips": result.verdict.flipped + trial.criterion.ties,
            }
        )
    files[paths.evidence.name] = write_bytes(paths.evidence, _evidence(trial, results))
    record = {**record_of(trial), "passed": True, "variants": variants}
    files[paths.validation.name] = write_json(paths.validation, record)
    card = model_card({**manifest, "files": files}, record)
    files[paths.card.name] = write_bytes(paths.card, card.encode())
    write_json(paths.manifest, {**manifest, "files": files})
    return Proof(
        tuple(result.verdict for result in results.values()),
        record["eager_accuracy"],
        reference.is_labelled,
        results["fp32"].sha256,
    )


def _allowed(trial: Trial, held: Held) -> np.ndarray:
    """Compute how far a served row may lie from the reference, float64 (N,).

    In lower precision twice its own proven error: other hardware rounds otherwise.
    """
    if held.precision == "fp32":
        return held.allowed
    return bounds(trial.reference.outputs, held.errors, trial.criterion)


def _golden(trial: Trial, allowed: np.ndarray) -> bytes:
    labels = trial.reference.labels
    images, outputs = trial.rows[: len(labels)], trial.reference.outputs[: len(labels)]
    return pack_golden(choose_golden(images, labels, outputs, allowed[: len(labels)]))


def _evidence(trial: Trial, results: Mapping[str, Result]) -> bytes:
    """What the report shows of each row, as the bytes of an .npz file."""
    reference = trial.reference
    arrays = {
        "labels": reference.labels,
        "margins": margins(reference.outputs).astype(np.float32),
        "reference": reference.outputs.argmax(axis=1).astype(np.int32),
    }
    for precision, result in results.items():
        arrays[f"errors_{precision}"] = result.held.errors.astype(np.float32)
        arrays[f"said_{precision}"] = result.held.classes.astype(np.int32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _withdraw(paths: Paths) -> None:
    """Remove an earlier proof from the folder and its manifest, the manifest's word first."""
    manifest = read_json(paths.manifest, EXPORT)
    golden = [paths.variant_golden(precision) for precision in manifest["precisions"]]
    profiles = [paths.variant_profile(precision) for precision in manifest["precisions"]]
    proof = [paths.validation, paths.evidence, paths.card, *golden, *profiles]
    gone = {path.name for path in proof}
    files = {name: digest for name, digest in manifest["files"].items() if name not in gone}
    write_json(paths.manifest, {**manifest, "files": files})
    for path in (*proof, paths.failed):
        remove(path)

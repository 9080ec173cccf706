"""Validation of an export: each of its files, byte for byte as shipped, against its module."""

# Shape letters: N rows (images, then probes), M labelled images.

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import margins, predict
from pipeline.core.files import (
    check_digest,
    check_manifest,
    read_json,
    remove,
    sha256,
    write_bytes,
    write_json,
)
from pipeline.core.paths import MODEL_NAMES, Paths, packaged_name
from pipeline.data.splits import load_split
from pipeline.export import export
from pipeline.export.runtime import onnx_predictor
from pipeline.export.sample import Sample
from pipeline.export.subject import EXPORT, Subject, exported_sample, exported_subject
from pipeline.export.targets import ExportConfig
from pipeline.repository.golden import choose_golden, pack_golden
from pipeline.repository.reference_profile import ReferenceProfile, build_profile, pack_profile
from pipeline.validation import check_file
from pipeline.validation.card import model_card
from pipeline.validation.compare import Criterion, Held, Verdict, bounds, hold

CRITERION = Criterion()


@dataclass(frozen=True)
class Proof:
    """Result of a validation that passed: all files of an export agree with their module."""

    verdicts: tuple[Verdict, ...]  # fp32 first
    accuracy: float  # of eager float32, 0 to 1
    is_labelled: bool  # whether accuracy is against true classes; else the reference's
    sha256: str  # of the fp32 file that ran


def validate_export(
    paths: Paths,
    provider: str = "cpu",
    report: check_file.Say = lambda line: None,
) -> Proof:
    """Run each exported file in ONNX Runtime and compare it with its module, image by image.

    Writes validation.json, golden sets, reference profiles, evidence.npz and a model card next to
    them. Raises CheckFailedError when a file disagrees: then the findings are under `failed/`, and
    the files of an earlier validation are gone.
    """
    manifest = check_manifest(paths.export, EXPORT)
    subject = exported_subject(paths, manifest)
    sample = exported_sample(paths, manifest)
    contents = _contents(paths, manifest)
    wanted = export.signature_of(subject, export.export_config(manifest))
    if provider != "cpu":  # without the provider, an earlier validation stays
        export.check_onnx(contents["fp32"], wanted, str(paths.onnx))
        onnx_predictor(contents["fp32"], provider=provider)
    # Remove an earlier validation, its entries in the manifest first.
    proof = export.proof_files(paths)
    names = {path.name for path in proof}
    files = {name: digest for name, digest in manifest["files"].items() if name not in names}
    write_json(paths.manifest, {**manifest, "files": files})
    for path in proof:
        remove(path)
    for precision, content in contents.items():
        export.check_onnx(content, wanted, str(paths.variant(precision)))
    named = "" if paths.name == MODEL_NAMES["mnist"] else f"--name {paths.name}"
    trial = check_file.trial_of(paths, subject, sample, CRITERION, provider, report, named)
    # Exporting the module again must give the same bytes. That cannot be checked for a file from
    # another tool; other versions of the libraries are refused.
    made: Mapping[str, bytes] = {}
    if not manifest.get("is_given"):
        here = export.library_versions()
        if manifest["versions"] != here:
            raise CheckFailedError(
                f"{paths.export} was exported with {manifest['versions']}, not with the {here} "
                f"here: its bytes cannot be made again to compare them. {EXPORT}"
            )
        report("the export once more, to compare its bytes")
        config, precisions = export.export_config(manifest), manifest["precisions"]
        _, made = export.make_files(subject, config, precisions, sample.calibration)
    results = {
        name: check_file.try_file(trial, name, content, made) for name, content in contents.items()
    }
    return _keep(trial, contents, results)


def validate_onnx(
    paths: Paths,
    content: bytes,
    subject: Subject,
    sample: Sample,
    provider: str = "cpu",
    report: check_file.Say = lambda line: None,
    options: str = "",
) -> Proof:
    """Compare an ONNX file from another tool with its module, as `validate_export` does.

    When it passes, it replaces the export `exported/<name>/`. Raises CheckFailedError otherwise.
    """
    found = export.matching_signature(content, subject.images, subject.outputs)
    origin = {**subject.origin, "is_given": True}
    named = replace(subject, images=found.images, outputs=found.outputs, origin=origin)
    trial = check_file.trial_of(paths, named, sample, CRITERION, provider, report, options)
    results = {"fp32": check_file.try_file(trial, "fp32", content, {})}
    config = ExportConfig(found.opset, found.ir_version)
    export.write_export(paths, named, sample, config, {"fp32": content}, None)
    return _keep(trial, {"fp32": content}, results)


def replay_export(paths: Paths, sample: Sample, provider: str = "cpu") -> list[Verdict]:
    """Return the verdict on each exported file over other images, such as the worst rows.

    Writes nothing.
    """
    manifest = check_manifest(paths.export, EXPORT)
    subject = exported_subject(paths, manifest)
    return replay(subject, _contents(paths, manifest), sample, provider)


def replay(
    subject: Subject,
    contents: Mapping[str, bytes],
    sample: Sample,
    provider: str = "cpu",
) -> list[Verdict]:
    """Return the verdict on files, by precision, over a few images of the subject.

    Writes nothing. Raises PipelineError when the images do not fit the subject.
    """
    given, wanted = sample.images, subject.images
    if (str(given.dtype), given.shape[1:]) != (wanted.dtype, wanted.shape):
        kind = f"{given.dtype} {given.shape[1:]}"
        raise PipelineError(f"the images are {kind}, the module takes {wanted}")
    reference = check_file.reference_of(subject, given, sample, CRITERION)
    verdicts = []
    for precision, content in contents.items():
        predictors = check_file.predictors_of(content, CRITERION, provider)
        verdicts.append(hold(precision, predictors, given, reference, CRITERION)[0])
    return verdicts


def _contents(paths: Paths, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Read the bytes of each exported file, by precision, and check them against their digests."""
    files = manifest["files"]
    named = {precision: paths.variant(precision) for precision in manifest["precisions"]}
    return {p: check_digest(path, files.get(path.name), EXPORT) for p, path in named.items()}


def _keep(
    trial: check_file.FileTrial,
    contents: Mapping[str, bytes],
    results: Mapping[str, tuple[Verdict, Held]],
) -> Proof:
    """Write the results of the validation next to the files, and into their manifest."""
    paths, reference, count = trial.paths, trial.reference, len(trial.reference.labels)
    manifest = read_json(paths.manifest, EXPORT)
    files, variants = dict(manifest["files"]), []
    images, outputs = trial.rows[:count], reference.outputs[:count]
    allowed, golden = {}, {}  # bound of each served row against the reference, float64 (N,)
    for precision, (_, held) in results.items():
        # In lower precision twice its own measured error: other hardware rounds differently.
        own = bounds(reference.outputs, held.errors, trial.criterion)
        allowed[precision] = bound = held.allowed if precision == "fp32" else own
        golden[precision] = choose_golden(images, reference.labels, outputs, bound[:count])
    for precision, (verdict, _) in results.items():
        path, norm = paths.variant_golden(precision), paths.variant_profile(precision)
        files[path.name] = write_bytes(path, pack_golden(golden[precision]))
        profile = _profile(paths, manifest, precision, images)
        files[norm.name] = write_bytes(norm, pack_profile(profile))
        variants.append(
            {
                **asdict(verdict),
                "file": paths.variant(precision).name,
                "sha256": sha256(contents[precision]),
                "size": len(contents[precision]),
                "golden": path.name,
                "golden_sha256": files[path.name],
                # The bound of a served row against eager float32, and how many rows may flip.
                "allowed_error": float(allowed[precision].max() + reference.errors.max()),
                "allowed_flips": verdict.flipped + trial.criterion.ties,
            }
        )
    files[paths.evidence.name] = write_bytes(paths.evidence, _evidence(trial, results))
    record = {**check_file.record_of(trial), "passed": True, "variants": variants}
    files[paths.validation.name] = write_json(paths.validation, record)
    card = model_card({**manifest, "files": files}, record)
    files[paths.card.name] = write_bytes(paths.card, card.encode())
    write_json(paths.manifest, {**manifest, "files": files})
    verdicts = tuple(verdict for verdict, _ in results.values())
    accuracy, digest = record["eager_accuracy"], sha256(contents["fp32"])
    return Proof(verdicts, accuracy, reference.is_labelled, digest)


def _profile(
    paths: Paths, manifest: Mapping[str, Any], precision: str, given: np.ndarray
) -> ReferenceProfile:
    """Make the reference profile of one exported file, by running its bytes in ONNX Runtime.

    The profile is of the validation split, which the network was neither trained nor scored on. For
    a third-party module, it is of the images (N, ...) that it was validated on.
    """
    path, images, images_from = paths.variant(precision), given, "the images that it was proven on"
    digest = str(manifest["files"].get(path.name))
    content = check_digest(path, digest, EXPORT)
    if training := manifest.get("training"):
        dataset = training["dataset"]
        images = load_split(dataset, paths.data(dataset), "validation").images
        images_from = "the validation split"
    return build_profile(
        predict(onnx_predictor(content), images),
        images,
        manifest["kind"],
        name=packaged_name(paths.name, precision),
        precision=precision,
        sha256=digest,
        images_from=images_from,
        classes=tuple(manifest["classes"]),
        min_probability=manifest.get("min_probability"),
    )


def _evidence(trial: check_file.FileTrial, results: Mapping[str, tuple[Verdict, Held]]) -> bytes:
    """Return what the report shows of each row, as the bytes of an .npz file."""
    reference = trial.reference
    arrays = {
        "labels": reference.labels,
        "margins": margins(reference.outputs).astype(np.float32),
        "reference": reference.outputs.argmax(axis=1).astype(np.int32),
    }
    for precision, (_, held) in results.items():
        arrays[f"errors_{precision}"] = held.errors.astype(np.float32)
        arrays[f"said_{precision}"] = held.classes.astype(np.int32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()

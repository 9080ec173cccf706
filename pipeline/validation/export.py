"""Validation of an export: each of its files, byte for byte as shipped, against its module."""

# Shape letters: N rows (images, then probes), M labelled images.

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.core import files
from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.evaluate import margins, predict, read_answers
from pipeline.core.paths import Paths, packaged_name
from pipeline.core.signature import TensorSpec
from pipeline.data.splits import load_split
from pipeline.export import export
from pipeline.export.exact import require_bounds, to_exact
from pipeline.export.runtime import onnx_predictor
from pipeline.export.sample import Sample
from pipeline.export.subject import EXPORT, Subject, load_sample, load_subject
from pipeline.export.targets import ExportConfig
from pipeline.export.variants import CALIBRATION_IMAGES
from pipeline.repository.golden import choose_golden, hash_golden, pack_golden
from pipeline.repository.reference_profile import ReferenceProfile, build_profile, pack_profile
from pipeline.validation import check_file, compare
from pipeline.validation.card import render_card
from pipeline.validation.exact import eager_scores

CRITERION = compare.Criterion()
Results = Mapping[str, compare.FileResult]  # by precision, fp32 first


@dataclass(frozen=True)
class ExportValidation:
    """Result of a validation that passed: all files of an export agree with their module."""

    verdicts: tuple[compare.Verdict, ...]  # fp32 first
    accuracy: float  # of eager float32, 0 to 1
    is_labelled: bool  # whether accuracy is against true classes; else the reference's
    sha256: str  # of the fp32 file that ran
    notes: tuple[str, ...] = ()  # on the model, from its training


def validate_export(
    paths: Paths, provider: str = "cpu", report: compare.Report = lambda line: None
) -> ExportValidation:
    """Run each exported file in ONNX Runtime and compare it with its module, image by image.

    Writes validation.json, golden sets, reference profiles, evidence.npz and a model card next to
    them. Raises CheckFailedError when a file disagrees: then the findings are under `failed/`, and
    the files of an earlier validation are gone.
    """
    manifest = files.check_manifest(paths.export, EXPORT)
    subject = load_subject(paths, manifest)
    sample = load_sample(paths, manifest)
    contents = _read_contents(paths, manifest)
    config = ExportConfig(manifest["opset"], manifest["ir_version"])
    signature = export.signature_of(subject, config)
    if provider != "cpu":  # without the provider, an earlier validation stays
        export.check_onnx(contents["fp32"], signature, str(paths.onnx))
        onnx_predictor(contents["fp32"], provider=provider)
    # Remove an earlier validation, its entries in the manifest first.
    stale = {path.name: path for path in export.validation_files(paths)}
    digests = {name: digest for name, digest in manifest["files"].items() if name not in stale}
    files.write_json(paths.manifest, {**manifest, "files": digests})
    for path in stale.values():
        files.remove(path)
    scores = TensorSpec.from_record(manifest["scores"]) if "exact" in contents else None
    for precision, content in contents.items():
        wanted = replace(signature, scores=scores if precision == "exact" else None)
        export.check_onnx(content, wanted, str(paths.variant(precision)))
    # Exporting the module again must give the same bytes. That cannot be checked for a file from
    # another tool; other versions of the libraries are refused.
    is_given = manifest.get("is_given")
    versions, here = manifest["versions"], export.library_versions()
    if not is_given and versions != here:
        raise CheckFailedError(
            f"{paths.export} was exported with {versions}, but {here} are installed: its bytes "
            f"cannot be made again to compare them. {EXPORT}"
        )
    options = paths.name_option
    trial = check_file.FileTrial(paths, subject, sample, CRITERION, provider, report, options)
    made: Mapping[str, bytes] = {}
    if not is_given:
        report("exporting the module again, to compare the bytes")
        images, precisions = sample.calibration, manifest["precisions"]
        program, made = export.make_files(subject, config, precisions, images)
        if "exact" in contents:
            network = to_exact(program, images[:CALIBRATION_IMAGES])
            require_bounds(network, subject.images)
            trial.scores = eager_scores(network, trial.rows)
    results = {p: check_file.try_file(trial, p, content, made) for p, content in contents.items()}
    return _write_validation(trial, contents, results)


def validate_onnx(
    paths: Paths,
    content: bytes,
    subject: Subject,
    sample: Sample,
    provider: str = "cpu",
    report: compare.Report = lambda line: None,
    options: str = "",
) -> ExportValidation:
    """Compare an ONNX file from another tool with its module, as `validate_export` does.

    When it passes, it replaces the export `exported/<name>/`. Raises CheckFailedError otherwise.
    """
    signature = export.matching_signature(content, subject.images, subject.outputs)
    origin = {**subject.origin, "is_given": True}
    subject = replace(subject, images=signature.images, outputs=signature.outputs, origin=origin)
    trial = check_file.FileTrial(paths, subject, sample, CRITERION, provider, report, options)
    contents = {"fp32": content}
    results = {"fp32": check_file.try_file(trial, "fp32", content, {})}
    config = ExportConfig(signature.opset, signature.ir_version)
    export.write_export(paths, subject, sample, config, contents)
    return _write_validation(trial, contents, results)


def replay_export(paths: Paths, sample: Sample, provider: str = "cpu") -> list[compare.Verdict]:
    """Return the verdict on each exported file over other images, such as the worst rows.

    Writes nothing.
    """
    manifest = files.check_manifest(paths.export, EXPORT)
    return replay(load_subject(paths, manifest), _read_contents(paths, manifest), sample, provider)


def replay(
    subject: Subject, contents: Mapping[str, bytes], sample: Sample, provider: str = "cpu"
) -> list[compare.Verdict]:
    """Return the verdict on files, by precision, over a few images of the subject.

    Writes nothing. Raises PipelineError when the images do not fit the subject.
    """
    rows, wanted = sample.images, subject.images
    if (str(rows.dtype), rows.shape[1:]) != (wanted.dtype, wanted.shape):
        kind = f"{rows.dtype} {rows.shape[1:]}"
        raise PipelineError(f"the images are {kind}, but the module takes {wanted}")
    reference = check_file.run_reference(subject, rows, sample, CRITERION)
    verdicts = []
    for precision, content in contents.items():
        predictors = check_file.load_predictors(content, CRITERION, provider)
        result = compare.compare_file(precision, predictors, rows, reference, CRITERION)
        verdicts.append(compare.make_verdict(result))
    return verdicts


def _read_contents(paths: Paths, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Read the bytes of each exported file, by precision, and check them against their digests."""
    variants = {precision: paths.variant(precision) for precision in manifest["precisions"]}
    return {
        precision: files.check_digest(path, manifest["files"].get(path.name), EXPORT)
        for precision, path in variants.items()
    }


def _write_validation(
    trial: check_file.FileTrial, contents: Mapping[str, bytes], results: Results
) -> ExportValidation:
    """Write the results of the validation next to the files, and into their manifest."""
    paths, reference, count = trial.paths, trial.reference, len(trial.reference.labels)
    manifest = files.read_json(paths.manifest, EXPORT)
    digests, variants = dict(manifest["files"]), []
    images, outputs = trial.rows[:count], reference.outputs[:count]
    bounds, golden_sets = {}, {}  # bounds of each served row against the reference, float64 (N,)
    evidence = {  # what the report shows of each row
        "labels": reference.labels,
        "margins": margins(reference.outputs).astype(np.float32),
        "reference": read_answers(reference.outputs)[0],
    }
    for precision, result in results.items():
        # In lower precision twice its own measured error: other hardware rounds differently.
        own = compare.compute_bounds(reference.outputs, result.errors, trial.criterion)
        bounds[precision] = bound = result.bounds if precision == "fp32" else own
        rows = (images, reference.labels, outputs, bound[:count])
        golden_sets[precision] = choose_golden(*rows, result.scores)
        evidence[f"errors_{precision}"] = result.errors.astype(np.float32)
        evidence[f"said_{precision}"] = result.answers
    verdicts = tuple(map(compare.make_verdict, results.values()))
    for verdict in verdicts:
        precision = verdict.precision
        golden, profile = paths.variant_golden(precision), paths.variant_profile(precision)
        content = contents[precision]
        digests[golden.name] = files.write_bytes(golden, pack_golden(golden_sets[precision]))
        made = _make_profile(paths, manifest, precision, content, images)
        digests[profile.name] = files.write_bytes(profile, pack_profile(made))
        variants.append(
            {
                **asdict(verdict),
                "file": paths.variant(precision).name,
                "sha256": files.sha256(content),
                "size": len(content),
                "golden": golden.name,
                "golden_sha256": digests[golden.name],
                "exact_golden_sha256": hash_golden(golden_sets[precision]),
                # The bound of a served row against eager float32, and how many rows may flip.
                "allowed_error": float(bounds[precision].max() + reference.errors.max()),
                "allowed_flips": verdict.flipped + trial.criterion.ties,
            }
        )
    digests[paths.evidence.name] = files.write_bytes(paths.evidence, files.pack_arrays(evidence))
    exact = next((each for each in variants if each["exact_sha256"]), {})
    manifest |= {key: exact.get(key) for key in ("exact_sha256", "exact_golden_sha256")}
    record = {**check_file.make_record(trial), "passed": True, "variants": variants}
    digests[paths.validation.name] = files.write_json(paths.validation, record)
    card = render_card({**manifest, "files": digests}, record)
    digests[paths.card.name] = files.write_bytes(paths.card, card.encode())
    files.write_json(paths.manifest, {**manifest, "files": digests})
    accuracy, digest = record["eager_accuracy"], files.sha256(contents["fp32"])
    notes = tuple(manifest.get("notes", ()))
    return ExportValidation(verdicts, accuracy, reference.is_labelled, digest, notes)


def _make_profile(
    paths: Paths, manifest: Mapping[str, Any], precision: str, content: bytes, images: np.ndarray
) -> ReferenceProfile:
    """Make the reference profile of one exported file, by running its bytes in ONNX Runtime.

    The profile is of the validation split, which the network was neither trained nor scored on. For
    a third-party module, it is of the images (N, ...) that it was validated on.
    """
    images_from = "the images that it was proven on"
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
        sha256=files.sha256(content),
        images_from=images_from,
        classes=tuple(manifest["classes"]),
        min_probability=manifest.get("min_probability"),
    )

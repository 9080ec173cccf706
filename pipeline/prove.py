"""The proofs: an exported file against eager PyTorch, and a repository's served answers as well."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.config import Criterion, ServeConfig
from pipeline.data import Split, scored_split
from pipeline.errors import CheckFailedError, PipelineError
from pipeline.evaluate import predict, score
from pipeline.export import check_onnx, export_config
from pipeline.files import (
    check_digest,
    check_manifest,
    read_json,
    remove,
    write_bytes,
    write_json,
)
from pipeline.model import eager_predictor
from pipeline.paths import Paths
from pipeline.query import Client, triton_predictor
from pipeline.replay import (
    Release,
    Table,
    agree,
    machine,
    require_agreement,
    selected_releases,
)
from pipeline.runtime import onnx_predictor
from pipeline.serve import running_server, with_free_ports
from pipeline.validate import (
    Agreement,
    choose_golden,
    compare,
    pack_golden,
    probe_images,
    require,
)

EXPORT = "run 'pipeline export' again"


@dataclass(frozen=True)
class Validated:
    """An export that was held against eager PyTorch and passed."""

    agreement: Agreement
    accuracy: float  # of the reference on the test split, 0 to 1
    sha256: str  # of the model.onnx that ran


def prove_export(
    paths: Paths,
    criterion: Criterion = Criterion(),
    report: Callable[[str], None] = lambda line: None,
) -> Validated:
    """Run the exported file in ONNX Runtime and hold it against eager PyTorch, image by image.

    Writes validation.json and golden.npz beside it. Raises CheckFailedError when they disagree,
    with the findings under `failed/`, and then no proof is left.
    """
    manifest = check_manifest(paths.export, EXPORT)
    checkpoint = load_checkpoint(replace(paths, run=str(manifest.get("run"))))
    _require_same_weights(manifest, checkpoint, paths)
    content = check_digest(paths.onnx, manifest["files"].get(paths.onnx.name), EXPORT)
    test = _scored_split(paths, checkpoint)
    _withdraw(paths)
    check_onnx(content, len(checkpoint.classes), export_config(manifest))
    images = np.concatenate([test.images, probe_images()])
    report(f"eager PyTorch on {len(images):,} images")
    expected = predict(eager_predictor(checkpoint.model), images)
    report(f"ONNX Runtime at batch sizes {', '.join(map(str, criterion.batch_sizes))}")
    agreement = compare(expected, onnx_predictor(content), images, criterion)
    record = {
        "passed": agreement.passed,
        "model_sha256": manifest["files"][paths.onnx.name],
        "reference": "eager PyTorch, float32",
        "candidate": "ONNX Runtime, CPU",
        "criterion": asdict(criterion),
        "agreement": asdict(agreement),
        "versions": manifest["versions"],
    }
    if not agreement.passed:
        write_json(paths.failed / paths.validation.name, record)
        require(agreement, f"{paths.onnx} is not what was trained", f"Findings: {paths.failed}")
    test_outputs = expected[: len(test)]
    golden = pack_golden(choose_golden(test.images, test.labels, test_outputs))
    metrics = asdict(score(test_outputs, test.labels))
    golden_sha256 = write_bytes(paths.golden, golden)
    proof = {**record, "golden_sha256": golden_sha256, "reference_metrics": metrics}
    files = {
        **manifest["files"],
        paths.golden.name: golden_sha256,
        paths.validation.name: write_json(paths.validation, proof),
    }
    write_json(paths.manifest, {**manifest, "files": files})
    return Validated(agreement, metrics["accuracy"], record["model_sha256"])


def _scored_split(paths: Paths, checkpoint: Checkpoint) -> Split:
    folder = paths.data(checkpoint.config.dataset)
    return scored_split(checkpoint.config.record(), checkpoint.summary["data_sha256"], folder)


def _require_same_weights(manifest: dict[str, Any], checkpoint: Checkpoint, paths: Paths) -> None:
    if manifest.get("weights_sha256") != checkpoint.summary["weights_sha256"]:
        raise CheckFailedError(
            f"{paths.export} was exported from other weights than run {manifest.get('run')} has "
            f"now: {EXPORT}"
        )


def _withdraw(paths: Paths) -> None:
    """Remove an earlier proof from the folder and its manifest, the manifest's word first."""
    manifest = read_json(paths.manifest, EXPORT)
    proof = (paths.golden.name, paths.validation.name)
    files = {name: digest for name, digest in manifest["files"].items() if name not in proof}
    write_json(paths.manifest, {**manifest, "files": files})
    for path in (paths.validation, paths.golden, paths.failed):
        remove(path)


def prove_repository(
    paths: Paths,
    config: ServeConfig = ServeConfig(),
    criterion: Criterion = Criterion(),
    report: Callable[[str], None] = lambda line: None,
    only: str | None = None,
) -> list[Table]:
    """Serve the repository for the occasion and put each model's whole test split to it.

    With `only`, just the model of that name is proven, and no other one's record is touched.
    One table a model: eager PyTorch, ONNX Runtime, Triton over HTTP and over gRPC. Writes
    agreement.json beside each export; raises CheckFailedError when a row disagrees.
    """
    releases = selected_releases(paths)
    if only is not None and only not in releases:
        raise PipelineError(
            f"no model {only} in {paths.repository}, which has {', '.join(releases)}: package it "
            f"with 'pipeline package --name {only}'"
        )
    tables = []
    with running_server(paths, with_free_ports(config), report=report) as (server, _):
        for name in [only] if only else releases:
            release = releases[name]
            model = replace(paths, name=name)
            report(f"{name} version {release.version}: the test split through every runtime")
            with Client(server.http_url, name) as http, Client(server.grpc_url, name) as grpc:
                tables.append(_table(model, release, http, grpc))
    for table in tables:
        model = replace(paths, name=table.name)
        write_json(model.agreement, {**machine(), **asdict(table)})
    for table in tables:
        require_agreement(table, criterion)
    return tables


def _table(paths: Paths, release: Release, http: Client, grpc: Client) -> Table:
    manifest = check_manifest(release.folder, EXPORT)
    checkpoint = load_checkpoint(replace(paths, run=str(manifest.get("run"))))
    if manifest.get("weights_sha256") != checkpoint.summary["weights_sha256"]:
        raise PipelineError(
            f"{release.folder} was made from other weights than run {manifest.get('run')} has "
            "now: run 'pipeline export', 'validate' and 'package' for the new ones, or prove a "
            "running server by its URL"
        )
    test = _scored_split(paths, checkpoint)
    predictors = {
        "eager PyTorch": eager_predictor(checkpoint.model),
        "ONNX Runtime": onnx_predictor(release.onnx),
        "Triton HTTP": triton_predictor(http),
        "Triton gRPC": triton_predictor(grpc),
    }
    rows = agree(predictors, test.images, test.labels)
    return Table(paths.name, release.version, release.sha256, len(test), "test", rows)

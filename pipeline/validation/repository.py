"""Validation of a repository: the answers of its served models against eager PyTorch."""

from dataclasses import asdict

from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import predict, read_answers
from pipeline.core.files import write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.core.signature import SCORES
from pipeline.export.runtime import onnx_predictor
from pipeline.export.subject import load_sample, load_subject
from pipeline.repository.release import Release, load_selected_releases
from pipeline.serving.serve import run_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.training.networks import eager_predictor
from pipeline.validation.agreement import Table, measure_agreement, require_agreement
from pipeline.validation.compare import Report


def validate_repository(
    paths: Paths, report: Report = lambda line: None, only: str | None = None
) -> list[Table]:
    """Start a temporary server of the repository and run each model's whole test split through it.

    Returns a table for each model: eager PyTorch, ONNX Runtime, Triton over HTTP and over gRPC.
    With `only`, validates just the model of that name and the variants of its export, and leaves
    the records of the others unchanged. Writes agreement.json next to each export. Raises
    PipelineError when there is no model `only`, and CheckFailedError when a row disagrees.
    """
    releases = load_selected_releases(paths)
    chosen = {n: r for n, r in releases.items() if only in (None, n, r.manifest["name"])}
    if not chosen:
        raise PipelineError(
            f"{paths.repository} has no model {only}, only {', '.join(releases)}: run 'pipeline "
            f"package --name {only}'"
        )
    tables = {}
    with run_server(paths, with_free_ports(ServeConfig()), report=report) as (server, _):
        for name, release in chosen.items():
            report(f"{name} version {release.version}: the test split through every runtime")
            with Client(server.http_url, name) as http, Client(server.grpc_url, name) as grpc:
                tables[name] = _measure(paths.named(name), release, http, grpc)
    for name, table in tables.items():
        manifest = releases[name].manifest
        file = paths.named(manifest["name"]).variant_agreement(manifest["precision"])
        write_json(file, {**machine(), **asdict(table)})
    for name, table in tables.items():
        require_agreement(table, releases[name].limits)
    return list(tables.values())


def _measure(paths: Paths, release: Release, http: Client, grpc: Client) -> Table:
    manifest = release.manifest
    exported = paths.named(manifest["name"])
    subject = load_subject(exported, manifest)
    sample = load_sample(exported, manifest)
    predictors = {
        "eager PyTorch": eager_predictor(subject.model),
        "ONNX Runtime": onnx_predictor(release.onnx),
        "Triton HTTP": triton_predictor(http),
        "Triton gRPC": triton_predictor(grpc),
    }
    labels = sample.labels
    if labels is None:  # then accuracy is how often the class is eager PyTorch's
        labels = read_answers(predict(predictors["eager PyTorch"], sample.images))[0]
    scores = {}
    if release.golden.scores is not None:
        scores = {
            "ONNX Runtime": onnx_predictor(release.onnx, outputs=(1,)),
            "Triton HTTP": triton_predictor(http, SCORES),
            "Triton gRPC": triton_predictor(grpc, SCORES),
        }
    digest = manifest.get("exact_sha256")
    rows = measure_agreement(predictors, sample.images, labels, scores, digest)
    split = "given" if "module" in manifest else "test"
    return Table(paths.name, release.version, release.sha256, len(labels), split, rows)

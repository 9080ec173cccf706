"""Validation of a repository: the answers of its served models against eager PyTorch."""

from collections.abc import Callable
from dataclasses import asdict, replace

from pipeline.client.client import Client
from pipeline.client.query import triton_predictor
from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import predict
from pipeline.core.files import write_json
from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.export.runtime import onnx_predictor
from pipeline.export.subject import exported_sample, exported_subject
from pipeline.repository.release import Release, load_selected_releases
from pipeline.serving.serve import run_server, with_free_ports
from pipeline.serving.settings import ServeConfig
from pipeline.training.networks import eager_predictor
from pipeline.validation.agreement import Table, agree, require_agreement


def validate_repository(
    paths: Paths,
    report: Callable[[str], None] = lambda line: None,
    only: str | None = None,
) -> list[Table]:
    """Start a temporary server of the repository and run each model's whole test split through it.

    Returns a table for each model: eager PyTorch, ONNX Runtime, Triton over HTTP and over gRPC.
    With `only`, validates just the model of that name and the variants of its export, and leaves
    the records of the others unchanged. Writes agreement.json next to each export. Raises
    PipelineError when there is no model `only`, and CheckFailedError when a row disagrees.
    """
    releases = load_selected_releases(paths)
    names = [n for n, r in releases.items() if only in (None, n, r.manifest["name"])]
    if not names:
        raise PipelineError(
            f"no model {only} in {paths.repository}, which has {', '.join(releases)}: package it "
            f"with 'pipeline package --name {only}'"
        )
    tables = {}
    with run_server(paths, with_free_ports(ServeConfig()), report=report) as (server, _):
        for name in names:
            release = releases[name]
            report(f"{name} version {release.version}: the test split through every runtime")
            with Client(server.http_url, name) as http, Client(server.grpc_url, name) as grpc:
                tables[name] = _table(replace(paths, name=name), release, http, grpc)
    for name, table in tables.items():
        exported = replace(paths, name=str(releases[name].manifest["name"]))
        write_json(
            exported.variant_agreement(releases[name].manifest["precision"]),
            {**machine(), **asdict(table)},
        )
    for name, table in tables.items():
        require_agreement(table, releases[name].limits)
    return list(tables.values())


def _table(paths: Paths, release: Release, http: Client, grpc: Client) -> Table:
    manifest = release.manifest
    exported = replace(paths, name=str(manifest["name"]))
    subject = exported_subject(exported, manifest)
    sample = exported_sample(exported, manifest)
    predictors = {
        "eager PyTorch": eager_predictor(subject.model),
        "ONNX Runtime": onnx_predictor(release.onnx),
        "Triton HTTP": triton_predictor(http),
        "Triton gRPC": triton_predictor(grpc),
    }
    labels = sample.labels
    if labels is None:  # then accuracy is how often the class is eager PyTorch's
        labels = predict(predictors["eager PyTorch"], sample.images).argmax(axis=1)
    rows = agree(predictors, sample.images, labels)
    split = "given" if "module" in manifest else "test"
    return Table(paths.name, release.version, release.sha256, len(labels), split, rows)

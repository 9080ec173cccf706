"""The versions of a packaged model: listing, selecting, pruning and comparing them."""

# Shape letters: N images.

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import judge
from pipeline.core.files import locked, read_json, remove
from pipeline.core.paths import Paths
from pipeline.core.text import Lines, columns
from pipeline.repository import config_pbtxt
from pipeline.repository.release import REPACKAGE, Release, find_versions, load_release
from pipeline.repository.running import find_server


@dataclass(frozen=True)
class Version:
    """A version on disk."""

    version: int
    sha256: str | None  # of its model.onnx, as its manifest states it
    precision: str | None
    accuracy: float | None  # 0 to 1, on the images of its validation; None if they have no labels
    is_selected: bool  # Triton loads it when it starts
    is_previous: bool  # a rollback selects it
    problem: str | None = None  # why its records cannot be read; None if they can


@dataclass(frozen=True)
class Listing:
    """Every version of a model, the oldest first."""

    name: str
    versions: tuple[Version, ...]
    served: int | None  # version that our server serves now; None if none runs

    def __str__(self) -> str:
        rows = []
        for entry in self.versions:
            accuracy = "unknown" if entry.accuracy is None else f"{entry.accuracy:.2%}"
            marks = {"selected": entry.is_selected, "previous": entry.is_previous}
            marks["served"] = entry.version == self.served
            described = ((entry.sha256 or "")[:12], entry.precision, accuracy)
            cells = ("", "", "") if entry.problem else described
            rows.append((entry.version, *cells, ", ".join(filter(marks.get, marks))))
        table = columns(("version", "sha256", "precision", "accuracy", ""), rows, "rllrl")
        problems = (f"{entry.version}: {entry.problem}" for entry in self.versions if entry.problem)
        return Lines(self.name, table, *problems)


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion or a rollback."""

    name: str
    version: int
    sha256: str
    before: int | None  # the version that was selected or served before
    is_served: bool  # our server serves it; if False, the next one that starts will

    def __str__(self) -> str:
        status = "is served" if self.is_served else "is selected: the next server serves it"
        before = "" if self.before in (None, self.version) else f"; previous version: {self.before}"
        return f"{self.name} version {self.version} (sha256 {self.sha256[:12]}) {status}{before}"


def list_versions(paths: Paths, served: int | None = None) -> Listing:
    """List every version of the model in the repository; `served` is the version now served."""
    config = config_pbtxt.read(paths.packaged / config_pbtxt.CONFIG)
    versions = []
    for number in find_versions(paths.packaged):
        marks = (number in config_pbtxt.selected(config), number == config_pbtxt.previous(config))
        try:
            manifest = _read_record(paths, number, paths.manifest)
            accuracy = _read_accuracy(paths, number, manifest)
        except PipelineError as error:
            versions.append(Version(number, None, None, None, *marks, str(error)))
        else:
            digest, precision = manifest["files"].get(paths.onnx.name), manifest.get("precision")
            versions.append(Version(number, digest, str(precision), accuracy, *marks))
    return Listing(paths.name, tuple(versions), served)


def find_rollback_target(paths: Paths) -> int:
    """Return the version that a rollback selects; raise PipelineError if there is none."""
    number = config_pbtxt.previous(config_pbtxt.read(paths.packaged / config_pbtxt.CONFIG))
    if number is None or not (paths.packaged / str(number)).is_dir():
        raise PipelineError(f"{paths.name} has no previous version: see 'pipeline versions list'")
    return number


def select_version(paths: Paths, release: Release) -> Promotion:
    """Select this version in every config, config.pbtxt last. The caller must hold the lock."""
    before = config_pbtxt.selected_version(config_pbtxt.read(paths.packaged / config_pbtxt.CONFIG))
    config_pbtxt.change_configs(paths.packaged, lambda c: config_pbtxt.select(c, release.version))
    return Promotion(paths.name, release.version, release.sha256, before, is_served=False)


def prune(paths: Paths) -> list[int]:
    """Remove every version older than the selected one; return the numbers of those removed.

    Keeps the previous version, the one that our server serves, and newer ones, which wait to be
    promoted. So the highest number stays, and no number is used twice. Raises PipelineError if no
    version is selected.
    """
    with locked(paths.lock):
        config = config_pbtxt.read(paths.packaged / config_pbtxt.CONFIG)
        selected = config_pbtxt.selected(config)
        if not selected:
            raise PipelineError(f"{paths.name} selects no version: run 'pipeline versions promote'")
        server = find_server(paths)
        kept = {config_pbtxt.previous(config), server.models[paths.name] if server else None}
        older = (n for n in find_versions(paths.packaged) if n < min(selected))
        removed = [number for number in older if number not in kept]
        for number in removed:
            # Renamed first, so that other processes see a version whole or not at all.
            hidden = paths.packaged / f".{number}.{secrets.token_hex(4)}.tmp"
            os.rename(paths.packaged / str(number), hidden)
            remove(hidden)

        def forget(config: config_pbtxt.ModelConfig) -> None:
            for key in config_pbtxt.version_parameters(config):
                if key.rpartition(".")[2] in map(str, removed):
                    config.parameters.pop(key)

        if removed:
            config_pbtxt.change_configs(paths.packaged, forget)
        return removed


@dataclass(frozen=True)
class VersionDifference:
    """Differences between the records of two versions, and between their answers."""

    name: str
    first: int
    second: int
    records: dict[str, tuple[Any, Any]]  # by the path in the manifest, or "accuracy"
    images: int  # in both golden sets, whose answers are compared
    differing: int  # flips: images whose class differs
    max_abs_diff: float  # over all outputs

    def __str__(self) -> str:
        return Lines(
            f"{self.name} version {self.first} -> {self.second}",
            *(f"{key}: {before} -> {after}" for key, (before, after) in self.records.items()),
            f"answers to {self.images} golden images: {self.differing} differing classes, "
            f"largest difference {self.max_abs_diff:.2e}",
        )


def diff_versions(paths: Paths, first: int, second: int) -> VersionDifference:
    """Compare two versions by their records and by their answers to both golden sets."""
    from pipeline.export.runtime import onnx_predictor  # only this command needs it

    releases = [load_release(paths, number) for number in (first, second)]
    before, after = (
        {"accuracy": _read_accuracy(paths, r.version, r.manifest), **_flatten(r.manifest)}
        for r in releases
    )
    images = np.concatenate([release.golden.images for release in releases])  # (N, ...)
    answers = [onnx_predictor(release.onnx)(images) for release in releases]
    judgement = judge(answers[0], answers[1])
    pairs = {key: (before.get(key), after.get(key)) for key in sorted({*before, *after})}
    return VersionDifference(
        name=paths.name,
        first=first,
        second=second,
        records={key: pair for key, pair in pairs.items() if pair[0] != pair[1]},
        images=len(images),
        differing=int(judgement.is_changed.sum()),
        max_abs_diff=float(judgement.errors.max()),
    )


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the record's leaves by their dotted paths."""
    leaves: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        leaves |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return leaves


def _read_record(paths: Paths, number: int, file: Path) -> dict[str, Any]:
    return read_json(paths.packaged / str(number) / file.name, REPACKAGE)


def _read_accuracy(paths: Paths, number: int, manifest: Mapping[str, Any]) -> float | None:
    record = _read_record(paths, number, paths.validation)
    variants = {variant["precision"]: variant for variant in record.get("variants", ())}
    variant = variants.get(manifest.get("precision"))
    return float(variant["accuracy"]) if variant and record.get("is_labelled") else None

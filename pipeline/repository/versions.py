"""The versions of a packaged model: which there are, which one is selected, how two differ."""

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
from pipeline.core.files import locked, read_json, remove, write_bytes
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import GOLDEN_BATCHES, compare, require
from pipeline.repository.release import REPACKAGE, Release, checked, load_release, version_numbers
from pipeline.repository.running import serving


@dataclass(frozen=True)
class Version:
    """A version on disk."""

    version: int
    sha256: str | None  # of its model.onnx, as its manifest states it
    precision: str | None
    accuracy: float | None  # on the images that it was proven on; None where nobody labelled them
    is_selected: bool  # what Triton loads when it starts
    is_previous: bool  # what a rollback selects
    problem: str | None = None  # why its records cannot be read

    def __str__(self) -> str:
        if self.problem:
            return f"{self.version:>7}  {self.problem}"
        accuracy = "unknown" if self.accuracy is None else f"{self.accuracy:.2%}"
        return f"{self.version:>7}  {self.sha256 or '':.12}  {self.precision:<9}  {accuracy:>8}"


@dataclass(frozen=True)
class Listing:
    """Every version of a model, the oldest first."""

    name: str
    versions: tuple[Version, ...]
    served: int | None  # by our server at this moment; None where none runs

    def __str__(self) -> str:
        header = f"{'version':>7}  {'sha256':<12}  {'precision':<9}  {'accuracy':>8}"
        lines = [f"{one}  {self._marks(one)}".rstrip() for one in self.versions]
        return Lines(self.name, header, *lines)

    def _marks(self, one: Version) -> str:
        marks = {
            "selected": one.is_selected,
            "previous": one.is_previous,
            "served": one.version == self.served,
        }
        return ", ".join(mark for mark, is_so in marks.items() if is_so)


@dataclass(frozen=True)
class Change:
    """What a promotion or a rollback did."""

    name: str
    version: int
    sha256: str
    before: int | None  # the version that was selected, or served, until now
    is_served: bool  # a server of ours answers with it; otherwise the next one that starts will

    def __str__(self) -> str:
        what = "is served" if self.is_served else "is selected: the next server serves it"
        before = "" if self.before in (None, self.version) else f"; before it {self.before}"
        return f"{self.name} version {self.version} (sha256 {self.sha256[:12]}) {what}{before}"


def list_versions(paths: Paths, served: int | None = None) -> Listing:
    """Every version of the model in the repository; `served` is what a server answers with."""
    config = config_pbtxt.read(paths.packaged / "config.pbtxt")
    found = tuple(_version(paths, number, config) for number in version_numbers(paths))
    return Listing(paths.name, found, served)


def _version(paths: Paths, number: int, config: config_pbtxt.ModelConfig) -> Version:
    marks = (number in config_pbtxt.selected(config), number == config_pbtxt.previous(config))
    try:
        manifest = _record(paths, number, paths.manifest)
        accuracy = _accuracy(paths, number, manifest)
    except PipelineError as error:
        return Version(number, None, None, None, *marks, str(error))
    digest = manifest["files"].get(paths.onnx.name)
    return Version(number, digest, str(manifest.get("precision")), accuracy, *marks)


def promote(paths: Paths, version: int) -> Change:
    """Select a version, after its files and digests were checked; a server is not asked.

    Raises PipelineError when there is none, CorruptError when a file changed, CheckFailedError
    when a config states another digest.
    """
    with locked(paths.lock):
        return select(paths, checked(paths, version))


def rollback(paths: Paths) -> Change:
    """Select the version that was selected before. Twice is there and back again."""
    with locked(paths.lock):
        return select(paths, checked(paths, previous(paths)))


def previous(paths: Paths) -> int:
    """The version that a rollback goes to; PipelineError when there is none."""
    number = config_pbtxt.previous(config_pbtxt.read(paths.packaged / "config.pbtxt"))
    if number is None or not (paths.packaged / str(number)).is_dir():
        raise PipelineError(
            f"{paths.name} has no version to go back to: 'pipeline versions list' shows those that "
            "'pipeline versions promote N' takes"
        )
    return number


def select(paths: Paths, release: Release) -> Change:
    """Let every config name this version, config.pbtxt last. The caller holds the lock."""
    before = max(
        config_pbtxt.selected(config_pbtxt.read(paths.packaged / "config.pbtxt")), default=None
    )
    for path in config_pbtxt.config_files(paths.packaged):
        message = config_pbtxt.read(path)
        config_pbtxt.select(message, release.version)
        write_bytes(path, config_pbtxt.to_text(message).encode())
    return Change(paths.name, release.version, release.sha256, before, is_served=False)


def prune(paths: Paths) -> list[int]:
    """Remove every version older than the selected one but the previous; return their numbers.

    Newer ones wait to be promoted. So the highest number stays, and none is given twice.
    """
    with locked(paths.lock):
        config = config_pbtxt.read(paths.packaged / "config.pbtxt")
        selected = config_pbtxt.selected(config)
        if not selected:
            raise PipelineError(f"{paths.name} selects no version, so none is known to be old")
        server = serving(paths)
        kept = {config_pbtxt.previous(config), server.models[paths.name] if server else None}
        gone = [n for n in version_numbers(paths) if n < min(selected) and n not in kept]
        for number in gone:
            _remove(paths.packaged / str(number))
        for path in config_pbtxt.config_files(paths.packaged) if gone else []:
            message = config_pbtxt.read(path)
            for number in gone:
                for key in config_pbtxt.statements(message):
                    if key.endswith(f".{number}"):
                        message.parameters.pop(key)
            write_bytes(path, config_pbtxt.to_text(message).encode())
        return gone


def _remove(folder: Path) -> None:
    """Remove a version: at once for whoever looks, as it was added."""
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    os.rename(folder, hidden)
    remove(hidden)


def require_right(release: Release) -> None:
    """Raise CheckFailedError unless ONNX Runtime answers a version's golden set rightly."""
    from pipeline.export.runtime import onnx_predictor  # commands that ask no model need it not

    agreement = compare(release.golden, onnx_predictor(release.onnx), GOLDEN_BATCHES)
    require(agreement, f"version {release.version} answers wrongly", REPACKAGE)


@dataclass(frozen=True)
class Difference:
    """What two versions say differently, and how far their answers lie apart."""

    name: str
    first: int
    second: int
    records: dict[str, tuple[Any, Any]]  # by the path in the manifest, and the accuracy
    images: int  # both golden sets', which the answers are about
    differing: int  # images whose class differs
    max_abs_diff: float  # over all outputs

    def __str__(self) -> str:
        lines = [f"{self.name} version {self.first} -> {self.second}"]
        lines += [f"{key}: {one} -> {other}" for key, (one, other) in self.records.items()]
        return Lines(
            *lines,
            f"answers to {self.images} golden images: {self.differing} differing classes, "
            f"largest difference {self.max_abs_diff:.2e}",
        )


def difference(paths: Paths, first: int, second: int) -> Difference:
    """How two versions differ, by their records and by their answers to both golden sets."""
    from pipeline.export.runtime import onnx_predictor  # only this command needs it

    releases = [load_release(paths, number) for number in (first, second)]
    said = [_said(paths, release) for release in releases]
    keys = sorted({*said[0], *said[1]})
    records = {key: (said[0].get(key), said[1].get(key)) for key in keys}
    images = np.concatenate([release.golden.images for release in releases])  # (N, ...)
    answers = [onnx_predictor(release.onnx)(images) for release in releases]
    between = judge(answers[0], answers[1])
    return Difference(
        paths.name,
        first,
        second,
        {key: pair for key, pair in records.items() if pair[0] != pair[1]},
        len(images),
        int(between.is_changed.sum()),
        float(between.errors.max()),
    )


def _said(paths: Paths, release: Release) -> dict[str, Any]:
    accuracy = _accuracy(paths, release.version, release.manifest)
    return {"accuracy": accuracy, **_flattened(release.manifest)}


def _flattened(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The record's leaves, each by its path."""
    leaves: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        leaves |= _flattened(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return leaves


def _record(paths: Paths, number: int, file: Path) -> dict[str, Any]:
    return read_json(paths.packaged / str(number) / file.name, REPACKAGE)


def _accuracy(paths: Paths, number: int, manifest: Mapping[str, Any]) -> float | None:
    record = _record(paths, number, paths.validation)
    found = [v for v in record.get("variants", ()) if v["precision"] == manifest.get("precision")]
    return float(found[0]["accuracy"]) if found and record.get("is_labelled") else None

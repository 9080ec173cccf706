"""Rebuild of a release: train and export again from its manifest, and compare the bytes."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from pipeline.core.errors import CheckFailedError, CorruptError, PipelineError
from pipeline.core.files import check_digest, read_json
from pipeline.core.paths import Paths, data_name
from pipeline.core.text import Lines, columns
from pipeline.data.splits import digests
from pipeline.export import graph
from pipeline.export.export import Say, export_run
from pipeline.export.targets import ExportConfig
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.recipes import TrainConfig
from pipeline.training.run import train_run

# Entries of a manifest that may explain other bytes: values, or tables of them.
_FACTS = ("weights_sha256", "source_commit", "exporter", "versions", "opset", "ir_version")
_TABLES = ("training", "data_sha256", "environment")
_COPY = "get an intact copy of the release"


@dataclass(frozen=True)
class Rebuild:
    """A rebuild of a release: its files, and what differs between the two manifests."""

    release: str  # the path of its folder or manifest
    files: dict[str, tuple[str, str]]  # SHA-256 by file: recorded, and of the rebuilt file
    differences: dict[str, tuple[Any, Any]]  # facts: recorded, and of this rebuild
    seconds: float

    @property
    def is_equal(self) -> bool:
        return all(recorded == rebuilt for recorded, rebuilt in self.files.values())

    def __str__(self) -> Lines:
        lines: list[object] = [
            f"{name}: equal, sha256 {new}"
            if old == new
            else f"{name}: not equal, sha256 {old[:12]} recorded, {new[:12]} here"
            for name, (old, new) in self.files.items()
        ]
        if self.differences:
            cells = [(name, *map(str, pair)) for name, pair in self.differences.items()]
            lines += ["", columns(("what differs", "recorded", "here"), cells, "lll")]
        return Lines(*lines, f"trained and exported in {self.seconds:,.0f} s")

    def require_equal(self) -> None:
        """Raise CheckFailedError, which names the facts that differ, unless all bytes are equal."""
        if self.is_equal:
            return
        results = ("weights_sha256", "test_accuracy")
        facts = ", ".join(name for name in self.differences if name not in results)
        cause = f"These facts differ: {facts}" if facts else "No recorded fact differs"
        raise CheckFailedError(f"{self.release} was not rebuilt to the byte. {cause}")


def rebuild_release(
    paths: Paths,
    release: Path,
    report: Say = lambda line: None,
    update: Callable[[object], None] = lambda line: None,
) -> Rebuild:
    """Train and export again in a temporary folder, as the manifest of a release records.

    `release` is the folder of a version or an export, or a manifest. The data sets, and the run
    that a fine-tuned release started from, are those of `paths`. Raises PipelineError when a
    third-party module was exported, CheckFailedError when the data, that run's weights or what the
    released file states about its training are not as recorded, and CorruptError when a released
    file does not match its digest.
    """
    start, threads = time.monotonic(), torch.get_num_threads()
    path = release / paths.manifest.name if release.is_dir() else release
    manifest = read_json(path, "give the folder of a version or an export, or its manifest.json")
    if "training" not in manifest:
        raise PipelineError(f"{path} records no training: only a run's release can be rebuilt")
    try:
        config = TrainConfig.from_record(manifest["training"])
        export = ExportConfig(manifest["opset"], manifest["ir_version"])
        precision = manifest.get("precision")  # of a version, which has one file
        precisions = [precision] if precision else manifest["precisions"]
        names = {each: paths.variant("fp32" if precision else each).name for each in precisions}
        recorded = {name: str(manifest["files"][name]) for name in names.values()}
        facts, data = _list_facts(manifest), dict(manifest["data_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path} is damaged ({error!r}): {_COPY}") from error
    for name, digest in recorded.items():
        if (file := path.with_name(name)).exists():  # not next to a manifest alone
            model = graph.parse(check_digest(file, digest, _COPY), str(file))
            _check_training(path, config, model)
    present = digests(config.dataset, paths.data(config.dataset))
    for key, (digest, other) in _compare(data, present).items():
        raise CheckFailedError(
            f"the data differ from those of {path}: {key} has digest {str(other)[:12]}, not "
            f"{digest[:12]}. Fetch the data set that the release was trained on"
        )
    origin = paths.of_run(config.init or paths.run)
    if config.init:
        weights, wanted = load_checkpoint(origin).summary.weights_sha256, config.init_sha256
        if weights != wanted:
            raise CheckFailedError(
                f"{path} was fine-tuned from other weights: those of run {config.init} have digest "
                f"{weights[:12]} here, not {wanted[:12]}. Copy that run to {origin.run_folder}"
            )
    with tempfile.TemporaryDirectory(prefix="pipeline-rebuild-") as folder:
        scratch = Paths(Path(folder), data_folder=paths.data(config.dataset).parent)
        if config.init:
            scratch = scratch.of_run(f"{config.init}-rebuilt")  # no run starts from itself
            scratch.runs.mkdir()
            scratch.of_run(config.init).run_folder.symlink_to(origin.run_folder.resolve())
        torch.set_num_threads(facts.get("threads") or threads)
        try:
            train_run(scratch, config, report=report, on_epoch=update, on_step=update)
            export_run(scratch, export, ["fp32", *precisions], report)
        finally:
            torch.set_num_threads(threads)
        rebuilt = read_json(scratch.manifest, _COPY)
        files = {
            name: (recorded[name], rebuilt["files"][scratch.variant(each).name])
            for each, name in names.items()
        }
    differences = _compare(facts, _list_facts(rebuilt))
    return Rebuild(str(release), files, differences, time.monotonic() - start)


def _list_facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest records about how its files were made, in one flat table."""
    facts: dict[str, Any] = {name: manifest.get(name) for name in _FACTS}
    facts["test_accuracy"] = manifest["metrics"]["test_accuracy"]
    for name in _TABLES:
        facts |= manifest.get(name) or {}
    facts |= facts.pop("settings")
    return facts


def _compare(recorded: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the recorded values that differ from those found; what is not recorded is left out."""
    return {
        name: (value, found.get(name))
        for name, value in recorded.items()
        if value is not None and value != found.get(name)
    }


def _check_training(path: Path, config: TrainConfig, model: onnx.ModelProto) -> None:
    """Raise CheckFailedError if a released file states another training than its manifest."""
    stated = json.loads(graph.metadata(model).get("training", '{"settings": {}}'))
    ours = {**config.record(), "dataset": data_name(config.dataset)}
    stated, ours = (each | each.pop("settings") for each in (stated, ours))
    for key, (value, other) in _compare(stated, ours).items():
        raise CheckFailedError(
            f"{path} records another training than the file of the model next to it: {key} "
            f"{other!r}, not {value!r}"
        )

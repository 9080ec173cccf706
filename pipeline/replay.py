"""Replay a release's proof against servers that run: golden sets, and rows of agreement."""

# Shape letters: N images, K classes.

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import triton
from pipeline.client import Client
from pipeline.errors import CheckFailedError, CorruptError, PipelineError
from pipeline.evaluate import Predictor, difference, predict, score
from pipeline.files import check_digest, check_manifest, read_json, refuse_shared
from pipeline.golden import Agreement, Golden, compare, unpack_golden
from pipeline.paths import Paths
from pipeline.query import triton_predictor
from pipeline.text import Lines

TABLE_BATCH = 64  # images a request in the agreement table
GOLDEN_BATCHES = (1, 2, 7)  # at which a server is asked the golden set
REPACKAGE = "package it again with 'pipeline package'"


@dataclass(frozen=True)
class Row:
    """One predictor in the table of agreement, beside the reference in its first row."""

    name: str
    accuracy: float  # fraction of images, 0 to 1
    differing: int  # images whose class differs from the reference's
    max_abs_diff: float | None  # from the reference's log-probabilities; None: not finite
    images_per_second: float | None  # in batches of 64, one after the other; None: not run

    def __str__(self) -> str:
        apart = "not finite" if self.max_abs_diff is None else f"{self.max_abs_diff:.2e}"
        speed = "recorded" if self.images_per_second is None else f"{self.images_per_second:,.0f}"
        return f"{self.name:<24} {self.accuracy:>8.2%} {self.differing:>9} {apart:>12} {speed:>10}"


@dataclass(frozen=True)
class Table:
    """How the predictors of one model agree on the same images."""

    name: str
    version: int
    sha256: str | None  # of its model.onnx
    images: int
    split: str  # which images: test or golden
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        title = f"{self.name} version {self.version}{digest}: {self.images:,} {self.split} images"
        header = f"{'':<24} {'accuracy':>8} {'differing':>9} {'max |diff|':>12} {'images/s':>10}"
        return Lines(title, header, *self.rows)


def agree(
    predictors: Mapping[str, Predictor],
    images: np.ndarray,
    labels: np.ndarray,
    recorded: np.ndarray | None = None,
) -> tuple[Row, ...]:
    """A row for each predictor on images (N, ...), held against the first one.

    Where answers (N, K) were `recorded`, they are the reference and the first row.
    """
    rows = [] if recorded is None else [_row("golden set", recorded, recorded, labels, None)]
    reference = recorded
    for name, predictor in predictors.items():
        predictor(images[:TABLE_BATCH])  # the first call of a runtime is not its speed
        start = time.perf_counter()
        outputs = predict(predictor, images, TABLE_BATCH)
        seconds = time.perf_counter() - start
        reference = outputs if reference is None else reference
        rows.append(_row(name, outputs, reference, labels, seconds))
    return tuple(rows)


def _row(
    name: str,
    outputs: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray,
    seconds: float | None,
) -> Row:
    if outputs.shape != reference.shape:
        raise CheckFailedError(f"{name} answers {outputs.shape} instead of {reference.shape}")
    apart = difference(reference, outputs)
    known = apart.max_abs_diff if np.isfinite(apart.max_abs_diff) else None
    speed = None if seconds is None else len(labels) / seconds
    return Row(name, score(outputs, labels).accuracy, apart.differing, known, speed)


@dataclass(frozen=True)
class Limits:
    """How far a served answer may lie from the first row of its table."""

    max_abs_diff: float
    differing: int  # images whose class may differ


def require_agreement(table: Table, limits: Limits) -> None:
    """Raise CheckFailedError when a row lies too far from the first."""
    wrong = [
        f"{row.name}: {row.differing} differing classes, largest difference {row.max_abs_diff}"
        for row in table.rows
        if row.differing > limits.differing
        or row.max_abs_diff is None
        or row.max_abs_diff > limits.max_abs_diff
    ]
    if wrong:
        raise CheckFailedError(
            f"{table.name}: answers differ from the reference ({table.rows[0].name}) beyond "
            f"{limits.max_abs_diff:.3g} or in more than {limits.differing} classes: "
            f"{'; '.join(wrong)}"
        )


def replay_golden(client: Client, golden: Golden) -> Agreement:
    """How far a server lies from the golden set's answers, at batch sizes that it takes."""
    largest = max(1, client.config().max_batch_size)
    sizes = tuple(size for size in GOLDEN_BATCHES if size <= largest)
    return compare(golden, triton_predictor(client), sizes)


@dataclass(frozen=True)
class Release:
    """A packaged version with the proof that it carries."""

    folder: Path
    version: int
    sha256: str  # of its model.onnx
    onnx: bytes
    golden: Golden
    manifest: dict[str, Any]
    limits: Limits  # as proven, against eager float32 on the test split


def load_release(paths: Paths, version: int) -> Release:
    """A version of a packaged model, every file checked against its manifest.

    Raises PipelineError when there is none and CorruptError when a file changed.
    """
    folder = paths.packaged / str(version)
    if not folder.is_dir():
        raise PipelineError(f"no version {version} at {folder}: package it, or give --golden FILE")
    manifest = check_manifest(folder, REPACKAGE)
    digests = manifest["files"]
    onnx = check_digest(folder / paths.onnx.name, digests.get(paths.onnx.name), REPACKAGE)
    golden_path = folder / paths.golden.name
    golden = check_digest(golden_path, digests.get(paths.golden.name), REPACKAGE)
    digest = digests[paths.onnx.name]
    return Release(
        folder,
        version,
        digest,
        onnx,
        unpack_golden(golden, str(golden_path)),
        manifest,
        _limits(folder / paths.validation.name, str(manifest.get("precision"))),
    )


def _limits(path: Path, precision: str) -> Limits:
    """What the validation record grants the file of that precision."""
    record = read_json(path, REPACKAGE)
    for entry in record.get("variants", ()):
        if entry["precision"] == precision:
            return Limits(entry["allowed_error"], entry["allowed_flips"])
    raise CorruptError(f"{path} does not speak of the {precision} file beside it: {REPACKAGE}")


def selected_releases(paths: Paths, profile: str = "") -> dict[str, Release]:
    """The release of each model in the repository that its config selects, all of it intact.

    With a profile, its config in place of config.pbtxt. Raises CheckFailedError when a config
    states another digest than the version's file has, and when anybody may change the repository.
    """
    configs = sorted(paths.repository.glob("*/config.pbtxt"))
    if not configs:
        raise PipelineError(f"no model in {paths.repository}: run 'pipeline package' first")
    refuse_shared(paths.repository, [path.parent for path in configs])
    releases = {}
    for folder in [path.parent for path in configs]:
        path, model = triton.profile_file(folder, profile), replace(paths, name=folder.name)
        config = triton.read(path)
        _refuse_foreign(folder, config)
        versions = triton.selected(config)
        if not versions:
            raise CheckFailedError(f"{path} selects no version: {REPACKAGE}")
        release = load_release(model, max(versions))
        stated = triton.digest(config, str(release.version))
        if stated != release.sha256:
            raise CheckFailedError(
                f"{path} states digest {str(stated)[:12]} for version {release.version}, whose "
                f"model.onnx has {release.sha256[:12]}: {REPACKAGE}"
            )
        releases[model.name] = release
    return releases


def _refuse_foreign(folder: Path, config: triton.ModelConfig) -> None:
    """Raise PipelineError for a model that nothing says we packaged."""
    is_stated = any(key.startswith("sha256.") for key in config.parameters)
    if not is_stated and not any(folder.glob("*/manifest.json")):
        onnx = next(iter(sorted(folder.glob("*/*.onnx"))), folder / "1" / "model.onnx")
        raise PipelineError(
            f"{folder} carries no proof, since 'pipeline package' did not write it. Prove the file "
            f"and package it: pipeline validate --onnx {shlex.quote(str(onnx))} --module "
            "package.module:factory --images FILE.npz; or serve it unproven: tritonserver "
            f"--model-repository={shlex.quote(str(folder.parent))}"
        )


def served_version(client: Client) -> int:
    """The version of the model that answers, by an inference on one blank image."""
    images = client.config().input[0]
    if any(dim < 1 for dim in images.dims):
        raise PipelineError(f"{client.name} at {client.endpoint} takes images of no fixed shape")
    answer = client.infer(np.zeros((1, *images.dims), triton.dtype(images)))[1]
    return int(answer) if answer.isdigit() else 0

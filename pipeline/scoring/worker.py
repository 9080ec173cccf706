"""Work of Ray's workers on a shard: read the images, classify them, write the answers as Parquet.

Also the job's folder: its record, and the counts in the files of its shards.
"""

# Shape letters: N images, C channels, H height, W width, K classes.

import functools
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from pipeline.client.prediction import probabilities
from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import Predictor, predict
from pipeline.core.files import check_digest, clear_temporary, read_json, write_json, write_with
from pipeline.core.paths import Paths
from pipeline.core.strings import WIDTH, Reading, search
from pipeline.export.runtime import onnx_predictor
from pipeline.repository import config_pbtxt
from pipeline.repository.release import check_release, require_selected
from pipeline.scoring.parquet import NO_ID, Rows
from pipeline.scoring.settings import ScoreConfig
from pipeline.scoring.source import Cut, read_shard

COUNTS = ("rejected", "unsure")  # keys in the metadata of a file of answers
HASHES_AT_ONCE = 2**24  # of ids in memory: 128 MiB
REJECTED = pa.schema([("id", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class ScoringModel:
    """The version of a packaged model that its config selects, and the kind of its outputs."""

    name: str
    version: str
    path: str  # the model's file, which workers read
    digest: str  # SHA-256 of that file
    classes: tuple[str, ...]
    kind: str  # of its outputs: see config_pbtxt.kind
    pictures: str  # how a picture is converted to its input: see signature.pictures_of
    shape: tuple[int, ...]  # (C, H, W)
    min_probability: float | None  # below it an answer is not sure


def read_selected_model(paths: Paths) -> ScoringModel:
    """Check the files and digests of the packaged model's selected version; return it.

    Raises PipelineError when a check fails, or when the model takes neither batches of uint8 images
    of one size nor pictures.
    """
    path = paths.packaged / config_pbtxt.CONFIG
    config = config_pbtxt.read(path)
    release = check_release(paths, require_selected(path, config))
    images = config.input[0]
    shape = tuple(images.dims)
    is_plain = config_pbtxt.dtype(images) == "uint8" or "=" in config_pbtxt.pictures(config)
    if not is_plain or min(shape) < 1 or not config.max_batch_size:
        fix = "export it with --picture, to score pictures"
        raise PipelineError(f"{paths.name} takes no batches of uint8 images of one size: {fix}")
    return ScoringModel(
        name=paths.name,
        version=str(release.version),
        path=os.path.abspath(release.folder / paths.onnx.name),
        digest=release.sha256,
        classes=config_pbtxt.classes(config),
        kind=config_pbtxt.kind(config),
        pictures=config_pbtxt.pictures(config),
        shape=shape,
        min_probability=config_pbtxt.min_probability(config),
    )


@dataclass(frozen=True)
class Counts:
    """Counts of scored, rejected and unsure images, of a shard or of all."""

    scored: int = 0
    rejected: int = 0
    unsure: int = 0  # of those scored

    @property
    def images(self) -> int:
        """Number of all images."""
        return self.scored + self.rejected

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.scored + other.scored, self.rejected + other.rejected, self.unsure + other.unsure
        )


class Folder:
    """The files of a job. Readers of the result skip names that begin with '_' or '.'."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job, self.lock = path / "_job.json", path / "_lock"
        self.unpacked, self.rejected_folder = path / "_unpacked", path / "_rejected"

    def part(self, index: int) -> Path:
        return self.path / f"part-{index:06}.parquet"

    def rejected(self, index: int) -> Path:
        return self.rejected_folder / f"part-{index:06}.parquet"


def begin_job(folder: Folder, record: Mapping[str, Any]) -> None:
    """Record the job in its folder, or check that the folder holds this job.

    The caller holds the lock. Raises PipelineError when the folder holds another job or any other
    files.
    """
    for below in (folder.path, folder.rejected_folder):
        clear_temporary(below)
    fix = f"Choose another --output, or remove {folder.path} to start again"
    if not folder.job.exists():
        if set(folder.path.iterdir()) - {folder.lock, folder.unpacked}:
            raise PipelineError(f"{folder.path} holds other files, but no scoring job. {fix}")
        write_json(folder.job, record)
        return
    before = read_json(folder.job, fix)
    for key, value in record.items():
        if before.get(key) != value:
            change = f"its {key} is {before.get(key)}, not {value}"
            raise PipelineError(f"{folder.path} holds another job: {change}. {fix}")


def read_counts(folder: Folder, index: int, rows: int) -> Counts | None:
    """Read the counts of a shard of `rows` rows from its files; None if they are incomplete."""
    try:
        metadata = pq.read_metadata(folder.part(index))
        stated = metadata.metadata
        counts = Counts(metadata.num_rows, *(int(stated[name.encode()]) for name in COUNTS))
        if counts.rejected and pq.read_metadata(folder.rejected(index)).num_rows != counts.rejected:
            return None
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError):
        return None
    return counts if counts.images == rows else None


def count_repeated_ids(folder: Folder, parts: Sequence[int], rows: int) -> int:
    """Count the ids that occur more than once in these parts' `rows` answers, by 64-bit hashes.

    If there are many answers, the parts are read several times, each time for another share of the
    ids, so that memory stays bounded.
    """
    repeated, passes = 0, -(-rows // HASHES_AT_ONCE)
    for turn in range(passes):
        shares = [np.zeros(0, np.uint64)]
        for index in parts:
            with pq.ParquetFile(folder.part(index)) as file:
                ids = file.read(["id"])["id"]
            if pa.types.is_integer(ids.type):  # different integers have different hashes
                numbers = ids.to_numpy().astype(np.uint64)
            else:
                numbers = np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))
            # Multiply by an odd number, so that the high bits vary as well.
            hashes = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            shares.append(hashes[(hashes >> np.uint64(40)) % np.uint64(passes) == turn])
        _, counts = np.unique(np.concatenate(shares), return_counts=True)
        repeated += int(np.count_nonzero(counts > 1))
    return repeated


def score_rows(
    rows: Rows, model: ScoringModel, predictor: Predictor, config: ScoreConfig
) -> tuple[pa.Table, pa.Table, Counts]:
    """Classify the rows; return the tables of answers and of rejected rows, and their counts."""
    reasons = rows.reasons.copy()
    valid = np.flatnonzero(reasons == "")
    images = rows.images if len(valid) == len(rows.images) else rows.images[valid]
    outputs = np.zeros((0, max(1, len(model.classes))), np.float32)
    if len(valid):
        outputs = predict(predictor, images, config.batch_size)
    is_finite = np.isfinite(outputs).all(axis=tuple(range(1, outputs.ndim)))
    reasons[valid[~is_finite]] = "the model's answer is not finite"
    table, unsure = _make_answers(rows.ids[valid[is_finite]], outputs[is_finite], model, config.top)
    bad = np.flatnonzero(reasons != "")
    ids = [  # a row without an id gets its number
        f"row {key}" if reason == NO_ID and not isinstance(key, str) else str(key)
        for key, reason in zip(rows.ids[bad], reasons[bad], strict=True)
    ]
    rejected = pa.table({"id": ids, "reason": reasons[bad].tolist()}, REJECTED)
    return table, rejected, Counts(len(table), len(bad), unsure)


def _make_answers(
    ids: np.ndarray, outputs: np.ndarray, model: ScoringModel, top: int
) -> tuple[pa.Table, int]:
    """Return a table with a row for each output, and the number of unsure rows."""
    count = len(outputs)
    labels, chances = _rank_answers(outputs, model, top)
    sure = pa.nulls(count, pa.bool_())
    if model.min_probability is not None:
        sure = pa.array((chances[:, :1] >= model.min_probability).ravel())
    ranked = pa.StructArray.from_arrays(
        [pa.array(labels.ravel(), pa.string()), pa.array(chances.ravel().astype(np.float32))],
        ["label", "probability"],
    )
    kind = {"i": pa.int64(), "u": pa.uint64()}.get(ids.dtype.kind, pa.string())
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * labels.shape[1])
    table = pa.table(
        {
            "id": pa.array(ids, kind),
            "label": pa.array(labels[:, 0], pa.string()),
            "probability": pa.array(chances[:, 0].astype(np.float32)),
            "top": pa.ListArray.from_arrays(offsets, ranked),
            "sure": sure,
            "version": pa.repeat(pa.scalar(model.version), count),
            "digest": pa.repeat(pa.scalar(model.digest), count),
        }
    )
    return table, sure.false_count


def _rank_answers(
    outputs: np.ndarray, model: ScoringModel, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest answers to each output and their probabilities, (N, top) each."""
    if outputs.ndim == 3:
        none = [Reading("", 0.0)] * top  # where there are not as many
        ranked = [[*readings, *none][:top] for readings in search(outputs, max(WIDTH, top))]
        texts = np.array([[reading.text for reading in strip] for strip in ranked], object)
        return texts, np.array([[reading.probability for reading in strip] for strip in ranked])
    classes = outputs.shape[1]
    # If the config names too few classes, the others are called by their index.
    names = [*model.classes[:classes], *map(str, range(len(model.classes), classes))]
    order = np.argsort(-outputs, axis=1, kind="stable")[:, :top]  # (N, top)
    chances = np.take_along_axis(probabilities(outputs, model.kind), order, axis=1)
    return np.array(names, object)[order], chances


def write(folder: Folder, index: int, table: pa.Table, rejected: pa.Table, counts: Counts) -> None:
    """Write the files of a shard; the file of answers is last and marks the shard as complete."""
    if len(rejected):
        write_with(folder.rejected(index), functools.partial(pq.write_table, rejected))
    table = table.replace_schema_metadata({name: str(getattr(counts, name)) for name in COUNTS})
    write_with(folder.part(index), functools.partial(pq.write_table, table))


@dataclass(frozen=True)
class Reader:
    """Reader of shards; Ray passes its result on as arrays of one length."""

    source: Cut

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        begun = time.time()
        shard = pickle.loads(batch["shard"][0])
        try:
            rows = read_shard(self.source, shard)
        except (PipelineError, OSError) as error:
            return _error_row(error, self.source.path)
        return {
            "shard": np.full(shard.rows, shard.index),
            "begun": np.full(shard.rows, begun),
            "id": rows.ids,
            "image": rows.images,
            "reason": rows.reasons,
        }


class Scorer:
    """A worker: a session with one thread, which classifies shards and writes the answers."""

    def __init__(self, model: ScoringModel, folder: Folder, config: ScoreConfig) -> None:
        self.model, self.folder, self.config = model, folder, config
        self.predictor: Predictor | PipelineError  # the error is reported with the first shard
        try:
            content = check_digest(Path(model.path), model.digest, "run the same command again")
            self.predictor = onnx_predictor(content, threads=1, provider=config.provider)
        except PipelineError as error:
            self.predictor = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the answers to a shard; return the number of its images and the times."""
        if "failed" in batch:
            return batch
        if isinstance(self.predictor, PipelineError):
            return _error_row(self.predictor, self.model.path)
        index, begun = int(batch["shard"][0]), float(batch["begun"][0])
        rows = Rows(batch["id"], batch["image"], batch["reason"])
        try:
            scored = score_rows(rows, self.model, self.predictor, self.config)
            write(self.folder, index, *scored)
        except (PipelineError, OSError) as error:
            return _error_row(error, str(self.folder.path))
        return _report_row(len(rows.ids), begun, time.time())


def _error_row(error: PipelineError | OSError, path: str) -> dict[str, np.ndarray]:
    """Return an error for the user as a row: Ray would wrap an exception in one of its own.

    `path` is what was read or written, used for an OSError that does not name its file.
    """
    if isinstance(error, OSError):
        file, reason = error.filename or path, error.strerror or error
        error = PipelineError(f"a worker cannot use {file} ({reason}): run the command again")
    return _report_row(0, 0.0, 0.0, pickle.dumps(error))


def _report_row(
    images: int, begun: float, ended: float, failed: bytes = b""
) -> dict[str, np.ndarray]:
    counts = {"images": images, "begun": begun, "ended": ended}
    row = {name: np.array([count]) for name, count in counts.items()}
    return {**row, "failed": np.array([failed], object)}

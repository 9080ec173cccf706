"""Splits in memory: images and labels, read from cached files whose digests are checked."""

import math
import shlex
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import check_digest, read_json, remove, write_bytes, write_json
from pipeline.core.paths import FOLDER, JOINED, data_name, list_names
from pipeline.core.signature import IMAGES, STRIPS, TEXT_LENGTH
from pipeline.core.strings import to_texts
from pipeline.data.catalog import DATASETS, DEFAULT_DATASET, NAMES, DataFile, Dataset

# Shape letters: N images.

Report = Callable[[str], None]
RECORD = "dataset.json"  # next to the files of a data set that has no published digests
# Of the training images of MNIST joined with a folder, the share that the folder's are repeated to.
OWN_SHARE = 0.1


def find_dataset(name: str, folder: Path | None = None) -> Dataset:
    """Return the data set called `name`; raise PipelineError that lists them if it is unknown.

    A data set without published digests is read from `dataset.json` in `folder`, its cache. For
    MNIST joined with a folder, that is the folder's part.
    """
    if name not in DATASETS and not name.startswith((FOLDER, JOINED)):
        choices = list_names(name, [*DATASETS, f"{FOLDER}PATH", f"{JOINED}PATH"])
        raise PipelineError(f"{name!r} is not a data set: {choices}")
    row = DATASETS.get(name)
    if row and not (row.downloads or row.made_of):
        return row
    folder, fix = folder or Path("data") / data_name(name), fetch_command(name)
    path = folder / RECORD
    if not (path.exists() or row or Path(name.partition(FOLDER)[2]).is_dir()):
        cached = sorted(file.parent.name for file in folder.parent.glob(f"*/{NAMES[0]}"))
        raise PipelineError(
            f"{name} is not a folder; {list_names(folder.name, cached)} in the cache"
        )
    record = read_json(path, fix)
    if (source := record.get("source")) != name:
        fix = f"rename one of the two folders, or remove {folder} and {fix}"
        raise PipelineError(f"{folder} holds {source}, a folder of the same name as {name}: {fix}")
    try:
        files = tuple(DataFile(file, **record["files"][file]) for file in NAMES)
        classes, validation = tuple(map(str, record["classes"])), int(record["validation"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path} is not a record of a data set: {fix}") from error
    return Dataset(classes, files, validation=validation, made_of=row.made_of if row else "")


def fetch_command(dataset: str, *options: str) -> str:
    """Return the command that fetches the data set, for use in a message."""
    option = () if dataset == DEFAULT_DATASET else ("--dataset", shlex.quote(dataset))
    return f"run '{' '.join(('pipeline data fetch', *option, *options))}'"


def record_dataset(
    folder: Path,
    source: str,
    classes: tuple[str, ...],
    arrays: Mapping[str, np.ndarray],
    validation: int,
    details: Mapping[str, Any],
) -> None:
    """Write the four uint8 arrays as IDX files, and `dataset.json` with their digests last.

    A reader during the write finds no record, and reports that the data set must be fetched.
    """
    remove(folder / RECORD)
    files = {}
    for name, array in arrays.items():
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        sha256 = write_bytes(folder / name, header + array.astype(np.uint8).tobytes())
        files[name] = {"sha256": sha256, "size": (folder / name).stat().st_size}
    record = {"source": source, "classes": classes, "files": files, "validation": validation}
    write_json(folder / RECORD, {**record, **details})


@dataclass(frozen=True)
class Split:
    """Images and labels in memory, with the names of the classes."""

    images: np.ndarray  # uint8 (N, 1, 28, 28): 0 is paper, 255 is ink; strips (N, 1, 28, 280)
    labels: np.ndarray  # int64 (N,); texts of strips, str (N,)
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


def find_base(dataset: str) -> str:
    """Return the data set that this one contains, or is made of; empty if there is none."""
    if dataset.startswith(JOINED):
        return "mnist"
    return DATASETS[dataset].made_of if dataset in DATASETS else ""


def digests(dataset: str, folder: Path | None = None) -> dict[str, str]:
    """Return the SHA-256 that each file of the data set must have; `folder` is its cache.

    The names of files in another cache are relative to `folder`.
    """
    files = {file.name: file.sha256 for file in find_dataset(dataset, folder).files}
    base = find_base(dataset)
    of_base = digests(base) if base else {}
    return {f"../{base}/{name}": digest for name, digest in of_base.items()} | files


def verify(dataset: str, folder: Path) -> dict[str, str]:
    """Check the length and digest of each cached file; return their SHA-256 by file name.

    Raises PipelineError when a file is missing and CorruptError when its content is wrong.
    """
    if base := find_base(dataset):
        verify(base, folder.parent / base)
    for file in find_dataset(dataset, folder).files:
        read_cached(folder, file, fetch_command(dataset))
    return digests(dataset, folder)


def is_intact(dataset: str, folder: Path, report: Report) -> bool:
    """Return whether the cached files match their digests; report what is wrong if not."""
    try:
        verify(dataset, folder)
    except PipelineError as error:
        report(str(error))
        return False
    return True


def read_cached(folder: Path, file: DataFile, fix: str) -> bytes:
    """Read a cached file; raise CorruptError unless its length and digest are correct."""
    path = folder / file.name
    if path.is_file() and (size := path.stat().st_size) != file.size:  # before the file is read
        raise CorruptError(f"{path} has {size} bytes instead of {file.size}: {fix}")
    return check_digest(path, file.sha256, fix)


def read_idx(content: bytes, path: Path, fix: str) -> np.ndarray:
    """Parse an IDX file's content into a uint8 array; raise CorruptError if it is invalid.

    The message names `path` and ends with `fix`, what the user has to do. Nothing is allocated
    before the header and the length of the content agree.
    """

    def corrupt(problem: str) -> CorruptError:
        return CorruptError(f"{path} is not an IDX file of bytes ({problem}): {fix}")

    if len(content) < 4 or content[:2] != b"\0\0":
        raise corrupt("its first two bytes are not 0")
    kind, dimensions = content[2:4]
    if kind != 0x08:  # unsigned bytes: these data sets use no other type
        raise corrupt(f"its values have type 0x{kind:02x}, not 0x08")
    start = 4 + 4 * dimensions
    if not 1 <= dimensions <= 4 or len(content) < start:
        raise corrupt(f"its header has {dimensions} dimensions in {len(content)} bytes")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) != start + math.prod(shape):
        stated = " x ".join(map(str, shape))
        raise corrupt(f"its header states {stated} bytes, it has {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def load_split(dataset: str, folder: Path, name: str) -> Split:
    """Load the split `name` (train, validation or test) from the cached files in `folder`.

    The digest is computed from the same bytes that become the split. Of MNIST joined with a folder,
    MNIST's images come first; the folder's are repeated in the training split if they are few. The
    training split of strips are the single digits that they are made of.
    Raises PipelineError when a file is missing and CorruptError when its content is wrong.
    """
    row = find_dataset(dataset, folder)
    if row.made_of and name == "train":
        return load_split(row.made_of, folder.parent / row.made_of, name)
    images_file, labels_file = files = row.files[2:] if name == "test" else row.files[:2]
    fix = fetch_command(dataset)
    images, labels = (
        read_idx(read_cached(folder, file, fix), folder / file.name, fix) for file in files
    )
    shape, of_label = (STRIPS.shape, (TEXT_LENGTH,)) if row.made_of else (IMAGES.shape, ())
    if images.shape[1:] != shape[1:] or labels.shape != (len(images), *of_label):
        names = f"{folder / images_file.name} and {labels_file.name}"
        shapes = f"{images.shape} and {labels.shape}"
        raise CorruptError(f"{names} have shapes that do not match, {shapes}: {fix}")
    if row.made_of:
        labels = to_texts(labels.astype(np.int8))
    elif (highest := int(labels.max(initial=0))) >= len(row.classes):
        path = folder / labels_file.name
        raise CorruptError(f"{path} has label {highest}, for {len(row.classes)} classes: {fix}")
    end = len(labels) - row.validation
    part = {"train": slice(end), "validation": slice(end, None), "test": slice(None)}[name]
    # A copy of the part, so that the rest of the file does not stay in memory.
    images, labels = images[part].copy()[:, np.newaxis], labels[part]
    labels = labels if row.made_of else labels.astype(np.int64)
    if dataset.startswith(JOINED):
        base = load_split("mnist", folder.parent / "mnist", name)
        if name == "train":
            times = max(1, round(OWN_SHARE / (1 - OWN_SHARE) * len(base) / max(1, len(labels))))
            images, labels = np.repeat(images, times, axis=0), np.repeat(labels, times)
        images = np.concatenate([base.images, images])
        labels = np.concatenate([base.labels, labels])
    return Split(images, labels, row.classes)  # images (N, 1, 28, 28)


def load_scored_split(
    training: Mapping[str, Any], sha256s: Mapping[str, str], folder: Path
) -> Split:
    """Load the test split that a run was scored on, from its recorded data set and digests.

    Raises PipelineError when the data set has been fetched again since, with other pictures.
    """
    dataset = training["dataset"]
    if sha256s != digests(dataset, folder):
        retrain = f"run 'pipeline train --dataset {shlex.quote(dataset)}' again"
        raise PipelineError(f"{folder} has changed since the model was trained: {retrain}")
    return load_split(dataset, folder, "test")

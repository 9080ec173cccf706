"""Data sets whose publishers give digests of the downloads only: KMNIST and the parts of EMNIST.

At the first fetch the content is checked, EMNIST's images are transposed to be upright, and the
SHA-256 of each file is recorded.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import locked, sha256
from pipeline.core.signature import IMAGES
from pipeline.data.catalog import DATASETS, NAMES, TRAIN_LABELS, Dataset, Download
from pipeline.data.fetch import UnusableError, download, gunzip
from pipeline.data.splits import RECORD, Report, fetch_command, is_intact, read_idx, record_dataset

# Shape letters: N images.

MAX_BYTES = 2**28  # of a file after decompression; EMNIST's largest has 188 million
VALIDATION_PART = 12  # a twelfth of the training file is the validation split, as in MNIST


def fetch_archives(
    dataset: str, folder: Path, source: Path | None = None, report: Report = lambda line: None
) -> Path:
    """Write the data set into `folder` as four IDX files with a record of digests; return `folder`.

    The files come from the folder `source` if given, else from the publisher's mirror. Raises
    PipelineError when a file is not available, and CorruptError when its content is wrong.
    """
    row = DATASETS[dataset]
    fix = fetch_command(dataset, "--from DIR")
    with locked(folder / ".lock"):
        if (folder / RECORD).exists() and is_intact(dataset, folder, report):
            report(f"{dataset}: already in {folder}, and matches its digests")
            return folder
        contents, is_published = _read_contents(row, source, fix, report)
        arrays = _parse_arrays(row, contents, fix)
        unpublished = "these files have no published digest: only their format is checked"
        report("the published MD5 matches" if is_published else unpublished)
        validation = max(1, len(arrays[TRAIN_LABELS]) // VALIDATION_PART)
        details = {
            "md5_checked": is_published,
            "fetched_sha256": {_source_name(row, name): sha256(contents[name]) for name in NAMES},
        }
        record_dataset(folder, dataset, row.classes, arrays, validation, details)
    report(f"{dataset}: {len(NAMES)} files in {folder}, their digests recorded in {RECORD}")
    return folder


def _source_name(row: Dataset, name: str) -> str:
    """Return the publisher's name for one of the four files."""
    return f"emnist-{row.emnist}-{name.replace('t10k', 'test')}" if row.emnist else name


def _read_contents(
    row: Dataset, source: Path | None, fix: str, report: Report
) -> tuple[dict[str, bytes], bool]:
    """Return the uncompressed content of the four files, and whether their MD5 was checked."""
    if source is None:
        return _unpack(row, lambda file: _from_mirror(row, file, fix, report), fix), True
    if not source.is_dir():
        raise PipelineError(f"{source} is not a folder: name one that has the data set's files")
    if all((source / file.name).is_file() for file in row.downloads):
        return _unpack(row, lambda file: _read(source / file.name, file.limit, fix), fix), True
    contents = {}
    for name in NAMES:
        path = source / _source_name(row, name)
        if not path.is_file():
            path = path.with_name(f"{path.name}.gz")
        if not path.is_file():
            raise PipelineError(f"{source} has neither {path.stem} nor {path.name}: {fix}")
        content = _read(path, MAX_BYTES, fix)
        is_packed = content[:2] == b"\x1f\x8b"
        contents[name] = _gunzip(content, str(path), fix) if is_packed else content
    return contents, False


def _read(path: Path, limit: int, fix: str) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CorruptError(f"{path} has more than {limit} bytes: {fix}")
    return content


def _from_mirror(row: Dataset, file: Download, fix: str, report: Report) -> bytes:
    for url in row.mirrors:
        report(f"downloading {url}{file.name}")
        try:
            return download(f"{url}{file.name}", file.limit)
        except OSError as error:
            report(f"{url}{file.name}: {error}")
    names = ", ".join(_source_name(row, name) for name in NAMES)
    downloads = ", ".join(file.name for file in row.downloads)
    fix = f"put {downloads}, or {names}, into a folder DIR and {fix}"
    raise PipelineError(f"cannot get {file.name} from {', '.join(row.mirrors)}: {fix}")


def _unpack(row: Dataset, read: Callable[[Download], bytes], fix: str) -> dict[str, bytes]:
    """Read the downloads, check their MD5, and return the content of the four files.

    Raises CorruptError when an MD5 is wrong or an archive cannot be unpacked.
    """
    packed: dict[str, bytes] = {}
    for file in row.downloads:
        content = read(file)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != file.md5:
            published = f"the published MD5 is {file.md5}"
            raise CorruptError(f"{file.name} has MD5 {md5}, {published}: get it again and {fix}")
        packed[file.name] = content
    names = {name: f"{_source_name(row, name)}.gz" for name in NAMES}
    if row.emnist:  # one archive has all parts of EMNIST
        (content,) = packed.values()
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for gz in names.values():
                    with archive.open(f"gzip/{gz}") as member:
                        packed[gz] = member.read(MAX_BYTES)
        except (zipfile.BadZipFile, KeyError, OSError, zlib.error) as error:
            raise CorruptError(f"the archive cannot be unpacked ({error}): {fix}") from error
    return {name: _gunzip(packed[gz], gz, fix) for name, gz in names.items()}


def _gunzip(content: bytes, name: str, fix: str) -> bytes:
    """Decompress gzip data; raise CorruptError if it exceeds the largest known file."""
    try:
        unpacked = gunzip(content, MAX_BYTES + 1)
    except UnusableError as error:
        raise CorruptError(f"{name} {error}: {fix}") from error
    if len(unpacked) > MAX_BYTES:
        raise CorruptError(f"{name} unpacks to more than {MAX_BYTES} bytes: {fix}")
    return unpacked


def _parse_arrays(row: Dataset, contents: Mapping[str, bytes], fix: str) -> dict[str, np.ndarray]:
    """Return the four arrays, checked: upright images (N, 28, 28), labels (N,) from 0.

    Raises CorruptError for wrong shapes, too few images, or labels out of range.
    """
    arrays = {name: read_idx(contents[name], Path(_source_name(row, name)), fix) for name in NAMES}
    first, last = row.first_label, row.first_label + len(row.classes) - 1
    for images, labels in (NAMES[:2], NAMES[2:]):
        count = len(arrays[labels])
        if arrays[labels].ndim != 1 or arrays[images].shape != (count, *IMAGES.shape[1:]):
            shapes = f"{arrays[images].shape} and {arrays[labels].shape}"
            name = _source_name(row, images)
            raise CorruptError(f"{name} and its labels have shapes that differ, {shapes}: {fix}")
        if count < 2:
            raise CorruptError(f"{_source_name(row, images)} has fewer than 2 images: {fix}")
        lowest, highest = int(arrays[labels].min()), int(arrays[labels].max())
        if lowest < first or highest > last:
            name = _source_name(row, labels)
            allowed = f"{first} to {last} are allowed"
            raise CorruptError(f"{name} has labels {lowest} to {highest}, {allowed}: {fix}")
        arrays[labels] = arrays[labels] - first
        if row.emnist:  # columns were written as rows
            arrays[images] = np.ascontiguousarray(arrays[images].transpose(0, 2, 1))
    return arrays

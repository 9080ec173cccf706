"""A source of many images, cut into shards: files of arrays, folders of pictures, Parquet."""

# Shape letters: N images, C channels, H height, W width.

import gzip
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import sha256, write_with
from pipeline.images.inputs import Source, escape_name, is_picture, list_sources, look
from pipeline.scoring import parquet
from pipeline.scoring.parquet import Columns, Rows, Shard

HEAD_BYTES = 64  # enough to recognize a file's format
PICTURES_A_SHARD = 512  # at most: reading a picture takes far longer than reading an array
KINDS = "Parquet (a file or a folder), IDX (also .gz), .npy of uint8, or a folder of pictures"
_IDX, _NPY, _GZIP, _PARQUET = b"\0\0\x08", b"\x93NUMPY", b"\x1f\x8b", b"PAR1"


@dataclass(frozen=True)
class Cut:
    """A source with its shards; cutting it again gives the same shards."""

    path: str
    kind: str  # arrays, pictures or parquet
    digest: str  # of the names, sizes and times of its files
    shape: tuple[int, ...]  # (C, H, W) of an image
    pictures: str  # how a picture is converted to an image: see signature.pictures_of
    shards: tuple[Shard, ...]
    columns: Columns | None = None  # Parquet only

    @property
    def rows(self) -> int:
        """Number of images, valid and invalid."""
        return sum(shard.rows for shard in self.shards)


def cut(
    path: Path, shape: tuple[int, ...], pictures: str, rows: int, unpacked: Path, wanted: Columns
) -> Cut:
    """Cut the source at `path` into shards of about `rows` rows, for a model that takes `shape`.

    `shape` is (C, H, W). A gzipped file is decompressed into the file `unpacked`. `wanted` names
    columns of Parquet. Raises PipelineError for an invalid source, and CorruptError for a
    truncated file.
    """
    if not path.exists():
        raise PipelineError(f"{path} does not exist: check the name")
    below = []
    for source in list_sources([str(path)]) if path.is_dir() else ():
        if source.error:  # for example, a folder that cannot be read
            raise PipelineError(source.error)
        below.append(Path(source.name))
    kind, columns, files = "parquet", None, _find_parquet(path, below)
    if files:
        columns = parquet.choose_columns(path, files, shape, pictures, wanted)
        shards = list(parquet.cut_files(files, rows))
    elif path.is_dir():
        if pictures == "arrays":
            fix = "give an .npy, IDX or Parquet file, or export it with --picture"
            raise PipelineError(f"{path} is a folder, but the model takes only arrays: {fix}")
        kind, files, shards = "pictures", below, []
        size = min(rows, PICTURES_A_SHARD)
        for index, start in enumerate(range(0, len(files), size)):
            names = tuple(map(str, files[start : start + size]))
            shards.append(Shard(index, os.path.dirname(names[0]), len(names), start, names=names))
    elif parquet.takes_only_pictures(pictures):
        fix = "give a folder of pictures, or a Parquet file of them"
        raise PipelineError(f"{path} holds arrays, but the model takes pictures: {fix}")
    else:
        kind, files = "arrays", [path]
        shards = list(_cut_arrays(_decompress(path, unpacked), path, shape, rows))
    if not shards:
        raise PipelineError(f"{path} holds no images: give {KINDS}")
    return Cut(str(path), kind, _hash_files(path, files), shape, pictures, tuple(shards), columns)


def read_shard(source: Cut, shard: Shard) -> Rows:
    """Read the images of a shard, with the reasons where there is no valid image.

    Raises CorruptError when a file of arrays or Parquet cannot be read.
    """
    if source.columns:
        return parquet.read_rows(shard, source.shape, source.pictures, source.columns)
    if source.kind == "arrays":
        with open(shard.path, "rb") as file:
            file.seek(shard.offset)
            content = file.read(shard.rows * math.prod(source.shape))
        if len(content) != shard.rows * math.prod(source.shape):
            raise CorruptError(f"{source.path} became shorter while it was read: start again")
        images = np.frombuffer(content, np.uint8).reshape(shard.rows, *source.shape)
        ids = np.arange(shard.start, shard.start + shard.rows)
        return Rows(ids, images, np.full(shard.rows, "", object))
    names = [escape_name(str(Path(name).relative_to(source.path))) for name in shard.names]
    seen = look([Source(name) for name in shard.names], source.pictures)
    results = [escape_name(result) if isinstance(result, str) else result.image for result in seen]
    return parquet.rows_of(np.array(names, object), results, source.shape)


def _hash_files(path: Path, files: Iterable[Path]) -> str:
    """Return one SHA-256 that changes when a file is added, removed, or written again."""
    lines = []
    for file in files:
        name = file.name if file == path else str(file.relative_to(path))
        try:
            status = file.stat()
        except OSError:  # for example, a broken link, which is rejected when it is read
            lines.append(f"{name}\n")
        else:
            lines.append(f"{name} {status.st_size} {status.st_mtime_ns}\n")
    return sha256("".join(lines).encode(errors="surrogateescape"))


def _find_parquet(path: Path, below: list[Path]) -> list[Path]:
    """List the Parquet files at `path`; skip names that begin with '.' or '_', as other readers do.

    Raises PipelineError when the folder also holds other files that can be scored.
    """
    if not path.is_dir():
        return [path] if _read_head(path).startswith(_PARQUET) else []
    visible = [f for f in below if not any(p[0] in "._" for p in f.relative_to(path).parts)]
    files = sorted(file for file in visible if file.suffix == ".parquet")
    for other in visible if files else ():
        head = _read_head(other) if other.suffix != ".parquet" and other.is_file() else b""
        if is_picture(head) or head.startswith((_IDX, _NPY, _PARQUET)):
            message = f"{path} holds Parquet and other images ({files[0]}, {other}): separate them"
            raise PipelineError(message)
    return files


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        message = f"cannot read {path} ({error.strerror}): check its permissions"
        raise PipelineError(message) from error


def _decompress(path: Path, unpacked: Path) -> Path:
    """Return the file itself, or, if it is gzipped, the file of its decompressed content.

    Raises CorruptError when it cannot be decompressed.
    """
    if not _read_head(path).startswith(_GZIP):
        return path

    def unpack(temporary: Path) -> None:
        # Caught here, since BadGzipFile is an OSError, which write_with takes for a disk error.
        try:
            with gzip.open(path) as packed, temporary.open("wb") as file:
                shutil.copyfileobj(packed, file, 2**20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            message = f"{path} cannot be decompressed ({error}): get it again"
            raise CorruptError(message) from error

    write_with(unpacked, unpack)
    return unpacked


def _cut_arrays(file: Path, path: Path, shape: tuple[int, ...], rows: int) -> Iterator[Shard]:
    """Yield the shards of a file of arrays; `path` is the user's name for it.

    Raises PipelineError for arrays of another shape, and CorruptError for a truncated file.
    """
    with file.open("rb") as opened:
        head = _read_head(file)
        if head.startswith(_NPY):
            images, *own_shape = _read_npy(opened, path)
        elif head[:3] == _IDX and head[3:4]:
            header = opened.read(4 + 4 * head[3])[4:]
            if len(header) != 4 * head[3] or not header:
                raise CorruptError(f"{path} ends inside its header: get it again")
            images, *own_shape = struct.unpack(f">{head[3]}I", header)
        else:
            message = (
                f"{path} cannot be scored: give {KINDS}; or use 'pipeline query' for a picture"
            )
            raise PipelineError(message)
        offset = opened.tell()
    size = math.prod(shape)
    length, stated = file.stat().st_size - offset, images * size
    if math.prod(own_shape) != size:
        message = f"{path} holds arrays of shape {own_shape}, the model takes {list(shape)}"
        raise PipelineError(message)
    if length != stated:
        raise CorruptError(f"{path} has {length:,} bytes of images, not {stated:,}: get it again")
    for index, start in enumerate(range(0, images, rows)):
        count = min(rows, images - start)
        yield Shard(index, str(file), count, start, offset + start * size)


def _read_npy(file: BinaryIO, path: Path) -> tuple[int, ...]:
    """Read the shape from the header of a .npy, up to the position of the first value.

    Raises CorruptError for an unreadable header, and PipelineError for another type or order.
    """
    try:
        is_first = np.lib.format.read_magic(file) == (1, 0)
        read = (
            np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(file)
    except (SyntaxError, TypeError, ValueError) as error:
        raise CorruptError(f"the header of {path} is damaged: write it again") from error
    if dtype != np.uint8 or is_fortran or not shape:
        message = f"{path} holds {dtype.str} {list(shape)}: save uint8 in C order, images first"
        raise PipelineError(message)
    return tuple(shape)

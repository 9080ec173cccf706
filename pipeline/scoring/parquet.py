"""Reading of images from Parquet: their column, the pieces to read, the image in each row."""

# Shape letters: N images, C channels, H height, W width.

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.images.inputs import Source, escape_name, look

NAMES, ID = ("image", "images"), "id"  # names of columns that are used by default
NO_ID = "its id is null"  # reason for rejecting a row without an id
ROWS_AT_ONCE = 256  # of arrays: faster when they fit into a core's cache
# Of one read of a column. Without it, or with pre_buffer, Arrow reads a row group's whole column.
BUFFER_BYTES = 2**20
LARGE_GROUP = 16  # pieces of a large row group; reading one also reads those before it
WHOLE_GROUP = 2  # times the requested rows: up to this size a row group is one piece
MAX_PIECE = 8  # times the requested rows


@dataclass(frozen=True)
class Shard:
    """Some images of a source, read by one worker, with their results in one file."""

    index: int
    path: str
    rows: int
    start: int  # index of its first image in the file
    offset: int = 0  # arrays: its first byte in the file; Parquet: rows to skip
    groups: tuple[int, ...] = ()  # Parquet: row groups
    names: tuple[str, ...] = ()  # pictures: their files


@dataclass(frozen=True)
class Columns:
    """Names of the columns of images and ids; None: not chosen yet, or no such column."""

    image: str | None = None
    id: str | None = None
    root: str | None = None  # the folder of the files, if ids include the file's name


@dataclass(frozen=True)
class Rows:
    """Images as a model takes them, with their ids; a row with a reason has no image."""

    ids: np.ndarray  # int64, uint64 or str (N,)
    images: np.ndarray  # (N, C, H, W), zeros where there is no image; uint8, or as a rule says
    reasons: np.ndarray  # str (N,): why there is no image; empty if there is an image


def takes_only_pictures(pictures: str) -> bool:
    """Tell whether a rule makes floats of pictures, so that arrays of pixels are no input."""
    return "=" in pictures and "dtype=uint8" not in pictures


def rows_of(ids: np.ndarray, results: Sequence[np.ndarray | str], shape: tuple[int, ...]) -> Rows:
    """Return rows of these results: for each id an image (C, H, W), or why there is no image."""
    dtypes = {result.dtype for result in results if not isinstance(result, str)}
    images = np.zeros((len(ids), *shape), dtypes.pop() if dtypes else np.uint8)
    reasons = np.full(len(ids), "", object)
    for index, result in enumerate(results):
        if isinstance(result, str):
            reasons[index] = result
        elif result.shape == shape:
            images[index] = result
        else:
            reasons[index] = "the model takes another shape"
    return Rows(ids, images, reasons)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        message = f"{path} is not a readable Parquet file ({error}): get it again"
        raise CorruptError(message) from error


def choose_columns(
    root: Path, files: Iterable[Path], shape: tuple[int, ...], pictures: str, wanted: Columns
) -> Columns:
    """Choose the columns to read from the files below `root`.

    Raises PipelineError when a column does not exist, is ambiguous, or does not have the same type
    in every file.
    """
    paths = list(files)
    with _open(paths[0]) as first:
        schema = first.schema_arrow
    for name in (wanted.image, wanted.id):
        if name and name not in schema.names:
            message = f"{paths[0]} has no column {name!r}. Its columns are {schema.names}"
            raise PipelineError(message)
    image = _choose_image(paths[0], schema, wanted.image)
    is_bytes = _is_bytes(schema.field(image).type)
    if takes_only_pictures(pictures) if not is_bytes else pictures == "arrays":
        kind = "pictures" if is_bytes else "arrays"
        raise PipelineError(f"{paths[0]} has {kind}, which the model does not take")
    key = wanted.id or (ID if ID in schema.names else None)
    for path in paths[1:]:
        with _open(path) as file:
            types = {field.name: field.type for field in file.schema_arrow}
        for name in (image, key):
            if name and types.get(name) != schema.field(name).type:
                message = f"{path} has no {name!r} of the type in {paths[0]}: score it separately"
                raise PipelineError(message)
    return Columns(image, key, str(root) if key is None and len(paths) > 1 else None)


def _choose_image(path: Path, schema: Any, wanted: str | None) -> str:
    """Return the only column that can hold images: pictures as bytes, or lists of integers."""
    names = []
    for field in schema:
        depth, values = _unnest(field.type)
        if _is_bytes(field.type) or (depth and pa.types.is_integer(values)):
            names.append(str(field.name))
    if wanted:
        names = [name for name in names if name == wanted]
    elif len(names) > 1:
        names = [name for name in names if name in NAMES] or names
    if len(names) != 1:
        types = ", ".join(f"{field.name}: {field.type}" for field in schema)
        if names:
            several = f"{len(names)} columns that can hold images ({', '.join(names)})"
            raise PipelineError(f"{path} has {several}: choose one with --image-column")
        column = f"column {wanted!r}" if wanted else "column"
        kinds = "pictures (bytes) or of lists of integers"
        raise PipelineError(f"{path} has no {column} of {kinds}; its columns are {types}")
    return names[0]


def _is_bytes(kind: Any) -> bool:
    """Return whether a column holds files: bytes, or bytes and path as in `datasets`."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _unnest(kind: Any) -> tuple[int, Any]:
    """Return the number of nested lists, 0 if the type is not a list, and the values' type."""
    if isinstance(kind, pa.BaseExtensionType):
        return _unnest(kind.storage_type)
    if not isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return 0, kind
    depth, values = _unnest(kind.value_type)
    return 1 + depth, values


def cut_files(files: Iterable[Path], rows: int) -> Iterator[Shard]:
    """Yield shards of about `rows` rows: row groups, or parts of a large one."""
    numbers = itertools.count()
    for path in files:
        with _open(path) as file:
            metadata = file.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        start, waiting, held = 0, list[int](), 0  # the waiting groups have `held` rows
        for group, size in enumerate(sizes):
            if waiting and held + size > rows:
                yield Shard(next(numbers), str(path), held, start, groups=tuple(waiting))
                start, waiting, held = start + held, [], 0
            if size <= WHOLE_GROUP * rows:  # a larger piece is better than reading rows twice
                waiting, held = [*waiting, group], held + size
                continue
            step = max(rows, min(MAX_PIECE * rows, -(-size // LARGE_GROUP)))
            for skip in range(0, size, step):
                count = min(step, size - skip)
                yield Shard(next(numbers), str(path), count, start + skip, skip, (group,))
            start += size
        if held:
            yield Shard(next(numbers), str(path), held, start, groups=tuple(waiting))


def read_rows(shard: Shard, shape: tuple[int, ...], pictures: str, columns: Columns) -> Rows:
    """Read the rows of a shard; raise CorruptError when the file cannot be read."""
    path, groups, begin = Path(shard.path), list(shard.groups), shard.offset
    end = begin + shard.rows
    names = [name for name in (columns.image, columns.id) if name]
    parts, row = list[Rows](), 0
    with _open(path) as file:
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=names):
                low, high = max(begin - row, 0), min(end - row, len(batch))
                if low < high:
                    number = shard.start + row + low - begin
                    taken = batch.slice(low, high - low)
                    parts.append(_convert_batch(path, taken, number, shape, pictures, columns))
                row += len(batch)
                if row >= end:
                    break
        except (pa.ArrowException, OSError) as error:
            raise CorruptError(f"{path} is damaged ({error}): get it again") from error
    ids, images, reasons = zip(*((p.ids, p.images, p.reasons) for p in parts), strict=True)
    return Rows(np.concatenate(ids), np.concatenate(images), np.concatenate(reasons))


def _convert_batch(
    path: Path, batch: Any, first: int, shape: tuple[int, ...], pictures: str, columns: Columns
) -> Rows:
    numbers = np.arange(first, first + len(batch))
    ids, missing = _read_ids(path, batch, numbers, columns)
    column = batch.column(columns.image)
    while isinstance(column, pa.ExtensionArray):
        column = column.storage
    if _is_bytes(column.type):
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")
        contents = zip(map(str, ids), column.to_pylist(), strict=True)
        files = [Source(i, c, "its image is null" if c is None else None) for i, c in contents]
        seen = [found if isinstance(found, str) else found.image for found in look(files, pictures)]
        rows = rows_of(ids, seen, shape)
    elif (pixels := _read_pixels(column, shape)) is not None:
        images = pixels.reshape(len(batch), *shape)
        rows = Rows(ids, images, np.full(len(batch), "", object))
    else:
        rows = rows_of(ids, [_convert(value.as_py(), shape) for value in column], shape)
    rows.reasons[missing] = NO_ID
    return rows


def _read_ids(
    path: Path, batch: Any, numbers: np.ndarray, columns: Columns
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (N,) of a batch, and the mask of null ids, replaced by the row's number."""
    missing = np.zeros(len(batch), bool)
    if columns.id is None:
        if columns.root is None:
            return numbers, missing
        name = escape_name(str(path.relative_to(columns.root)))
        return np.array([f"{name}:{number}" for number in numbers], object), missing
    column = batch.column(columns.id)
    missing = np.asarray(column.is_null())
    if pa.types.is_integer(column.type):
        kind = np.uint64 if pa.types.is_uint64(column.type) else np.int64
        values = np.asarray(pc.fill_null(column, 0)).astype(kind)
        return np.where(missing, numbers.astype(kind), values), missing
    texts = zip(column.to_pylist(), numbers, strict=True)
    return np.array([f"row {n}" if i is None else str(i) for i, n in texts], object), missing


def _read_pixels(column: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the pixels of all rows, uint8 (N * C * H * W,), or None if any row is invalid."""
    depth, _ = _unnest(column.type)
    # An image may be flat, or without axes of size 1.
    lengths = (math.prod(shape),) if depth == 1 else shape[max(0, len(shape) - depth) :]
    if len(lengths) != depth or math.prod(lengths) != math.prod(shape):
        return None
    for length in lengths:
        sizes = pc.list_value_length(column)
        if column.null_count or not pc.all(pc.equal(sizes, length)).as_py():
            return None
        column = column.flatten()
    if column.null_count:
        return None
    if column.type != pa.uint8():
        bounds = pc.min_max(column).as_py()
        if bounds["min"] < 0 or bounds["max"] > 255:
            return None
        column = column.cast(pa.uint8())
    return np.asarray(column)


def _convert(value: Any, shape: tuple[int, ...]) -> np.ndarray | str:
    """Convert one value to an image (C, H, W), or return why it is not a valid image."""
    if value is None:
        return "its image is null"
    try:
        array = np.array(value)
    except ValueError:
        return "its rows differ in length"
    if array.dtype == object:
        return "one of its pixels is null"
    if array.size != math.prod(shape) or array.shape[-1] not in (array.size, shape[-1]):
        return f"its shape is {list(array.shape)}, the model takes {list(shape)}"
    if array.min() < 0 or array.max() > 255:
        return f"its pixels are {array.min()} to {array.max()}, outside 0 to 255"
    return array.astype(np.uint8).reshape(shape)

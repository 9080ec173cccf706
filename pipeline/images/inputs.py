"""Pictures named on the command line, and their conversion to the model's input."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.text import Lines
from pipeline.images.read import MAX_FILE_BYTES, Picture, Prepared, prepare_picture

T = TypeVar("T")
STANDARD_INPUT = "-"
_FIX = "send a picture, or the names of pictures, one per line"
MAX_NAME_BYTES = 2**16
# The first bytes of the formats in images.FORMATS; a list of file names does not match.
_PICTURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM.{4}\0{4}|II\*\0|MM\0\*|P[1-6]\s+(#|\d+\s+\d)",
    re.DOTALL,
)
_UNDECIDED = re.compile(rb"(BM|RIFF|P[1-6]\s).{0,12}$", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """A picture to classify: a file or its bytes; or the reason why there is no picture."""

    name: str
    content: bytes | None = None  # None: the content of the file called `name`
    error: str | None = None


def list_sources(names: Iterable[str], standard_input: BinaryIO | None = None) -> Iterator[Source]:
    """Yield pictures from files, folders (recursive, sorted by name) and standard input."""
    for name in names:
        if name == STANDARD_INPUT and standard_input:
            yield from _read_input(standard_input)
        elif os.path.isdir(name):
            yield from _list_folder(name)
        else:
            yield Source(name)


def _read_input(stream: BinaryIO) -> Iterator[Source]:
    """Yield the picture that a stream holds, or the pictures whose names are its lines."""
    is_empty = True
    try:
        head = stream.readline(MAX_NAME_BYTES)
        if _UNDECIDED.match(head):  # a line may have ended inside the header
            head += stream.read(16) + stream.readline(MAX_NAME_BYTES)
        if is_picture(head):
            rest = stream.read(max(0, MAX_FILE_BYTES + 1 - len(head)))
            yield Source("standard input", head + rest)
            return
        lines = iter(lambda: stream.readline(MAX_NAME_BYTES), b"")
        for line in itertools.chain(head.splitlines(), lines):
            if name := os.fsdecode(line.rstrip(b"\r\n")):
                for source in list_sources([name]):
                    is_empty = False
                    yield source
    except OSError as error:
        raise PipelineError(f"cannot read standard input ({error.strerror}): {_FIX}") from error
    if is_empty:
        yield Source(STANDARD_INPUT, error=f"standard input is empty: {_FIX}")


def _list_folder(folder: str) -> Iterator[Source]:
    """Yield every file below a folder that is not hidden; each folder once, so that links end."""
    is_empty, visited = True, set[tuple[int, int]]()
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            status = os.stat(path)
            names = sorted(os.listdir(path))
        except OSError as error:
            is_empty = False
            reason = f"cannot read the folder {path} ({error.strerror}): check its permissions"
            yield Source(path, error=reason)
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        below = []
        for child in (os.path.join(path, name) for name in names if not name.startswith(".")):
            if os.path.isdir(child):
                below.append(child)
            else:
                is_empty = False
                yield Source(child)
        waiting += reversed(below)
    if is_empty:
        yield Source(folder, error=f"{folder} has no files: name a folder of pictures")


def escape_name(name: str) -> str:
    """Escape bytes that are not UTF-8 in a file's name, or in a message with one."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_picture(head: bytes) -> bool:
    """Return whether a file that begins with `head` has one of the supported formats."""
    return bool(_PICTURE.match(head))


def look(batch: list[Source], pictures: str) -> list[Prepared | str]:
    """Prepare each source as the model takes it; return the error message where that fails.

    Processes run it in parallel.
    """
    return [read_source(source, partial(prepare_picture, pictures=pictures)) for source in batch]


def read_source(source: Source, read: Callable[[Picture, str], T]) -> T | str:
    """Return what `read` makes of a source, or the error message."""
    if source.error:
        return source.error
    try:
        return read(Path(source.name) if source.content is None else source.content, source.name)
    except (PipelineError, OSError) as error:  # an OSError: no permission for its folder
        return str(error)


def draw_image(image: np.ndarray, is_unicode: bool) -> str:
    """Draw an image (C, H, W) in at most 64 columns of characters, two rows of pixels in a line."""
    step = -(-image.shape[2] // 64)
    levels = image.astype(np.float64).mean(axis=0)[::step, ::step]  # (H, W)
    levels -= min(levels.min(), 0)
    levels = np.pad(levels, ((0, len(levels) % 2), (0, 0))) / max(levels.max(), 1)  # 0 to 1
    upper, lower = levels[::2], levels[1::2]
    if is_unicode:
        marks, shades = " ▀▄█", (upper >= 0.5) + 2 * (lower >= 0.5)
    else:
        marks = " .:-=+*#%@"
        shades = np.rint((upper + lower) / 2 * (len(marks) - 1)).astype(int)
    return Lines(*("".join(marks[shade] for shade in row).rstrip() for row in shades))

"""A log of predictions, for whoever watches a model live: never an image, never a file's name.

A line of JSON for each image: `schema`, `time` (UTC), `name`, `version`, `sha256` of the model's
file, `class`, `probability`, `sure` (by the model's own threshold) and `ink`, the mean of the
pixels that the model got over 255.
"""

# Shape letters: N images.

import contextlib
import errno
import fcntl
import json
import logging
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pipeline.client.prediction import Prediction
from pipeline.core.errors import PipelineError
from pipeline.core.files import SCHEMA
from pipeline.repository.reference_profile import ink_of

MAX_BYTES = 64 * 1024 * 1024  # about 300,000 predictions; then it becomes FILE.1, the old one goes
LINES_AT_ONCE = 1000
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_logger = logging.getLogger(__name__)


def older(path: Path) -> Path:
    """Where a log's earlier lines went when it was full."""
    return path.with_name(f"{path.name}.1")


class PredictionLog:
    """A file that predictions are appended to, by any number of threads and processes.

    What cannot be written is lost and changes no answer: it is said once, as a warning of
    Python's logging, counted in `lost`, and stated in the log once that can be written again.
    """

    def __init__(self, path: Path | str, max_bytes: int = MAX_BYTES) -> None:
        """Raise PipelineError for a file that cannot be written, or that others may read."""
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.path, self.max_bytes = Path(path), max_bytes
        self.lost = 0  # predictions, since we began
        self._unsaid = 0  # of those, how many the log does not know of
        self._lock = threading.Lock()
        try:
            with self._opened() as descriptor:
                mode = os.fstat(descriptor).st_mode
        except OSError as error:
            raise PipelineError(
                f"cannot write the prediction log {path} ({error.strerror}): name a file in a "
                "folder that is there and that you may write to"
            ) from error
        if not stat.S_ISREG(mode):
            raise PipelineError(f"cannot write the prediction log {path}: it is no plain file")
        if mode & 0o077:
            raise PipelineError(f"others may read or write the prediction log: chmod 600 '{path}'")

    def add(self, name: str, images: np.ndarray, predictions: Sequence[Prediction]) -> None:
        """Append what model `name` said of images (N, ...) as it got them. Never raises OSError."""
        lines = _lines(name, images, predictions)
        for start in range(0, len(lines), LINES_AT_ONCE):
            self._append(lines[start : start + LINES_AT_ONCE])

    def _append(self, lines: Sequence[bytes]) -> None:
        with self._lock:
            gap = [_line(lost=self._unsaid)] if self._unsaid else []
            try:
                self._write(b"".join([*gap, *lines]))
            except OSError as error:
                if not self._unsaid:
                    _logger.warning(
                        "the prediction log %s cannot be written (%s): answers go on, and what "
                        "is not logged is counted",
                        self.path,
                        error.strerror,
                    )
                self.lost += len(lines)
                self._unsaid += len(lines)
            else:
                if gap:
                    _logger.warning(
                        "the prediction log %s is written again; %d predictions are not in it",
                        self.path,
                        self._unsaid,
                    )
                self._unsaid = 0

    def _write(self, content: bytes) -> None:
        """Append all of it or nothing, in one write; OSError where that cannot be."""
        with self._opened() as descriptor:
            size = os.fstat(descriptor).st_size
            is_full = size > 0 and size + len(content) > self.max_bytes
            if not is_full:
                _append_whole(descriptor, content, size)
                return
            os.replace(self.path, older(self.path))  # the lock is held: nobody else does
        with self._opened() as descriptor:
            _append_whole(descriptor, content, os.fstat(descriptor).st_size)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The file that lies at the path now, locked against other writers."""
        while True:
            descriptor = os.open(self.path, _FLAGS, 0o600)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    if not _lies_at(descriptor, self.path):
                        continue  # another writer has just put it away
                yield descriptor
                return
            finally:
                os.close(descriptor)


def opened(log: PredictionLog | Path | str | None) -> PredictionLog | None:
    """The log that is meant: one that several may share, one at a path, or none."""
    return log if log is None or isinstance(log, PredictionLog) else PredictionLog(log)


def _lies_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _append_whole(descriptor: int, content: bytes, size: int) -> None:
    written = os.write(descriptor, content)
    if written < len(content):  # the disk is full: half a line helps nobody
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, "no space left for a whole batch")


def _lines(name: str, images: np.ndarray, predictions: Sequence[Prediction]) -> list[bytes]:
    inks = ink_of(images)
    return [
        _line(
            name=name,
            version=said.version,
            sha256=said.sha256,
            **{"class": said.label},
            probability=round(said.probability, 8),
            sure=said.is_sure,
            ink=None if inks is None else round(float(inks[row]), 5),
        )
        for row, said in enumerate(predictions)
    ]


def _line(**fields: str | float | None) -> bytes:
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = json.dumps({"schema": SCHEMA, "time": time, **fields}, separators=(",", ":"))
    return f"{text}\n".encode()

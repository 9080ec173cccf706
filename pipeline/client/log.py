"""The prediction log, for monitoring a served model: it holds no images and no file names.

Each line is a JSON object for one image: `schema`, `time` (UTC), `name`, `version`, `sha256` of the
model's file, `class`, `probability`, `sure` (by the model's own threshold; null without one) and
`ink`, the mean of the pixels that the model received, divided by 255; it is null for images that
are not uint8. A line with only `schema`, `time` and `lost` tells how many predictions before it are
missing.
"""

# Shape letters: N images.

import errno
import io
import json
import logging
import os
import stat
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pipeline.client.prediction import Prediction
from pipeline.core.errors import PipelineError
from pipeline.core.files import OTHERS, SCHEMA
from pipeline.repository.reference_profile import ink_of

MAX_BYTES = 64 * 1024 * 1024  # about 300,000 predictions; then it replaces the older FILE.1
LINES_AT_ONCE = 1000
WAIT_SECONDS = 0.005  # between two attempts to lock the log
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither
_logger = logging.getLogger(__name__)


def older_log(path: Path) -> Path:
    """Return the path of a log's older lines, which moved there when it was full."""
    return path.with_name(f"{path.name}.1")


class PredictionLog:
    """A file to which any number of threads and processes append predictions.

    Predictions that cannot be written are lost, and no answer changes: Python's logging warns once,
    `lost` counts them, and the log states their number as soon as it can be written again.
    """

    def __init__(self, path: Path | str, max_bytes: int = MAX_BYTES) -> None:
        """Raise PipelineError if the file cannot be written, or if other users may access it."""
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.path, self.max_bytes = Path(path), max_bytes
        self.lost = 0  # predictions, in total
        self._unreported = 0  # of those, how many the log does not state yet
        self._lock = threading.Lock()
        try:
            with self._open() as file:
                mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                self._write(b"")  # tries the lock
        except OSError as error:
            raise PipelineError(
                f"cannot write the prediction log {path} ({error.strerror}): name a file in an "
                "existing folder that you can write to"
            ) from error
        if not stat.S_ISREG(mode):
            raise PipelineError(f"cannot write the prediction log {path}: it is not a regular file")
        if mode & OTHERS:
            raise PipelineError(
                f"other users can access the prediction log: run chmod 600 '{path}'"
            )

    def add(self, name: str, images: np.ndarray, predictions: Sequence[Prediction]) -> None:
        """Append model `name`'s predictions for its input images (N, ...); never raise OSError."""
        inks = ink_of(images)
        lines = [
            _line(
                name=name,
                version=prediction.version,
                sha256=prediction.sha256,
                **{"class": prediction.label},
                probability=round(prediction.probability, 8),
                sure=prediction.is_sure,
                ink=None if inks is None else round(float(inks[row]), 5),
            )
            for row, prediction in enumerate(predictions)
        ]
        for start in range(0, len(lines), LINES_AT_ONCE):
            batch = lines[start : start + LINES_AT_ONCE]
            with self._lock:
                missing = self._unreported
                gap = [_line(lost=missing)] if missing else []
                try:
                    self._write(b"".join([*gap, *batch]))
                except OSError as error:
                    message = (
                        "the prediction log %s cannot be written (%s): predictions continue, "
                        "and those not logged are counted"
                    )
                    if not missing:
                        _logger.warning(message, self.path, error.strerror)
                    self.lost += len(batch)
                    self._unreported += len(batch)
                    continue
                self._unreported = 0
            if missing:
                message = "the prediction log %s is written again; %d predictions are missing"
                _logger.warning(message, self.path, missing)

    def _write(self, content: bytes) -> None:
        """Append all of `content` or nothing, in one write; raise OSError if that fails."""
        from filelock import FileLock  # slow to import

        folder = self.path.parent.resolve(strict=True)  # the lock would make a missing one
        lock = FileLock(folder / f".{self.path.name}.lock", mode=0o600)
        with lock.acquire(poll_interval=WAIT_SECONDS):
            size = os.path.getsize(self.path) if self.path.exists() else 0
            if size > 0 and size + len(content) > self.max_bytes:  # it is full
                os.replace(self.path, older_log(self.path))  # closed: Windows replaces no open file
            with self._open() as file:
                size = file.tell()
                if (file.write(content) or 0) < len(content):
                    file.truncate(size)  # the disk is full: leave no half line
                    raise OSError(errno.ENOSPC, "no space left for a whole batch")

    def _open(self) -> io.FileIO:
        """Open the file for appending; its end is the position."""
        return open(
            self.path, "ab", 0, opener=lambda name, flags: os.open(name, flags | _SAFE, 0o600)
        )


def open_log(log: PredictionLog | Path | str | None) -> PredictionLog | None:
    """Return a log: `log` itself, which may be shared, the log at a path, or None."""
    return log if log is None or isinstance(log, PredictionLog) else PredictionLog(log)


def _line(**fields: str | float | None) -> bytes:
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = json.dumps({"schema": SCHEMA, "time": time, **fields}, separators=(",", ":"))
    return f"{text}\n".encode()

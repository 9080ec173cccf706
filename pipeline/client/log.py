"""The prediction log, for monitoring a served model: it holds no images and no file names.

Each line is a JSON object for one image: `schema`, `time` (UTC), `name`, `version`, `sha256` of the
model's file, `class`, `probability`, `sure` (by the model's own threshold; null without one) and
`ink`, the mean of the pixels that the model received, divided by 255; it is null for images that
are not uint8. A line with only `schema`, `time` and `lost` tells how many predictions before it are
missing.
"""

# Shape letters: N images.

import errno
import fileinput
import io
import json
import logging
import math
import os
import stat
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.client.prediction import Prediction
from pipeline.core.errors import PipelineError
from pipeline.core.files import OTHERS, SCHEMA
from pipeline.repository.reference_profile import ink_of

MAX_BYTES = 64 * 1024 * 1024  # about 300,000 predictions; then it replaces the older FILE.1
LINES_AT_ONCE = 1000
WAIT_SECONDS = 0.005  # between two attempts to lock the log
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither
_UNREADABLE = (ValueError, TypeError, LookupError, RecursionError, OverflowError, AttributeError)
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


class Entry(NamedTuple):
    """One logged prediction."""

    time: str  # UTC, as 2026-11-23T18:30:00Z
    label: str
    probability: float
    is_sure: bool | None
    ink: float | None


class LoggedModel(NamedTuple):
    """The model that a line is about."""

    name: str
    version: str
    sha256: str | None

    def __str__(self) -> str:
        return f"{self.name} version {self.version or '?'} (sha256 {self.sha256!s:.12})"


@dataclass
class Logged:
    """The predictions of one model file in a log, and the numbers of other lines."""

    entries: list[Entry] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)  # under which the model file was served
    others: Counter[LoggedModel] = field(default_factory=Counter)  # predictions of other models
    unreadable: int = 0  # lines
    lost: int = 0  # predictions that the log states as lost


def read_log(path: Path, name: str, sha256: str, since: datetime | None = None) -> Logged:
    """Return the predictions of model `name` with that digest; older lines, `FILE.1`, come first.

    Lines before `since` are left out. Raises PipelineError if there is no such log, or if no line
    of it can be read.
    """
    logged, wanted = Logged(), (name, sha256)
    start = "" if since is None else since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    files = [file for file in (older_log(path), path) if file == path or file.exists()]
    try:
        with fileinput.input(files, mode="rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    time, lost = str(record["time"]), int(record.get("lost", 0))
                    digest = record.get("sha256")
                    if record["schema"] != SCHEMA or not isinstance(digest, str | None):
                        raise ValueError("another schema, or no digest")
                    if not lost:
                        model = LoggedModel(str(record["name"]), str(record["version"]), digest)
                        ink = None if record["ink"] is None else _share(record["ink"])
                        sure, chance = record["sure"], _share(record["probability"])
                        is_sure = None if sure is None else bool(sure)
                        entry = Entry(time, str(record["class"]), chance, is_sure, ink)
                except _UNREADABLE:
                    logged.unreadable += 1
                    continue
                if time < start:
                    continue
                if lost:
                    logged.lost += lost
                elif (model.name, model.sha256) == wanted:
                    logged.entries.append(entry)
                    logged.versions.add(model.version)
                else:
                    logged.others[model] += 1
    except OSError as error:
        raise PipelineError(
            f"cannot read the prediction log {path} ({error.strerror}): 'pipeline query' and "
            "'pipeline web' write one with --prediction-log"
        ) from error
    if logged.unreadable and not (logged.entries or logged.others or logged.lost):
        raise PipelineError(
            f"{path} is not a prediction log: write one with 'pipeline query IMAGE "
            "--prediction-log FILE'"
        )
    return logged


def _share(value: Any) -> float:
    share = float(value)
    if not math.isfinite(share) or not -1e-6 <= share <= 1 + 1e-6:
        raise ValueError(f"{value} is not between 0 and 1")
    return share

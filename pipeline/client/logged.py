"""What a prediction log holds, read line by line."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.client.log import older
from pipeline.core.errors import PipelineError
from pipeline.core.files import SCHEMA


class Entry(NamedTuple):
    """One prediction."""

    time: str  # UTC, as 2026-11-23T18:30:00Z
    label: str
    probability: float
    is_sure: bool
    ink: float | None


class Model(NamedTuple):
    """Which model a line is about."""

    name: str
    version: str
    sha256: str | None

    def __str__(self) -> str:
        return f"{self.name} version {self.version or '?'} (sha256 {self.sha256!s:.12})"


@dataclass
class Logged:
    """The predictions of one model file in a log, and how many other lines there are."""

    entries: list[Entry] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)  # under which the model file was served
    others: Counter[Model] = field(default_factory=Counter)  # predictions of other models
    unreadable: int = 0  # lines
    lost: int = 0  # predictions that the log says it lacks


def read_log(path: Path, name: str, sha256: str, since: datetime | None = None) -> Logged:
    """The predictions of model `name` with that digest; older lines, `FILE.1`, come first.

    Raises PipelineError where there is no such log, or none of it can be read.
    """
    logged, wanted = Logged(), (name, sha256)
    start = "" if since is None else since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for line in _lines(path):
        try:
            model, entry, lost = _parsed(line)
        except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
            logged.unreadable += 1
            continue
        if entry.time < start:
            continue
        logged.lost += lost
        if lost:
            continue
        if (model.name, model.sha256) == wanted:
            logged.entries.append(entry)
            logged.versions.add(model.version)
        else:
            logged.others[model] += 1
    if logged.unreadable and not (logged.entries or logged.others or logged.lost):
        raise PipelineError(
            f"{path} is no prediction log, since none of its lines can be read: make one with "
            "'pipeline query IMAGE --prediction-log FILE'"
        )
    return logged


def _lines(path: Path) -> Iterator[bytes]:
    try:
        for file in (older(path), path):
            if file == path or file.exists():
                with file.open("rb") as lines:
                    yield from lines
    except OSError as error:
        raise PipelineError(
            f"cannot read the prediction log {path} ({error.strerror}): write one with 'pipeline "
            f"query --prediction-log {path}', 'pipeline web', or Client(prediction_log=...)"
        ) from error


def _parsed(line: bytes) -> tuple[Model, Entry, int]:
    record: dict[str, Any] = json.loads(line)
    if record["schema"] != SCHEMA:
        raise ValueError(f"schema {record['schema']}")
    time = str(record["time"])
    if lost := int(record.get("lost", 0)):
        return Model("", "", None), Entry(time, "", 0.0, False, None), lost
    sha256 = record["sha256"]
    if not isinstance(sha256, str | None):
        raise TypeError(f"{sha256} is no digest")
    probability, ink = _share(record["probability"]), record["ink"]
    entry = Entry(
        time,
        str(record["class"]),
        probability,
        bool(record["sure"]),
        None if ink is None else _share(ink),
    )
    return Model(str(record["name"]), str(record["version"]), sha256), entry, 0


def _share(value: Any) -> float:
    share = float(value)
    if not math.isfinite(share) or not -1e-6 <= share <= 1 + 1e-6:
        raise ValueError(f"{value} is no share")
    return share

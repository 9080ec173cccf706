"""Reading of a prediction log, which `client/log.py` writes and describes."""

import fileinput
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import DecodeError, Meta, Struct
from msgspec.json import decode

from pipeline.client.log import older_log
from pipeline.core.errors import PipelineError
from pipeline.core.files import SCHEMA

Schema = Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)]
Share = Annotated[float, Meta(ge=-1e-6, le=1 + 1e-6)]


class LoggedModel(NamedTuple):
    """The model that a line is about."""

    name: str
    version: str
    sha256: str | None

    def __str__(self) -> str:
        return f"{self.name} version {self.version or '?'} (sha256 {self.sha256!s:.12})"


class Entry(Struct, rename={"label": "class", "is_sure": "sure"}):
    """A line of one prediction."""

    schema: Schema
    time: str  # UTC, as 2026-11-23T18:30:00Z
    name: str
    version: str
    sha256: str | None
    label: str
    probability: Share
    is_sure: bool | None
    ink: Share | None


class Gap(Struct):
    """A line that states how many predictions before it are missing."""

    schema: Schema
    time: str
    lost: int


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
    logged = Logged()
    start = "" if since is None else since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    files = [file for file in (older_log(path), path) if file == path or file.exists()]
    try:
        with fileinput.input(files, mode="rb") as lines:
            for line in lines:
                try:
                    read = decode(line, type=Gap if b'"lost":' in line else Entry)
                except (DecodeError, UnicodeDecodeError):
                    logged.unreadable += 1
                    continue
                if read.time < start:
                    continue
                if isinstance(read, Gap):
                    logged.lost += read.lost
                elif (read.name, read.sha256) == (name, sha256):
                    logged.entries.append(read)
                    logged.versions.add(read.version)
                else:
                    logged.others[LoggedModel(read.name, read.version, read.sha256)] += 1
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

"""The server that `server.json` speaks of, and whether it still runs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.core.errors import CorruptError, ServerError
from pipeline.core.files import read_json
from pipeline.core.paths import Paths


@dataclass(frozen=True)
class Server:
    """A tritonserver that we started. What `server.json` records."""

    id: str
    pid: int
    start_time: int  # of the process, in clock ticks since boot: a pid may come again
    supervisor_pid: int
    supervisor_start_time: int
    http_port: int
    grpc_port: int
    metrics_port: int
    admin_key: str
    runtime: str
    profile: str  # which of configs/*.pbtxt; empty: config.pbtxt
    models: dict[str, int]  # name -> version
    is_ready: bool
    ready_at: float  # seconds since the epoch; 0.0 until it is ready
    restarts: int  # how often its supervisor has started it anew
    why: str  # it was started anew the last time; empty before the first
    root: str  # the project's folder: a copy of it has this record too, and no server

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"grpc://127.0.0.1:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"


def start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether that very process still runs."""
    return started > 0 and start_time(pid) == started


def recorded(paths: Paths) -> Server | None:
    """The server that `server.json` speaks of, alive or not; None when it speaks of none of ours.

    Raises CorruptError when it is damaged: what it names is killed without asking again.
    """
    if not paths.server.exists():
        return None
    mend = f"stop what you started and remove {paths.server}"
    record = read_json(paths.server, mend)
    try:
        fields = {name: record[name] for name in Server.__dataclass_fields__}
    except KeyError as error:
        raise CorruptError(f"{paths.server} lacks {error}: {mend}") from error
    wrong = [name for name, kind in _KINDS.items() if not _is(fields[name], kind)]
    if wrong or not _ID.fullmatch(fields["id"]):
        names = ", ".join(wrong) or "id"
        raise CorruptError(f"{paths.server} is damaged ({names}): {mend}")
    server = Server(**fields)
    return server if server.root == root(paths) else None


def default_url(paths: Paths) -> str:
    """Where our own server answers, over gRPC; ServerError when `server.json` knows of none."""
    server = recorded(paths)
    if server is None:
        raise ServerError(
            f"no server of ours is running ({paths.server} is not there): start one with "
            "'pipeline serve', or name another with --url"
        )
    return server.grpc_url


def root(paths: Paths) -> str:
    """The project's folder, as a server's record names it."""
    return str(paths.root.resolve())


_ID = re.compile(r"handwriting-[0-9a-f]{12}")
_KINDS = get_type_hints(Server)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a field's type; no bool is an int."""
    if kind == dict[str, int]:
        return isinstance(value, dict) and all(type(version) is int for version in value.values())
    return type(value) is kind


def serving(paths: Paths) -> Server | None:
    """Our server, if it runs and serves this model of this repository."""
    server = None if paths.repository_folder else recorded(paths)
    if server is None or paths.name not in server.models:
        return None
    # A supervisor whose tritonserver died may be about to start it again.
    processes = (
        (server.pid, server.start_time),
        (server.supervisor_pid, server.supervisor_start_time),
    )
    return server if any(is_alive(*process) for process in processes) else None

"""The server that `server.json` records, and whether it still runs."""

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CorruptError, ServerError
from pipeline.core.files import read_record
from pipeline.core.paths import Paths


@dataclass(frozen=True)
class Server:
    """A tritonserver that we started, as `server.json` records it."""

    id: str
    pid: int
    start_time: int  # of the process, in clock ticks since boot: a pid may be reused
    supervisor_pid: int
    supervisor_start_time: int
    http_port: int
    grpc_port: int
    metrics_port: int
    admin_key: str
    runtime: str
    profile: str  # stem of a file configs/*.pbtxt; empty: config.pbtxt
    models: dict[str, int]  # name -> version
    is_ready: bool
    ready_at: float  # seconds since the epoch; 0.0 until it is ready
    restarts: int  # how often its supervisor has restarted it
    why: str  # reason for the last restart; empty before the first
    root: str  # the project's folder: a copy of the folder has this record, but no server

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
    """Return when process `pid` started, in clock ticks since boot; None if gone or a zombie."""
    # Not psutil: its create_time() adds the boot time by the system clock, which changes when the
    # clock is set, and then the next command would take a live server for dead. The kernel's number
    # is the same for every reader as long as the process lives.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Return whether process `pid`, with that start time, still runs."""
    return started > 0 and start_time(pid) == started


def load_server(paths: Paths) -> Server | None:
    """Return the server that `server.json` records, alive or not; None if this project has none.

    Raises CorruptError if the record is damaged, because the process that it names gets killed
    without another check.
    """
    if not paths.server.exists():
        return None
    fix = f"stop the server yourself, then remove {paths.server}"
    server = read_record(paths.server, Server, fix)
    if not re.fullmatch(r"handwriting-[0-9a-f]{12}", server.id):
        raise CorruptError(f"{paths.server} is damaged ({server.id!r} at `$.id`): {fix}")
    return server if server.root == root(paths) else None


def default_url(paths: Paths) -> str:
    """Return the gRPC URL of our server; raise ServerError if `server.json` records none."""
    server = load_server(paths)
    if server is None:
        fix = "start one with 'pipeline serve --detach', or name one with --url"
        if not paths.repository.exists():
            fix = "Name the project's folder with --root, or a server with --url"
            fix = f"{root(paths)} has no packaged model. {fix}"
        raise ServerError(f"no server runs here: {fix}")
    return server.grpc_url


def root(paths: Paths) -> str:
    """Return the project's folder as a server's record has it."""
    return str(paths.root.resolve())


def find_server(paths: Paths) -> Server | None:
    """Return our server if it runs and serves this model of this repository, else None."""
    server = None if paths.repository_folder else find_running(paths)
    return server if server and paths.name in server.models else None


def find_running(paths: Paths) -> Server | None:
    """Return our server if it runs, whatever it serves, else None."""
    server = load_server(paths)
    if server is None:
        return None
    # A supervisor whose tritonserver died may be about to start it again.
    is_supervised = is_alive(server.supervisor_pid, server.supervisor_start_time)
    return server if is_supervised or is_alive(server.pid, server.start_time) else None

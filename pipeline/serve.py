"""A tritonserver that answers its golden sets rightly, or none: started, awaited, stopped."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline import tritonserver
from pipeline.admin import Admin
from pipeline.client import Client
from pipeline.config import ServeConfig
from pipeline.errors import PipelineError, ServerError
from pipeline.files import write_json
from pipeline.golden import require
from pipeline.lint import require_loadable
from pipeline.paths import Paths
from pipeline.replay import Release, replay_golden, selected_releases
from pipeline.running import Server as Server
from pipeline.running import is_alive as is_alive
from pipeline.running import recorded as recorded
from pipeline.running import start_time as start_time

POLL_SECONDS = 0.05
KILL_SECONDS = 5.0  # in which a killed process is gone
END_SECONDS = tritonserver.EXIT_SECONDS + 2.0  # in which a server ends that has nothing to do
LOG_BYTES = 16 * 1024 * 1024  # of the server's log, of which one more generation is kept


def default_url(paths: Paths) -> str:
    """Where our own server answers, over gRPC; ServerError when `server.json` knows of none."""
    server = recorded(paths)
    if server is None:
        raise ServerError(
            f"no server of ours is running ({paths.server} is not there): start one with "
            "'pipeline serve', or name another with --url"
        )
    return server.grpc_url


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_free_ports(config: ServeConfig) -> ServeConfig:
    """`config` on three ports that are free now."""
    return replace(config, http_port=free_port(), grpc_port=free_port(), metrics_port=free_port())


def _require_free(config: ServeConfig) -> None:
    for service, port in tritonserver.ports(config).items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, port))
            except OSError as error:
                raise PipelineError(
                    f"port {port} ({service}) is taken: stop what listens there, choose another "
                    f"with --{service}-port, or take free ones with --port auto"
                ) from error


@contextlib.contextmanager
def running_server(
    paths: Paths,
    config: ServeConfig = ServeConfig(),
    is_recorded: bool = False,
    report: Callable[[str], None] = lambda line: None,
    restarts: int = 0,
    why: str = "",
) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """A server on the repository that answers its golden sets rightly, stopped at the end.

    `restarts` and `why` are what its supervisor has to say of the ones before it.

    Raises PipelineError when a port is taken or nothing can run, CheckFailedError when it answers
    wrongly, CorruptError when a packaged file changed, ServerError when it does not come up.
    """
    releases = selected_releases(paths, config.profile)
    if not restarts:
        require_loadable(paths.repository)
    runtime = tritonserver.find(paths, config.runtime)
    if config.host != "127.0.0.1" and runtime.kind == "wheel":
        raise PipelineError("the wheel's tritonserver is too old for a network: loopback only")
    _require_free(config)
    server_id = f"handwriting-{secrets.token_hex(6)}"
    key = secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory(prefix=f"{server_id}-") as scratch:
        backends, log = Path(scratch) / "backends", paths.server_log
        if runtime.kind == "wheel":
            tritonserver.lay_out_backends(runtime, backends)
        if not is_recorded:
            log = Path(scratch) / log.name
        command = tritonserver.command(runtime, paths.repository, config, server_id, key, backends)
        report(f"starting {runtime}")
        start = log.stat().st_size if log.exists() else 0
        with process(command, runtime, log, server_id) as child:
            server = Server(
                id=server_id,
                pid=child.pid,
                start_time=start_time(child.pid) or 0,
                supervisor_pid=os.getpid(),
                supervisor_start_time=start_time(os.getpid()) or 0,
                http_port=config.http_port,
                grpc_port=config.grpc_port,
                metrics_port=config.metrics_port,
                admin_key=key,
                runtime=runtime.kind,
                profile=config.profile,
                models={name: release.version for name, release in releases.items()},
                is_ready=False,
                ready_at=0.0,
                restarts=restarts,
                why=why,
            )
            if is_recorded:
                write_record(paths, server)
            await_ready(server, child, releases, Log(log, start), config.start_seconds)
            server = replace(server, is_ready=True, ready_at=time.time())
            if is_recorded:
                write_record(paths, server)
            yield server, child


@dataclass(frozen=True)
class Log:
    """What one server has written into a log that others wrote before it."""

    path: Path
    start: int  # where its own part begins, in bytes

    def cause(self) -> str:
        """The error that explains the others, in a line."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return tritonserver.cause(file.read().decode(errors="replace"))


def bound_log(path: Path, limit: int = LOG_BYTES) -> None:
    """Begin a log anew that has become too long, and keep what it was until then beside it."""
    if path.stat().st_size > limit:
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)  # its writers append


def drain(server: Server, seconds: float) -> bool:
    """Let a server answer what it has accepted, and refuse what comes from now on.

    Triton's own way out keeps accepting on connections that are open, and cuts them off in the
    middle of an answer. Returns False when `seconds` were too few, or the server was not there.
    """
    deadline = time.monotonic() + seconds
    try:
        with Admin(server.grpc_url, server.admin_key, seconds) as admin:
            ready = {name for (name, _), state in admin.states().items() if state == "READY"}
            for name in sorted(ready):
                admin.unload(name)
            while any(n in ready and s != "UNAVAILABLE" for (n, _), s in admin.states().items()):
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_SECONDS)
    except PipelineError:
        return False
    return True


def write_record(paths: Paths, server: Server) -> None:
    """Write server.json, readable by its owner only: it holds the admin key."""
    previous = os.umask(0o077)
    try:
        write_json(paths.server, asdict(server))
    finally:
        os.umask(previous)


@contextlib.contextmanager
def process(
    command: list[str], runtime: tritonserver.Runtime, log: Path, server_id: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process in a group of its own, which ends with the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            env=tritonserver.environment(runtime),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_SECONDS)
        clear(server_id, runtime.kind)
        child.wait()


def processes_of(server_id: str) -> list[int]:
    """The server's processes that still run: tritonserver and its stubs carry its id."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is somebody else's
            if server_id.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if start_time(pid) is not None]


def dead_children(pid: int) -> list[int]:
    """Processes that `pid` started, that ended, and that it has not noticed: its dead stubs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and parent == str(pid):
                found.append(int(entry.name))
    return found


def clear(server_id: str, runtime: str) -> None:
    """Kill what is left of a server, await its end, and remove its shared memory and files."""
    if runtime == "docker":
        tritonserver.remove_container(server_id)
    for pid in processes_of(server_id):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # a container's own
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_SECONDS
    while processes_of(server_id) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    # Only now: a process that still ran could make another.
    for region in Path("/dev/shm").glob(f"*{server_id}*"):
        region.unlink(missing_ok=True)
    for scratch in Path(tempfile.gettempdir()).glob(f"{server_id}-*"):
        shutil.rmtree(scratch, ignore_errors=True)


def await_ready(
    server: Server,
    child: subprocess.Popen[bytes],
    releases: dict[str, Release],
    log: Log,
    seconds: float,
) -> None:
    """Return once our server's models answer their golden sets rightly over both protocols."""
    deadline = time.monotonic() + seconds
    for url in (server.http_url, server.grpc_url):
        with Client(url, timeout=2.0) as client:
            _await_answer(client, server, child, log, deadline, seconds)
        for name, release in releases.items():
            with Client(url, name, timeout=max(1.0, deadline - time.monotonic())) as client:
                agreement = replay_golden(client, release.golden)
            what = f"{name} version {release.version} answers wrongly over {url}"
            require(agreement, what, "Look at the server's environment, then package it again")


def _await_answer(
    client: Client,
    server: Server,
    child: subprocess.Popen[bytes],
    log: Log,
    deadline: float,
    seconds: float,
) -> None:
    while True:
        if child.poll() is not None:
            raise ServerError(f"tritonserver did not start: {log.cause()}")
        try:
            name = client.server_name()
        except ServerError as error:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"tritonserver was not ready in {seconds:g} s; its log ends: {log.cause()}"
                ) from error
            time.sleep(POLL_SECONDS)
            continue
        if name != server.id:
            raise PipelineError(f"{client.endpoint} is another server ({name}): choose other ports")
        return

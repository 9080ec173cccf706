"""A tritonserver's processes: start them, wait for them, find them, remove all that they leave."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError, ServerError
from pipeline.core.paths import require_printable
from pipeline.serving import tritonserver
from pipeline.serving.settings import ServeConfig

POLL_SECONDS = 0.05
KILL_SECONDS = 5.0  # within which a killed process has ended
END_SECONDS = tritonserver.EXIT_SECONDS + 2.0  # within which an idle server ends


# Environment variable that identifies all processes of a server, whatever their names.
MARK = "PIPELINE_SERVER_ID"


@contextlib.contextmanager
def handle_signals(
    handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], Any]],
) -> Iterator[None]:
    """Use these signal handlers in the block; do nothing outside the main thread.

    Only the main thread receives signals.
    """
    pairs = handlers.items() if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, handler) for number, handler in pairs}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_by_sigterm() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM end the block as Ctrl-C does, unless SIGTERM already has a handler."""
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return handle_signals({signal.SIGTERM: signal.default_int_handler} if is_free else {})


def poll(seconds: float) -> Iterator[None]:
    """Yield repeatedly, with a pause of POLL_SECONDS each time, until `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class ServerProcess:
    """A tritonserver that was started: its process, its key, and its part of a log."""

    id: str
    admin_key: str
    runtime: tritonserver.ServerRuntime
    config: ServeConfig
    child: subprocess.Popen[bytes]
    log: Path
    log_start: int  # byte offset of this server's part; earlier servers wrote the rest

    def await_answer(self, seconds: float) -> None:
        """Return once the server answers over HTTP and gRPC.

        Raises ServerError if it died or takes too long, and PipelineError if another server answers
        at its ports.
        """
        deadline = time.monotonic() + seconds
        for scheme, port in (("http", self.config.http_port), ("grpc", self.config.grpc_port)):
            with Client(f"{scheme}://127.0.0.1:{port}", timeout=2.0, retries=0) as client:
                name = None
                while name is None:
                    if self.child.poll() is not None:
                        raise self.start_error()
                    try:
                        name = client.server_name()
                    except ServerError as error:
                        if time.monotonic() > deadline:
                            raise self.start_error() from error
                        time.sleep(POLL_SECONDS)
                if name != self.id:
                    problem = f"{client.endpoint} is another server ({name})"
                    raise PipelineError(f"{problem}: choose other ports")

    def start_error(self, is_refused: bool = False) -> ServerError:
        """Return the error for a server that ended, refused a model, or takes too long to start."""
        if is_refused or self.child.poll() is not None:
            return ServerError(f"tritonserver did not start: {self.cause()}")
        seconds = self.config.start_seconds
        return ServerError(f"tritonserver was not ready in {seconds:g} s. Its log: {self.cause()}")

    def read_log(self, start: int) -> str:
        """Return the log from byte `start` on."""
        with self.log.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def cause(self) -> str:
        """Return, in one line, the error in the server's log that explains the other errors."""
        return tritonserver.find_cause(self.read_log(self.log_start))


@contextlib.contextmanager
def launch(
    runtime: tritonserver.ServerRuntime,
    repository: Path,
    config: ServeConfig,
    log: Path | None = None,
) -> Iterator[ServerProcess]:
    """Start a tritonserver on `repository`, with no model loaded; stop it at the end of the block.

    Its processes form their own process group. After the block only `log` is left; without `log`,
    the server writes its log to its temporary folder.
    """
    require_printable(repository)
    server_id, key = f"handwriting-{secrets.token_hex(6)}", secrets.token_urlsafe(24)
    parent = tritonserver.scratch_parent()
    with tempfile.TemporaryDirectory(prefix=f"{server_id}-", dir=parent) as folder:
        scratch = Path(folder)
        log, backends = log or scratch / "server.log", scratch / "backends"
        runtime, source = tritonserver.link_plain_paths(runtime, repository, scratch)
        if runtime.kind == "wheel":
            tritonserver.copy_backends(runtime, backends)
        command = tritonserver.build_command(runtime, source, config, server_id, key, backends)
        log.parent.mkdir(parents=True, exist_ok=True)
        with end_by_sigterm():
            with log.open("ab") as output:
                start = output.tell()
                child = subprocess.Popen(
                    command,
                    env={**tritonserver.build_environment(runtime), MARK: server_id},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            try:
                yield ServerProcess(server_id, key, runtime, config, child, log, start)
            finally:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(END_SECONDS)
                clear(server_id, runtime.kind)
                child.wait()


def find_processes(server_id: str) -> list[int]:
    """Return the PIDs of the server's processes: tritonserver, its stubs, or docker's command."""
    import psutil  # slow to import, and 'pipeline query' does not need it

    # The environment of another user's process is None, and that of a dead process is empty.
    processes = psutil.process_iter(["environ"])
    return [p.pid for p in processes if (p.info["environ"] or {}).get(MARK) == server_id]


def find_dead_children(pid: int) -> list[int]:
    """Return the zombie children of `pid`: stubs that died and that it has not noticed yet."""
    import psutil

    processes, zombie = psutil.process_iter(["ppid", "status"]), (pid, psutil.STATUS_ZOMBIE)
    return [p.pid for p in processes if (p.info["ppid"], p.info["status"]) == zombie]


def clear(server_id: str, runtime: str) -> None:
    """Kill a server's processes, then remove its shared memory and scratch folders."""
    if runtime == "docker" and (docker := shutil.which("docker")):
        # The container outlives the command that started it.
        subprocess.run([docker, "rm", "--force", server_id], capture_output=True, check=False)
    for _ in poll(KILL_SECONDS):
        # Search every time: a process that is just starting is not recognized yet.
        left = find_processes(server_id)
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # in a container
                os.kill(pid, signal.SIGKILL)
    # Only now: a process that still ran could create another region.
    for region in Path("/dev/shm").glob(f"{server_id}*"):
        region.unlink(missing_ok=True)
    for scratch in tritonserver.scratch_parent().glob(f"{server_id}-*"):
        shutil.rmtree(scratch, ignore_errors=True)

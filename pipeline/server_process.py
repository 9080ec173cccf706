"""A tritonserver's processes: started, found, and cleared with all that they left."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline import tritonserver
from pipeline.config import ServeConfig
from pipeline.paths import require_printable
from pipeline.running import start_time

POLL_SECONDS = 0.05
KILL_SECONDS = 5.0  # in which a killed process is gone
END_SECONDS = tritonserver.EXIT_SECONDS + 2.0  # in which a server ends that has nothing to do


# In the environment of all of a server's processes, whatever they are called.
MARK = "PIPELINE_SERVER_ID"


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, unless there is a handler for it already."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def launched(
    runtime: tritonserver.Runtime,
    repository: Path,
    config: ServeConfig,
    server_id: str,
    admin_key: str,
    log: Path | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start a tritonserver on `repository`; the process and its log, all gone after the block.

    Without `log`, the log is in the server's temporary folder.
    """
    require_printable(repository)
    parent = tritonserver.scratch_parent()
    with tempfile.TemporaryDirectory(prefix=f"{server_id}-", dir=parent) as folder:
        scratch = Path(folder)
        log, backends = log or scratch / "server.log", scratch / "backends"
        runtime, shown = tritonserver.plain_paths(runtime, repository, scratch)
        if runtime.kind == "wheel":
            tritonserver.lay_out_backends(runtime, backends)
        command = tritonserver.command(runtime, shown, config, server_id, admin_key, backends)
        with process(command, runtime, log, server_id) as child:
            yield child, log


@contextlib.contextmanager
def process(
    command: list[str], runtime: tritonserver.Runtime, log: Path, server_id: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process in a group of its own, which ends with the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with ended_by_sigterm():
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                env={**tritonserver.environment(runtime), MARK: server_id},
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
    """Return the server's living processes: tritonserver, its stubs, or a container's command."""
    mark, pids = f"{MARK}={server_id}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is another user's
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
    return [pid for pid in pids if start_time(pid) is not None]


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
    deadline = time.monotonic() + KILL_SECONDS
    # Each time anew: one that is just being started has no command line yet.
    while (left := processes_of(server_id)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # a container's own
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    # Only now: a process that still ran could make another.
    for region in Path("/dev/shm").glob(f"{server_id}*"):
        region.unlink(missing_ok=True)
    for scratch in tritonserver.scratch_parent().glob(f"{server_id}-*"):
        shutil.rmtree(scratch, ignore_errors=True)

"""One run of a tritonserver: start it, wait until it answers its golden sets correctly, stop it."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.core.errors import PipelineError, ServerError
from pipeline.core.files import write_json
from pipeline.core.paths import Paths
from pipeline.repository.lint.check import require_loadable
from pipeline.repository.release import Release, load_selected_releases
from pipeline.repository.running import Server, root, start_time
from pipeline.serving import ready, tritonserver
from pipeline.serving.admin import Admin
from pipeline.serving.process import ServerProcess, launch, poll
from pipeline.serving.settings import ServeConfig

FIX = "Check the server's environment, then package the model again"
Releases = Mapping[str, Release]  # by model
LOG_BYTES = 16 * 1024 * 1024  # of the server's log; one older generation is kept


def with_free_ports(config: ServeConfig) -> ServeConfig:
    """Return `config` with three different ports on which nothing listens at the moment."""
    with contextlib.ExitStack() as stack:
        # Hold all until the last one is known: the system may return a released port again.
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        http, grpc, metrics = (int(probe.getsockname()[1]) for probe in probes)
    return replace(config, http_port=http, grpc_port=grpc, metrics_port=metrics)


@contextlib.contextmanager
def run_server(
    paths: Paths,
    config: ServeConfig,
    is_recorded: bool = False,
    report: Callable[[str], None] = lambda line: None,
    restarts: int = 0,
    why: str = "",
    checked: set[str] | None = None,
) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """Start a server that answers its golden sets correctly; stop it at the end of the block.

    `restarts` counts the servers that the supervisor ran before this one, and `why` says why the
    last of them ended. `checked` holds the digests of the models that answered correctly on them; a
    recorded server first loads any other model under a separate name that no client knows.

    Raises PipelineError if a port is taken or no runtime is available, CheckFailedError if the
    server gives incorrect answers, CorruptError if a packaged file changed, and ServerError if the
    server does not start.
    """
    releases = load_selected_releases(paths, config.profile)
    digests = {release.sha256 for release in releases.values()}
    if not restarts:
        require_loadable(paths.repository)
    runtime = tritonserver.find_runtime(paths, config.runtime)
    if config.host != "127.0.0.1" and runtime.kind == "wheel":
        raise PipelineError("the wheel's tritonserver is too old for a network: use 127.0.0.1")
    for service, port, error in tritonserver.find_taken_ports(config):
        fix = f"choose another port with --{service}-port, or free ones with --port auto"
        raise PipelineError(f"port {port} ({service}) is taken: {fix}") from error
    report(f"starting {runtime}")
    log = paths.server_log if is_recorded else None
    with launch(runtime, paths.repository, config, log) as process:
        server = _describe(paths, process, releases, restarts, why)
        if is_recorded:
            write_record(paths, server)
        # Without a record, no client knows the server's address.
        unchecked = digests - (checked or set()) if is_recorded else set()
        await_ready(paths, server, process, releases, unchecked)
        if checked is not None:
            checked |= digests
        server = replace(server, is_ready=True, ready_at=time.time())
        if is_recorded:
            write_record(paths, server)
        yield server, process.child


def _describe(
    paths: Paths, process: ServerProcess, releases: Releases, restarts: int, why: str
) -> Server:
    """Return the record of a server that is starting, under this process as its supervisor."""
    return Server(
        id=process.id,
        pid=process.child.pid,
        start_time=start_time(process.child.pid) or 0,
        supervisor_pid=os.getpid(),
        supervisor_start_time=start_time(os.getpid()) or 0,
        http_port=process.config.http_port,
        grpc_port=process.config.grpc_port,
        metrics_port=process.config.metrics_port,
        admin_key=process.admin_key,
        runtime=process.runtime.kind,
        profile=process.config.profile,
        models={name: release.version for name, release in releases.items()},
        is_ready=False,
        ready_at=0.0,
        restarts=restarts,
        why=why,
        root=root(paths),
    )


def bound_log(path: Path, limit: int = LOG_BYTES) -> None:
    """Truncate a log longer than `limit` bytes; copy its content to a file ending in `.1`."""
    if path.stat().st_size > limit:
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)  # safe, as all writers append


def drain(server: Server, seconds: float, report: Callable[[str], None]) -> None:
    """Let a server answer all accepted requests and refuse new ones.

    Triton's own shutdown still accepts requests on open connections and closes them in the middle
    of an answer. Calls `report` if it takes longer than `seconds` or the server does not answer.
    """
    with (
        contextlib.suppress(PipelineError),
        Admin(server.grpc_url, server.admin_key, seconds) as admin,
    ):
        loaded = {name for (name, _), state in admin.states().items() if state == "READY"}
        for name in sorted(loaded):
            admin.unload(name)
        for _ in poll(seconds):
            states = admin.states().items()
            if all(s == "UNAVAILABLE" for (name, _), s in states if name in loaded):
                return
    report(f"the server was not drained in {seconds:g} s: accepted requests may get no answer")


def write_record(paths: Paths, server: Server) -> None:
    """Write server.json, readable by its owner only: it holds the admin key."""
    previous = os.umask(0o077)
    try:
        write_json(paths.server, asdict(server))
    finally:
        os.umask(previous)


def await_ready(
    paths: Paths, server: Server, process: ServerProcess, releases: Releases, unchecked: set[str]
) -> None:
    """Return once all models answer their golden sets correctly over HTTP and gRPC."""
    deadline = time.monotonic() + process.config.start_seconds
    process.await_answer(process.config.start_seconds)
    left = max(1.0, deadline - time.monotonic())
    try:
        with Admin(server.grpc_url, server.admin_key, left) as admin:
            for name, release in releases.items():
                what = f"{name} version {release.version}"
                if release.sha256 in unchecked:
                    ready.check_candidate(paths.named(name), server, admin, release, FIX)
                with ready.explain_refusal(what, FIX):
                    admin.load(name)
                ready.require_golden(server, name, release, what, FIX)
    except (ready.NotLoadedError, ServerError) as error:
        raise process.start_error(isinstance(error, ready.NotLoadedError)) from error

"""The server that `pipeline serve` keeps: in the foreground, detached, asked how it is, stopped."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from pipeline.config import ServeConfig
from pipeline.errors import CheckFailedError, CorruptError, PipelineError, ServerError
from pipeline.files import locked
from pipeline.golden import require
from pipeline.paths import Paths
from pipeline.query import Client
from pipeline.replay import replay_golden, selected_releases
from pipeline.serve import POLL_SECONDS, Server, clear, is_alive, recorded, running_server
from pipeline.tritonserver import ports


def serve(
    paths: Paths,
    config: ServeConfig,
    on_ready: Callable[[Server], None],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve the repository until Ctrl-C (KeyboardInterrupt) or SIGTERM (it returns).

    Raises ServerError when the server dies before.
    """
    refuse_second(paths)
    is_terminated = False

    def end(number: int, frame: object) -> None:
        nonlocal is_terminated
        is_terminated = number == signal.SIGTERM
        for other in signals:  # what follows is bounded, and is not to be interrupted
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    # Both by name: a shell starts a background job with SIGINT ignored.
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, end) for number in signals}
    try:
        with running_server(paths, config, is_recorded=True, report=report) as (server, child):
            on_ready(server)
            code = child.wait()
            what = f"signal {-code}" if code < 0 else f"exit status {code}"
            raise ServerError(
                f"tritonserver died ({what}): see {paths.server_log}; "
                "'pipeline serve' starts it again"
            )
    except KeyboardInterrupt:
        paths.supervisor_log.unlink(missing_ok=True)  # it ended as it should: no last words
        if not is_terminated:
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def detach(paths: Paths, config: ServeConfig) -> Server:
    """Start `pipeline serve` in a session of its own; return once its server is ready.

    Raises what that command failed with.
    """
    with locked(paths.exported / ".serve.lock"):
        refuse_second(paths)
        pid = _spawn(paths, config)
        try:
            return _await_ready(paths, config, pid)
        except BaseException:  # Ctrl-C too: what is not ready is not left behind
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
            raise


def _spawn(paths: Paths, config: ServeConfig) -> int:
    """Start `pipeline serve`; its pid. Not a Popen, which would be answerable for its end."""
    options = [f"--{service}-port={port}" for service, port in ports(config).items()]
    command = [sys.executable, "-m", "pipeline", "--root", str(paths.root), "serve", *options]
    command += [f"--runtime={config.runtime}", f"--start-seconds={config.start_seconds}"]
    command += [f"--profile={config.profile}"] if config.profile else []
    log = os.open(paths.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    streams = [(os.POSIX_SPAWN_DUP2, log, stream) for stream in (1, 2)]
    silence = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    try:
        return os.posix_spawn(
            sys.executable, command, os.environ, file_actions=silence + streams, setsid=True
        )
    finally:
        os.close(log)


def _await_ready(paths: Paths, config: ServeConfig, pid: int) -> Server:
    # The command has a deadline of its own; this one only guards against a hang of its Python.
    deadline = time.monotonic() + config.start_seconds + 30
    while True:
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            kinds = {kind.exit_code: kind for kind in (CheckFailedError, CorruptError, ServerError)}
            kind = kinds.get(os.waitstatus_to_exitcode(code), PipelineError)
            raise kind(_last_words(paths) or f"see {paths.supervisor_log}")
        server = recorded(paths)
        if server and server.supervisor_pid == pid and server.is_ready:
            return server
        if time.monotonic() > deadline:
            raise ServerError(f"the server's supervisor hangs: see {paths.supervisor_log}")
        time.sleep(POLL_SECONDS)


def _last_words(paths: Paths) -> str:
    """The error that ended the last detached server; empty when none did."""
    if not paths.supervisor_log.exists():
        return ""
    return paths.supervisor_log.read_text(errors="replace").partition("Error: ")[2].strip()


def refuse_second(paths: Paths) -> None:
    """Raise PipelineError when our server runs already; clear what a dead one left."""
    server = recorded(paths)
    if server is None:
        return
    if is_alive(server.supervisor_pid, server.supervisor_start_time):
        raise PipelineError(
            f"a server runs already (pid {server.pid}, {server.http_url}): "
            "stop it with 'pipeline serve stop'"
        )
    clear_dead(paths, server)


def clear_dead(paths: Paths, server: Server) -> None:
    """Remove what is left of a server whose supervisor was killed."""
    clear(server.id)
    paths.server.unlink(missing_ok=True)


def _await_end(pid: int, started: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid, started):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def stop(paths: Paths, seconds: float = ServeConfig.stop_seconds + 5) -> str:
    """Stop the recorded server and say what was done; ServerError when there is none."""
    server = recorded(paths)
    if server is None:
        raise ServerError("no server of ours is running")
    if is_alive(server.supervisor_pid, server.supervisor_start_time):
        os.kill(server.supervisor_pid, signal.SIGTERM)
        if not _await_end(server.supervisor_pid, server.supervisor_start_time, seconds):
            os.kill(server.supervisor_pid, signal.SIGKILL)
            clear_dead(paths, server)
            return f"killed the server (pid {server.pid}): it did not stop in {seconds:g} s"
        return f"stopped the server (pid {server.pid})"
    was_alive = is_alive(server.pid, server.start_time)
    clear_dead(paths, server)
    return f"cleared a {'server without supervisor' if was_alive else 'dead server'}"


def status(paths: Paths) -> dict[str, Any]:
    """What the recorded server is and does, after it answered its golden sets just now.

    Raises ServerError when there is none or it is dead, CheckFailedError when it answers wrongly.
    """
    server = recorded(paths)
    if server is None:
        said = _last_words(paths)
        ended = f"; the last one ended with: {said}" if said else ": 'pipeline serve' starts one"
        raise ServerError(f"no server of ours is running{ended}")
    if not is_alive(server.pid, server.start_time):
        raise ServerError(
            f"the server (pid {server.pid}) is dead, although {paths.server} speaks of it: "
            "'pipeline serve' starts it again"
        )
    if not is_alive(server.supervisor_pid, server.supervisor_start_time):
        raise ServerError(
            f"the server (pid {server.pid}) runs without its supervisor, which was killed: "
            "'pipeline serve stop' clears it, 'pipeline serve' starts afresh"
        )
    if not server.is_ready:
        raise ServerError(f"the server (pid {server.pid}) is starting: ask again in a moment")
    digests = {}
    for name, release in selected_releases(paths).items():
        if name not in server.models:
            continue
        for url in (server.http_url, server.grpc_url):
            with Client(url, name, timeout=5.0) as client:
                agreement = replay_golden(client, release.golden)
            require(agreement, f"{name} answers wrongly over {url}", "Restart it, or package anew")
        digests[name] = {"version": server.models[name], "sha256": release.sha256}
    return {
        "pid": server.pid,
        "http": server.http_url,
        "grpc": server.grpc_url,
        "metrics": f"http://127.0.0.1:{server.metrics_port}/metrics",
        "runtime": server.runtime,
        "models": digests,
        "answers": "right, on its golden sets over HTTP and gRPC just now",
    }

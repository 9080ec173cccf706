"""Supervisor of the server that `pipeline serve` runs, in the foreground or detached.

A canary asks the running server every second whether it still answers correctly; a server that
dies or answers wrongly is started again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.client.client import Client
from pipeline.core.errors import (
    CheckFailedError,
    CorruptError,
    PipelineError,
    ServerError,
    SlowError,
)
from pipeline.core.files import locked, remove
from pipeline.core.paths import Paths
from pipeline.repository.golden import compare_golden
from pipeline.repository.lint.check import require_loadable
from pipeline.repository.release import Release, load_release, selected_releases
from pipeline.serving import state
from pipeline.serving.process import (
    END_SECONDS,
    POLL_SECONDS,
    clear,
    dead_children,
    end_by_sigterm,
    handle_signals,
    poll,
    processes_of,
)
from pipeline.serving.serve import Server, bound_log, drain, is_alive, load_server, running_server
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import ports

RESTART = signal.SIGUSR1  # asks a supervisor to restart its server
YOUNG_SECONDS = 10.0  # a server that ends before this age counts as an early death
Child = subprocess.Popen[bytes]


class _Asked:
    """Requests that this process received as signals: to restart the server, or to end."""

    def __init__(self) -> None:
        self.to_restart = False
        self.to_end = False
        # SIGINT (Ctrl-C) is set explicitly, because a shell's background job ignores it.
        ending = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._end)
        self.handlers = {**ending, RESTART: self._restart}

    def _end(self, number: int, frame: object) -> None:
        self.to_end = number != signal.SIGINT
        for other in self.handlers:  # the shutdown has deadlines and must not be interrupted
            if other != RESTART:
                signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    def _restart(self, number: int, frame: object) -> None:
        self.to_restart = True


def serve_repository(
    paths: Paths,
    config: ServeConfig,
    on_ready: Callable[[Server], None],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve the repository until Ctrl-C (raises KeyboardInterrupt) or SIGTERM (returns).

    A server that dies or answers wrongly is started again. If the first start fails, raises its
    error; if `config.failed_starts` later starts fail in a row, raises ServerError.
    """
    asked = _Asked()
    taken = "another 'pipeline serve' runs here: stop it with 'pipeline serve stop'"
    with locked(_lock(paths), taken), handle_signals(asked.handlers):
        refuse_second(paths)
        remove(paths.server_log)
        try:
            _lives(paths, config, on_ready, report, asked)
        except KeyboardInterrupt:
            paths.supervisor_log.unlink(missing_ok=True)  # ended normally: no last error to report
            if not asked.to_end:
                raise
        finally:
            paths.server.unlink(missing_ok=True)


def _lives(
    paths: Paths,
    config: ServeConfig,
    on_ready: Callable[[Server], None],
    report: Callable[[str], None],
    asked: _Asked,
) -> None:
    """Run one server after the other, until a signal or too many failed starts."""
    restarts, failed, early, why = 0, 0, 0, ""
    proven: set[str] = set()
    while True:
        lived, asked.to_restart = 0.0, False
        try:
            starting = running_server(paths, config, True, report, restarts, why, proven)
            with starting as (server, child):
                began = time.monotonic()
                if restarts:
                    report(f"ready again (pid {server.pid})")
                else:
                    on_ready(server)
                failed = 0
                why = _life(paths, config, server, child, asked, report)
                lived = time.monotonic() - began
        except PipelineError as error:
            failed += 1
            if not restarts:
                raise
            why = f"it did not start ({error})"
            if failed == config.failed_starts:
                text = f"gave up after {failed} failed starts in a row: {why}"
                raise ServerError(text) from error
        early = early + 1 if 0 < lived < YOUNG_SECONDS and not asked.to_restart else 0
        pause = pause_after(failed, early)
        report(f"{why}: starting it again" + (f" in {pause:g} s" if pause else ""))
        restarts += 1
        time.sleep(pause)


def _life(
    paths: Paths,
    config: ServeConfig,
    server: Server,
    child: Child,
    asked: _Asked,
    report: Callable[[str], None],
) -> str:
    """Watch a server until it must be restarted; return why. A restart on request drains it."""
    canary = Canary(paths, server, selected_releases(paths, config.profile))
    seconds = config.stop_seconds - END_SECONDS
    try:
        why = watch_server(
            child, canary, paths.server_log, lambda: asked.to_restart, config.canary_seconds
        )
        if asked.to_restart:
            drain(server, seconds, report)
        else:  # there is nothing to wait for
            clear(server.id, server.runtime)
        return why
    except KeyboardInterrupt:
        drain(server, seconds, report)
        raise
    finally:
        canary.close()


def detach(paths: Paths, config: ServeConfig) -> Server:
    """Start `pipeline serve` in a new process session; return once its server is ready.

    Raises the error that the command failed with.
    """
    with end_by_sigterm(), locked(paths.exported / ".serve.lock"):
        refuse_second(paths)
        options = [f"--{service}-port={port}" for service, port in ports(config).items()]
        options += [f"--profile={config.profile}"] if config.profile else []
        command = [sys.executable, "-m", "pipeline", "--root", str(paths.root), "serve", *options]
        command += [f"--runtime={config.runtime}", f"--start-seconds={config.start_seconds}"]
        log = os.open(paths.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        streams = [(os.POSIX_SPAWN_DUP2, log, stream) for stream in (1, 2)]
        silence = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        try:  # not Popen, which would have to wait for its end
            pid = os.posix_spawn(
                sys.executable, command, os.environ, file_actions=silence + streams, setsid=True
            )
        finally:
            os.close(log)
        try:
            return _await_ready(paths, config, pid)
        except BaseException:  # also Ctrl-C and SIGTERM: leave no unready server behind
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
            raise


def _await_ready(paths: Paths, config: ServeConfig, pid: int) -> Server:
    # The command has its own deadline; this one only guards against a hang of its process.
    for _ in poll(config.start_seconds + 30):
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            kinds = {kind.exit_code: kind for kind in (CheckFailedError, CorruptError, ServerError)}
            kind = kinds.get(os.waitstatus_to_exitcode(code), PipelineError)
            if not paths.supervisor_log.exists():
                raise kind("it was stopped before it was ready")
            raise kind(state.last_words(paths) or f"see {paths.supervisor_log}")
        server = load_server(paths)
        if server and server.supervisor_pid == pid and server.is_ready:
            return server
    raise ServerError(f"the server's supervisor hangs: see {paths.supervisor_log}")


def _lock(paths: Paths) -> Path:
    """Return the file that a supervisor keeps locked while it runs."""
    return paths.exported / ".supervisor.lock"


def _is_supervised(paths: Paths, server: Server) -> bool:
    """Return whether the recorded supervisor runs and has our lock file open.

    PID and start time alone may match another process, for example after a reboot, and that process
    would receive our signals.
    """
    if not is_alive(server.supervisor_pid, server.supervisor_start_time):
        return False
    # Not psutil's open_files(): one file that cannot be read would hide all others, and a running
    # server would be considered dead and killed.
    with contextlib.suppress(OSError):  # the process just ended, or belongs to another user
        for opened in Path(f"/proc/{server.supervisor_pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if opened.samefile(_lock(paths)):
                    return True
    return False


def refuse_second(paths: Paths) -> None:
    """Raise PipelineError if our server already runs; remove what a dead server left."""
    server = load_server(paths)
    if server is None:
        return
    if _is_supervised(paths, server):
        raise PipelineError(
            f"a server runs already (pid {server.pid}, {server.http_url}): "
            "stop it with 'pipeline serve stop'"
        )
    clear_dead(paths, server)


def clear_dead(paths: Paths, server: Server) -> None:
    """Remove everything that is left of a server whose supervisor was killed."""
    clear(server.id, server.runtime)
    paths.server.unlink(missing_ok=True)


def restart(paths: Paths, seconds: float = ServeConfig.start_seconds + 30) -> Server:
    """Drain and restart our server; return it once it is ready.

    Raises ServerError if there is no server or it does not come back. Raises the repository's error
    if it cannot be served; then the server keeps running unchanged.
    """
    before = load_server(paths)
    if before is None or not _is_supervised(paths, before):
        raise ServerError("no server of ours is running: 'pipeline serve' starts one")
    # Check first: with a repository that cannot be served, the running server must not stop.
    selected_releases(paths, before.profile)
    require_loadable(paths.repository)
    os.kill(before.supervisor_pid, RESTART)
    for _ in poll(seconds):
        now = load_server(paths)
        if now and now.id != before.id and now.is_ready:
            return now
        if not _is_supervised(paths, before):
            why = state.last_words(paths) or "the server ended instead of starting anew"
            raise ServerError(why)
    raise ServerError(f"the server did not come back in {seconds:g} s: 'pipeline serve logs'")


def stop(paths: Paths, seconds: float = ServeConfig.stop_seconds + 5) -> str:
    """Stop the recorded server and describe what was done; ServerError if there is none."""
    server = load_server(paths)
    if server is None:
        raise ServerError("no server of ours is running")
    if not _is_supervised(paths, server):
        was_alive = server.pid in processes_of(server.id)
        clear_dead(paths, server)
        return f"cleared a {'server without supervisor' if was_alive else 'dead server'}"
    os.kill(server.supervisor_pid, signal.SIGTERM)
    for _ in poll(seconds):
        if not is_alive(server.supervisor_pid, server.supervisor_start_time):
            return f"stopped the server (pid {server.pid})"
    os.kill(server.supervisor_pid, signal.SIGKILL)
    clear_dead(paths, server)
    return f"killed the server (pid {server.pid}): it did not stop in {seconds:g} s"


MISSES = 3  # in a row, after which a server is considered dead
CANARY_TIMEOUT = 1.0  # seconds
LONGEST_PAUSE = 8.0  # seconds before a restart


def pause_after(failed_starts: int, early_deaths: int) -> float:
    """Return the seconds to wait before the next start, which grow with each failure in a row.

    `failed_starts` counts starts that failed in a row, and `early_deaths` servers in a row that
    ended soon after they became ready; the first early death costs no wait.
    """
    after_failures = 2.0 ** (failed_starts - 1) if failed_starts else 0.0
    after_deaths = min(4.0, max(0.0, early_deaths - 1.0))
    return min(LONGEST_PAUSE, max(after_failures, after_deaths))


class Canary:
    """Requests with known answers to each model of a server, alternately over gRPC and HTTP."""

    def __init__(self, paths: Paths, server: Server, releases: Mapping[str, Release]) -> None:
        self.paths, self.server = paths, server
        self.known = {name: (r.version, r.golden) for name, r in releases.items()}
        urls = (server.grpc_url, server.http_url)
        # No retries: the canary must see every miss.
        self.clients = {
            name: [Client(url, name, CANARY_TIMEOUT, retries=0) for url in urls]
            for name in releases
        }
        self.asked = 0
        self.misses = 0  # in a row
        self.answered = 0  # requests of all clients, counted at the last late answer

    def ask(self) -> str | None:
        """Ask each model about one image; return what is wrong with the server, or None.

        A request without an answer is a miss. The server is considered dead at the third miss in a
        row, or at the first if a process that Triton started has died. A late answer is not a miss
        if other requests were answered since the last late one: a busy server must not be stopped.
        """
        self.asked += 1
        for name, clients in self.clients.items():
            try:
                wrong = self._ask(name, clients[self.asked % len(clients)])
            except PipelineError as error:
                if dead_children(self.server.pid):
                    return f"{name}'s process died"
                if isinstance(error, SlowError):
                    before, self.answered = self.answered, 0
                    with contextlib.suppress(ServerError):
                        loads = state.loads(self.server.metrics_url, CANARY_TIMEOUT / 2)
                        self.answered = sum(load.requests for load in loads.values())
                    if self.answered > before:
                        continue
                self.misses += 1
                what = str(error).split(": ")[0]  # without the advice, meant for users
                return f"{name} gives no answer ({what})" if self.misses >= MISSES else None
            else:
                if wrong:
                    return wrong
        self.misses = 0
        return None

    def close(self) -> None:
        """Close the connections of all clients."""
        for clients in self.clients.values():
            for client in clients:
                client.close()

    def _ask(self, name: str, client: Client) -> str | None:
        version, golden = self.known[name]
        one = golden.select([self.asked % len(golden.images)])
        outputs, answered = client.infer(one.images)
        if int(answered) != version:  # a promotion happened: use the new version's golden set
            release = load_release(self.paths.named(name), int(answered))
            self.known[name] = release.version, release.golden
            return None
        result = compare_golden(one, lambda images: outputs, (1,))
        return None if result.passed else f"{name} version {version} answers wrongly"


def watch_server(
    child: subprocess.Popen[bytes],
    canary: Canary,
    log: Path,
    is_asked: Callable[[], bool],
    seconds: float,
) -> str:
    """Watch a server; return why it must be restarted: it died, answers wrongly, or on request.

    Runs the canary every `seconds`, and immediately after a miss; bounds the log's size.
    """
    due = time.monotonic()
    while not is_asked():
        code = child.poll()
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            return f"tritonserver died ({how})"
        if time.monotonic() >= due:
            if wrong := canary.ask():
                return wrong
            bound_log(log)
            due = time.monotonic() + (POLL_SECONDS if canary.misses else seconds)
        time.sleep(POLL_SECONDS)
    return "asked to"

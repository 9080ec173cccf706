"""Supervisor of the server that `pipeline serve` runs, in the foreground or detached.

A canary asks the running server every second whether it still answers correctly; a server that
dies or gives incorrect answers is restarted.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from pipeline.repository.release import Release, load_release, load_selected_releases
from pipeline.repository.running import Server, is_alive, load_server
from pipeline.serving import process, state
from pipeline.serving.serve import bound_log, drain, run_server
from pipeline.serving.settings import ServeConfig

RESTART = signal.SIGUSR1  # asks a supervisor to restart its server
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SEE_LOGS = "look at 'pipeline serve logs'"
YOUNG_SECONDS = 10.0  # a server that ends before this age counts as an early death
Child = subprocess.Popen[bytes]


def serve_repository(
    paths: Paths,
    config: ServeConfig,
    on_ready: Callable[[Server], None],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve the repository until Ctrl-C (raises KeyboardInterrupt) or SIGTERM (returns).

    A server that dies or gives incorrect answers is restarted. If the first start fails, raises its
    error; if `config.failed_starts` later starts fail in a row, raises ServerError.
    """
    supervisor = _Supervisor(paths, config, on_ready, report)
    # SIGINT (Ctrl-C) is set explicitly, because a shell's background job ignores it.
    handlers = dict.fromkeys(ENDING, supervisor.end) | {RESTART: supervisor.request_restart}
    busy = "another 'pipeline serve' is running here: stop it with 'pipeline serve stop'"
    with locked(paths.supervisor_lock, busy), process.handle_signals(handlers):
        refuse_second(paths)
        remove(paths.server_log)
        try:
            supervisor.run()
        except KeyboardInterrupt:
            paths.supervisor_log.unlink(missing_ok=True)  # ended normally: no last error to report
            if not supervisor.to_end:
                raise
        finally:
            paths.server.unlink(missing_ok=True)


@dataclass
class _Supervisor:
    """Run of one server after the other, and what signals have requested."""

    paths: Paths
    config: ServeConfig
    on_ready: Callable[[Server], None]
    report: Callable[[str], None]
    to_restart: bool = False
    to_end: bool = False  # by a signal other than Ctrl-C

    def end(self, number: int, frame: object) -> None:
        """Handle a signal to end."""
        self.to_end = number != signal.SIGINT
        for other in ENDING:  # the shutdown has deadlines and must not be interrupted
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    def request_restart(self, number: int, frame: object) -> None:
        """Handle a signal to restart the server."""
        self.to_restart = True

    def run(self) -> None:
        """Run one server after the other, until a signal or too many failed starts."""
        restarts, failed, early, why = 0, 0, 0, ""
        checked: set[str] = set()
        while True:
            lived, self.to_restart = 0.0, False
            start = run_server(self.paths, self.config, True, self.report, restarts, why, checked)
            try:
                with start as (server, child):
                    began = time.monotonic()
                    if restarts:
                        self.report(f"ready again (pid {server.pid})")
                    else:
                        self.on_ready(server)
                    failed = 0
                    why = self.supervise(server, child)
                    lived = time.monotonic() - began
            except PipelineError as error:
                failed += 1
                if not restarts:
                    raise
                why = f"it did not start ({error})"
                if failed == self.config.failed_starts:
                    message = f"gave up after {failed} failed starts in a row: {why}"
                    raise ServerError(message) from error
            early = early + 1 if 0 < lived < YOUNG_SECONDS and not self.to_restart else 0
            pause = choose_pause(failed, early)
            self.report(f"{why}: restarting the server" + (f" in {pause:g} s" if pause else ""))
            restarts += 1
            time.sleep(pause)

    def supervise(self, server: Server, child: Child) -> str:
        """Watch a server until it must be restarted; return why. A restart on request drains it."""
        releases = load_selected_releases(self.paths, self.config.profile)
        seconds = self.config.stop_seconds - process.END_SECONDS
        with contextlib.closing(Canary(self.paths, server, releases)) as canary:
            try:
                why = self.watch(child, canary)
                if self.to_restart:
                    drain(server, seconds, self.report)
                else:  # there is nothing to wait for
                    process.clear(server.id, server.runtime)
                return why
            except KeyboardInterrupt:
                drain(server, seconds, self.report)
                raise

    def watch(self, child: Child, canary: "Canary") -> str:
        """Return why a server must be restarted: it died, answers incorrectly, or on request.

        Runs the canary at its interval, and immediately after a miss; bounds the log's size.
        """
        due = time.monotonic()
        while not self.to_restart:
            code = child.poll()
            if code is not None:
                how = f"signal {-code}" if code < 0 else f"exit status {code}"
                return f"tritonserver died ({how})"
            if time.monotonic() >= due:
                if problem := canary.ask():
                    return problem
                bound_log(self.paths.server_log)
                pause = process.POLL_SECONDS if canary.misses else self.config.canary_seconds
                due = time.monotonic() + pause
            time.sleep(process.POLL_SECONDS)
        return "on request"


def detach(paths: Paths, config: ServeConfig) -> Server:
    """Start `pipeline serve` in a new process session; return once its server is ready.

    Raises the error that the command failed with.
    """
    with process.end_by_sigterm(), locked(paths.exported / ".serve.lock"):
        refuse_second(paths)
        command = [sys.executable, "-m", "pipeline", "--root", str(paths.root), "serve"]
        command += [f"--{service}-port={port}" for service, port in config.ports.items()]
        command += [f"--runtime={config.runtime}", f"--start-seconds={config.start_seconds}"]
        command += [f"--profile={config.profile}"] if config.profile else []
        log = os.open(paths.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        streams: list[Any] = [(os.POSIX_SPAWN_DUP2, log, stream) for stream in (1, 2)]
        streams.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
        options: Any = {"file_actions": streams, "setsid": True}
        try:  # not Popen, which would have to wait for its end
            pid = os.posix_spawn(sys.executable, command, os.environ, **options)
        finally:
            os.close(log)
        try:
            # The command has its own deadline; this one only guards against a hang of its process.
            for _ in process.poll(config.start_seconds + 30):
                ended, code = os.waitpid(pid, os.WNOHANG)
                if ended:
                    kinds = CheckFailedError, CorruptError, ServerError
                    by_code = {kind.exit_code: kind for kind in kinds}
                    kind = by_code.get(os.waitstatus_to_exitcode(code), PipelineError)
                    if not paths.supervisor_log.exists():
                        raise kind("the server was stopped before it was ready")
                    raise kind(state.last_error(paths) or f"the server did not start: {SEE_LOGS}")
                server = load_server(paths)
                if server and server.supervisor_pid == pid and server.is_ready:
                    return server
            raise ServerError(f"the server's supervisor hangs: {SEE_LOGS}")
        except BaseException:  # also Ctrl-C and SIGTERM: leave no unready server behind
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
            raise


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
        for descriptor in Path(f"/proc/{server.supervisor_pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if descriptor.samefile(paths.supervisor_lock):
                    return True
    return False


def refuse_second(paths: Paths) -> None:
    """Raise PipelineError if our server already runs; remove what a dead server left."""
    server = load_server(paths)
    if server and _is_supervised(paths, server):
        which = f"(pid {server.pid}, {server.http_url})"
        raise PipelineError(f"a server {which} is already running: 'pipeline serve stop' stops it")
    if server:
        clear_dead(paths, server)


def clear_dead(paths: Paths, server: Server) -> None:
    """Remove everything that is left of a server whose supervisor was killed."""
    process.clear(server.id, server.runtime)
    paths.server.unlink(missing_ok=True)


def restart(paths: Paths, seconds: float = ServeConfig.start_seconds + 30) -> Server:
    """Drain and restart our server; return it once it is ready.

    Raises ServerError if there is no server or it does not come back. Raises the repository's error
    if it cannot be served; then the server continues unchanged.
    """
    before = load_server(paths)
    if before is None or not _is_supervised(paths, before):
        raise ServerError(f"{state.NO_SERVER}: start one with 'pipeline serve'")
    # Check first: with a repository that cannot be served, the running server must not stop.
    load_selected_releases(paths, before.profile)
    require_loadable(paths.repository)
    os.kill(before.supervisor_pid, RESTART)
    for _ in process.poll(seconds):
        now = load_server(paths)
        if now and now.id != before.id and now.is_ready:
            return now
        if not _is_supervised(paths, before):
            raise ServerError(state.last_error(paths) or f"the server did not restart: {SEE_LOGS}")
    raise ServerError(f"the server did not restart in {seconds:g} s: {SEE_LOGS}")


def stop(paths: Paths, seconds: float = ServeConfig.stop_seconds + 5) -> str:
    """Stop the recorded server and describe what was done; ServerError if there is none."""
    server = load_server(paths)
    if server is None:
        raise ServerError(state.NO_SERVER)
    if not _is_supervised(paths, server):
        was_alive = server.pid in process.find_processes(server.id)
        clear_dead(paths, server)
        return f"removed a {'server without a supervisor' if was_alive else 'dead server'}"
    os.kill(server.supervisor_pid, signal.SIGTERM)
    for _ in process.poll(seconds):
        if not is_alive(server.supervisor_pid, server.supervisor_start_time):
            return f"stopped the server (pid {server.pid})"
    os.kill(server.supervisor_pid, signal.SIGKILL)
    clear_dead(paths, server)
    return f"killed the server (pid {server.pid}): it did not stop in {seconds:g} s"


MISSES = 3  # in a row, after which a server is considered dead
ASK_SECONDS = 1.0  # timeout of an answer
LONGEST_PAUSE = 8.0  # seconds before a restart


def choose_pause(failed_starts: int, early_deaths: int) -> float:
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
        self.paths, self.server, self.releases = paths, server, dict(releases)
        urls = (server.grpc_url, server.http_url)
        stack = contextlib.ExitStack()
        self.close = stack.close
        # No retries: the canary must see every miss.
        self.clients = {
            name: [stack.enter_context(Client(url, name, ASK_SECONDS, retries=0)) for url in urls]
            for name in releases
        }
        self.rounds = 0
        self.misses = 0  # in a row
        self.answered = 0  # requests of all clients, counted at the last late answer

    def ask(self) -> str | None:
        """Ask each model about one image; return what is wrong with the server, or None.

        A request without an answer is a miss. The server is considered dead at the third miss in a
        row, or at the first if a process that Triton started has died. A late answer is not a miss
        if other requests were answered since the last late one: a busy server must not be stopped.
        """
        self.rounds += 1
        for name, clients in self.clients.items():
            try:
                if problem := self._ask(name, clients[self.rounds % len(clients)]):
                    return problem
            except PipelineError as error:
                if process.find_dead_children(self.server.pid):
                    return f"{name}'s process died"
                if isinstance(error, SlowError):
                    before, self.answered = self.answered, 0
                    with contextlib.suppress(ServerError):
                        loads = state.read_loads(self.server.metrics_url, ASK_SECONDS / 2)
                        self.answered = sum(load.requests for load in loads.values())
                    if self.answered > before:
                        continue
                self.misses += 1
                reason = re.split(r"[:.] ", str(error))[0]  # without the advice, meant for users
                return f"{name} does not answer ({reason})" if self.misses >= MISSES else None
        self.misses = 0
        return None

    def _ask(self, name: str, client: Client) -> str | None:
        release = self.releases[name]
        golden = release.golden.select([self.rounds % len(release.golden.images)])
        outputs, version = client.infer(golden.images)
        if int(version) != release.version:  # a promotion happened: use its golden set from now on
            self.releases[name] = load_release(self.paths.named(name), int(version))
            return None
        is_wrong = compare_golden(golden, lambda images: outputs, (1,))
        return f"{name} version {version} gives incorrect answers" if is_wrong else None

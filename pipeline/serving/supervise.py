"""The server that `pipeline serve` keeps: in the foreground or detached, restarted, stopped.

Whether a running server still answers rightly: a canary asks it every second.
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
from pipeline.serving.serve import Server, bound_log, drain, is_alive, recorded, running_server
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import ports

RESTART = signal.SIGUSR1  # asks a supervisor to start its server anew
YOUNG_SECONDS = 10.0  # a server that dies before has not shown that it can live
Child = subprocess.Popen[bytes]


class _Asked:
    """What the signals that this process got have asked for."""

    def __init__(self) -> None:
        self.to_restart = False
        self.to_end = False
        # Ctrl-C is named too, since a shell's background job ignores it.
        ending = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._end)
        self.handlers = {**ending, RESTART: self._restart}

    def _end(self, number: int, frame: object) -> None:
        self.to_end = number != signal.SIGINT
        for other in self.handlers:  # what follows is bounded, and is not to be interrupted
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
    """Serve the repository until Ctrl-C (KeyboardInterrupt) or SIGTERM (it returns).

    A server that dies or answers wrongly is started anew. Raises what the first start failed
    with, and ServerError when that many later ones failed in a row.
    """
    asked = _Asked()
    taken = "another 'pipeline serve' runs here: stop it with 'pipeline serve stop'"
    with locked(_lock(paths), taken), handle_signals(asked.handlers):
        refuse_second(paths)
        remove(paths.server_log)
        try:
            _lives(paths, config, on_ready, report, asked)
        except KeyboardInterrupt:
            paths.supervisor_log.unlink(missing_ok=True)  # it ended as it should: no last words
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
    """One server after the other."""
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
    """Watch a server until it has to be started anew, and why; drained if it can be."""
    canary = Canary(paths, server, selected_releases(paths, config.profile))
    seconds = config.stop_seconds - END_SECONDS
    try:
        why = watch_server(
            child, canary, paths.server_log, lambda: asked.to_restart, config.canary_seconds
        )
        if asked.to_restart:
            drain(server, seconds, report)
        else:  # nothing to be waited for
            clear(server.id, server.runtime)
        return why
    except KeyboardInterrupt:
        drain(server, seconds, report)
        raise
    finally:
        canary.close()


def detach(paths: Paths, config: ServeConfig) -> Server:
    """Start `pipeline serve` in a session of its own; return once its server is ready.

    Raises what that command failed with.
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
        try:  # no Popen, which would be answerable for its end
            pid = os.posix_spawn(
                sys.executable, command, os.environ, file_actions=silence + streams, setsid=True
            )
        finally:
            os.close(log)
        try:
            return _await_ready(paths, config, pid)
        except BaseException:  # Ctrl-C and SIGTERM too: what is not ready is not left behind
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
            raise


def _await_ready(paths: Paths, config: ServeConfig, pid: int) -> Server:
    # The command has a deadline of its own; this one only guards against a hang of its Python.
    for _ in poll(config.start_seconds + 30):
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            kinds = {kind.exit_code: kind for kind in (CheckFailedError, CorruptError, ServerError)}
            kind = kinds.get(os.waitstatus_to_exitcode(code), PipelineError)
            if not paths.supervisor_log.exists():
                raise kind("it was stopped before it was ready")
            raise kind(state.last_words(paths) or f"see {paths.supervisor_log}")
        server = recorded(paths)
        if server and server.supervisor_pid == pid and server.is_ready:
            return server
    raise ServerError(f"the server's supervisor hangs: see {paths.supervisor_log}")


def _lock(paths: Paths) -> Path:
    """Return the file that a supervisor holds locked as long as it lives."""
    return paths.exported / ".supervisor.lock"


def _is_supervised(paths: Paths, server: Server) -> bool:
    """Whether the recorded supervisor runs: that very process, which also has our lock open.

    A pid and a start time alone may be another process's, after a restart of the machine say, and
    what they name here is sent signals.
    """
    if not is_alive(server.supervisor_pid, server.supervisor_start_time):
        return False
    # Not psutil's open_files(): one file that cannot be looked at would hide all of them, and a
    # server that runs would be taken for a dead one and killed.
    with contextlib.suppress(OSError):  # it ended while we looked, or is another user's
        for opened in Path(f"/proc/{server.supervisor_pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if opened.samefile(_lock(paths)):
                    return True
    return False


def refuse_second(paths: Paths) -> None:
    """Raise PipelineError when our server runs already; clear what a dead one left."""
    server = recorded(paths)
    if server is None:
        return
    if _is_supervised(paths, server):
        raise PipelineError(
            f"a server runs already (pid {server.pid}, {server.http_url}): "
            "stop it with 'pipeline serve stop'"
        )
    clear_dead(paths, server)


def clear_dead(paths: Paths, server: Server) -> None:
    """Remove what is left of a server whose supervisor was killed."""
    clear(server.id, server.runtime)
    paths.server.unlink(missing_ok=True)


def restart(paths: Paths, seconds: float = ServeConfig.start_seconds + 30) -> Server:
    """Have our server drained and started anew; return it once it is ready.

    Raises ServerError when there is none, or it does not come back, and what is wrong with the
    repository: then the server goes on as it is.
    """
    before = recorded(paths)
    if before is None or not _is_supervised(paths, before):
        raise ServerError("no server of ours is running: 'pipeline serve' starts one")
    # What it would not start with is no reason to stop what runs.
    selected_releases(paths, before.profile)
    require_loadable(paths.repository)
    os.kill(before.supervisor_pid, RESTART)
    for _ in poll(seconds):
        now = recorded(paths)
        if now and now.id != before.id and now.is_ready:
            return now
        if not _is_supervised(paths, before):
            why = state.last_words(paths) or "the server ended instead of starting anew"
            raise ServerError(why)
    raise ServerError(f"the server did not come back in {seconds:g} s: 'pipeline serve logs'")


def stop(paths: Paths, seconds: float = ServeConfig.stop_seconds + 5) -> str:
    """Stop the recorded server and say what was done; ServerError when there is none."""
    server = recorded(paths)
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


MISSES = 3  # in a row, after which a server is taken for dead
CANARY_TIMEOUT = 1.0  # seconds
LONGEST_PAUSE = 8.0  # seconds before a start


def pause_after(failed_starts: int, early_deaths: int) -> float:
    """Seconds to wait before the next start: none after a single mishap, then ever more.

    `failed_starts` and `early_deaths`, of servers that had just become ready, are in a row.
    """
    after_failures = 2.0 ** (failed_starts - 1) if failed_starts else 0.0
    after_deaths = min(4.0, max(0.0, early_deaths - 1.0))
    return min(LONGEST_PAUSE, max(after_failures, after_deaths))


class Canary:
    """Questions with known answers to each model of a server, over gRPC and HTTP in turn."""

    def __init__(self, paths: Paths, server: Server, releases: Mapping[str, Release]) -> None:
        self.paths, self.server = paths, server
        self.known = {name: (r.version, r.golden) for name, r in releases.items()}
        urls = (server.grpc_url, server.http_url)
        # Not asked again: a miss is what it is there to see.
        self.clients = {
            name: [Client(url, name, CANARY_TIMEOUT, retries=0) for url in urls]
            for name in releases
        }
        self.asked = 0
        self.misses = 0  # in a row
        self.answered = 0  # requests of everybody, when a late answer was last looked into

    def ask(self) -> str | None:
        """Ask each model about one image; what is wrong with the server, or None.

        A question without an answer is a miss, and the third in a row is the server's end, the
        first where a process that Triton started has died. A late
        answer is none where others are answered meanwhile: a server must not be stopped for
        having much to do.
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
                what = str(error).split(": ")[0]  # without the advice: the supervisor follows it
                return f"{name} gives no answer ({what})" if self.misses >= MISSES else None
            else:
                if wrong:
                    return wrong
        self.misses = 0
        return None

    def close(self) -> None:
        """Close its connections."""
        for clients in self.clients.values():
            for client in clients:
                client.close()

    def _ask(self, name: str, client: Client) -> str | None:
        version, golden = self.known[name]
        one = golden.only(self.asked % len(golden.images))
        outputs, answered = client.infer(one.images)
        if int(answered) != version:  # promoted meanwhile: from now on it is asked that one's own
            release = load_release(self.paths.named(name), int(answered))
            self.known[name] = release.version, release.golden
            return None
        agreement = compare_golden(one, lambda images: outputs, (1,))
        return None if agreement.passed else f"{name} version {version} answers wrongly"


def watch_server(
    child: subprocess.Popen[bytes],
    canary: Canary,
    log: Path,
    is_asked: Callable[[], bool],
    seconds: float,
) -> str:
    """Why the server has to be started anew: it died, answers wrongly, or somebody asked for it.

    Asks the canary every `seconds`, and again at once after a miss; keeps the log in bounds.
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

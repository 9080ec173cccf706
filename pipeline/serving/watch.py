"""Whether a running server still answers rightly: a canary asks it every second."""

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError, ServerError, SlowError
from pipeline.core.paths import Paths
from pipeline.repository.golden import compare
from pipeline.repository.release import Release, load_release
from pipeline.serving import metrics
from pipeline.serving.serve import POLL_SECONDS, Server, bound_log, dead_children

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
        self.clients = {n: [_once(u, n) for u in urls] for n in releases}
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
                if not isinstance(error, SlowError) or not self._is_busy():
                    return self._missed(name, error)
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
        agreement = compare(one, lambda images: outputs, (1,))
        return None if agreement.passed else f"{name} version {version} answers wrongly"

    def _missed(self, name: str, error: PipelineError) -> str | None:
        self.misses += 1
        what = str(error).split(": ")[0]  # without the advice: the supervisor follows it
        return f"{name} gives no answer ({what})" if self.misses >= MISSES else None

    def _is_busy(self) -> bool:
        before, self.answered = self.answered, 0
        try:
            found = metrics.loads(self.server.metrics_url, CANARY_TIMEOUT / 2)
        except ServerError:
            return False
        self.answered = sum(load.requests for load in found.values())
        return self.answered > before


def _once(url: str, name: str) -> Client:
    return Client(url, name, CANARY_TIMEOUT, retries=0)  # a miss is what it is there to see


def watch(
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
            return f"tritonserver died ({_ending(code)})"
        if time.monotonic() >= due:
            wrong = canary.ask()
            if wrong:
                return wrong
            bound_log(log)
            due = time.monotonic() + (POLL_SECONDS if canary.misses else seconds)
        time.sleep(POLL_SECONDS)
    return "asked to"


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"

"""The state of the recorded server: its answers, Prometheus counters, record and logs."""

import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from pipeline.client.client import Client
from pipeline.core.errors import ServerError
from pipeline.core.paths import Paths
from pipeline.core.text import Lines, columns
from pipeline.repository.golden import raise_problems
from pipeline.repository.release import Release, load_release
from pipeline.repository.running import Server, is_alive, load_server
from pipeline.serving.process import POLL_SECONDS
from pipeline.serving.ready import ask_version, replay_golden

# Triton's counters for each model and version, and a summary of the last minute's latencies, are
# nv_inference_request_success, _request_failure, _count, _exec_count and _request_summary_us.
PREFIX = "nv_inference_"


@dataclass(frozen=True)
class Load:
    """Counters of a model's version since its server started, the canary's requests included."""

    requests: int  # answered
    failures: int
    mean_batch: float | None  # mean images of an execution; None before the first
    p50_us: float | None  # of requests in the last minute; None without any
    p99_us: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The load's cells in the printed table."""
        batch = "-" if self.mean_batch is None else f"{self.mean_batch:.2f}"
        times = ("-" if us is None else f"{us / 1000:.2f} ms" for us in (self.p50_us, self.p99_us))
        return f"{self.requests:,}", f"{self.failures:,}", batch, *times


def read_loads(url: str, seconds: float = 2.0) -> dict[tuple[str, str], Load]:
    """Return the load of each version, by name and version, from the metrics at `url`.

    Raises ServerError if no answer comes within `seconds`.
    """
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            text = response.read().decode()
    except OSError as error:
        raise ServerError(f"{url} gives no metrics ({error})") from error
    # For each version: values by the series' name, followed by the quantile if it has one.
    by_model: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "model" in sample.labels and sample.value == sample.value:  # NaN: an empty quantile
                model = sample.labels["model"], sample.labels["version"]
                series = sample.name.removeprefix(PREFIX).removesuffix("_total")
                series += sample.labels.get("quantile", "")
                by_model[model][series] += sample.value  # sum of failures over their reasons
    return {
        model: Load(
            requests=int(values["request_success"]),
            failures=int(values["request_failure"]),
            mean_batch=values["count"] / values["exec_count"] if values["exec_count"] else None,
            p50_us=values.get("request_summary_us0.5"),
            p99_us=values.get("request_summary_us0.99"),
        )
        for model, values in by_model.items()
    }


@dataclass(frozen=True)
class ModelState:
    """A served version and its load."""

    version: int
    sha256: str  # of its model.onnx
    load: Load


@dataclass(frozen=True)
class ServerState:
    """A server that runs and answers correctly."""

    server: Server
    uptime_seconds: float
    models: dict[str, ModelState]

    def record(self) -> dict[str, Any]:
        """Return the state as values for JSON."""
        return {
            "pid": self.server.pid,
            "http": self.server.http_url,
            "grpc": self.server.grpc_url,
            "metrics": self.server.metrics_url,
            "runtime": self.server.runtime,
            "uptime_seconds": self.uptime_seconds,
            "restarts": self.server.restarts,
            "models": {
                name: {"version": model.version, "sha256": model.sha256, **asdict(model.load)}
                for name, model in self.models.items()
            },
            "answers": "right, on its golden sets over HTTP and gRPC just now",
        }

    def __str__(self) -> str:
        server, restarts = self.server, self.server.restarts
        times = "once" if restarts == 1 else f"{restarts} times"
        restarted = f", restarted {times}, last reason: {server.why}" if restarts else ""
        minutes, seconds = divmod(int(self.uptime_seconds), 60)
        hours, minutes_left = divmod(minutes, 60)
        up = f"{hours} h {minutes_left} min" if hours else f"{minutes} min {seconds} s"
        rows = [(name, m.version, m.sha256[:12], *m.load.cells) for name, m in self.models.items()]
        header = ("model", "version", "sha256", "requests", "failures", "mean batch", "p50", "p99")
        return Lines(
            f"up {up} (pid {server.pid}, {server.runtime}){restarted}",
            f"at {server.http_url} and {server.grpc_url}, metrics at {server.metrics_url}",
            *columns(header, rows).split("\n"),
            "The server answers its golden sets correctly over HTTP and gRPC (checked now)",
        )


NO_SERVER = "no server of this project is running"


def check_status(paths: Paths) -> ServerState:
    """Replay the golden sets on the recorded server, and return its state.

    Raises ServerError if there is no server or it is dead, and CheckFailedError if it gives
    incorrect answers.
    """
    server = require_ready(paths)
    loads = read_loads(server.metrics_url)
    models = {}
    for name in server.models:
        release = _check_model(paths.named(name), server)
        load = loads.get((name, str(release.version)), Load(0, 0, None, None, None))
        models[name] = ModelState(release.version, release.sha256, load)
    return ServerState(server, time.time() - server.ready_at, models)


def _check_model(paths: Paths, server: Server) -> Release:
    """Return the version that answers; CheckFailedError unless it is correct on both protocols.

    The server is asked, since the record may be late: a promotion loads a version before it records
    it.
    """
    while True:
        with (
            Client(server.http_url, paths.name, timeout=5.0) as http,
            Client(server.grpc_url, paths.name, timeout=5.0) as grpc,
        ):
            version = ask_version(grpc)
            release = load_release(paths, version)
            answers = {client: replay_golden(client, release.golden) for client in (http, grpc)}
            if ask_version(grpc) != version:  # promoted during the replay
                continue
        for client, problems in answers.items():
            what = f"{paths.name} version {version} gives incorrect answers over {client.endpoint}"
            raise_problems(problems, what, "Restart the server with 'pipeline serve restart'")
        return release


def require_ready(paths: Paths) -> Server:
    """Return the recorded server; raise ServerError with the reason unless it is ready."""
    server = load_server(paths)
    if server is None:
        error = last_error(paths)
        ended = f"; the last one ended with: {error}" if error else ": 'pipeline serve' starts one"
        raise ServerError(Lines(*f"{NO_SERVER}{ended}".split("\n")))
    which = f"the server (pid {server.pid})"
    is_supervised = is_alive(server.supervisor_pid, server.supervisor_start_time)
    if not is_alive(server.pid, server.start_time):
        fix = "its supervisor restarts it" if is_supervised else "'pipeline serve' starts another"
        raise ServerError(f"{which} has died: {fix}")
    if not is_supervised:
        fix = "'pipeline serve stop' removes it, 'pipeline serve' starts another"
        raise ServerError(f"{which} runs without its supervisor, which was killed: {fix}")
    if not server.is_ready:
        restarting = f"restarting ({server.why})" if server.why else "starting"
        raise ServerError(f"{which} is {restarting}: try again in a moment")
    return server


def last_error(paths: Paths) -> str:
    """Return the error that ended the last detached server; empty if it ended without one."""
    if not paths.supervisor_log.exists():
        return ""
    log = paths.supervisor_log.read_text(errors="replace")
    error = re.search(r"^Error: (.*)", log, re.DOTALL | re.MULTILINE)
    return Lines(*error[1].strip().split("\n")) if error else ""


def read_logs(paths: Paths, count: int) -> list[str]:
    """Return the last `count` lines of the supervisor's log, then those of the server's log.

    Raises ServerError if there is no log.
    """
    logs = [log for log in (paths.supervisor_log, paths.server_log) if log.exists()]
    if not logs:
        raise ServerError("there is no log of a server: 'pipeline serve' starts a server")
    lines = (log.read_text(errors="replace").splitlines() for log in logs)
    return [line for part in lines for line in part[max(0, len(part) - count) :]]


def follow_log(paths: Paths) -> Iterator[str]:
    """Yield each new line of the server's log, until the server has ended."""
    with paths.server_log.open(encoding="utf-8", errors="replace") as log:
        log.seek(0, 2)
        while True:
            if line := log.readline():
                yield line.rstrip("\n")
                continue
            if load_server(paths) is None:
                return
            if paths.server_log.stat().st_size < log.tell():  # truncated by bound_log
                log.seek(0)
            time.sleep(POLL_SECONDS)

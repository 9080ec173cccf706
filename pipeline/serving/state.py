"""The state of the recorded server: its answers, Prometheus counters, record and logs."""

import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tabulate import tabulate

from pipeline.client.client import Client
from pipeline.core.errors import ServerError
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.repository.release import Release, load_release
from pipeline.serving.process import POLL_SECONDS
from pipeline.serving.ready import replay_golden, served_version
from pipeline.serving.serve import Server, is_alive, load_server

# Counters for each model and version, and a summary of the last minute's latencies.
REQUESTS = "nv_inference_request_success"
FAILURES = "nv_inference_request_failure"
IMAGES = "nv_inference_count"
BATCHES = "nv_inference_exec_count"
LATENCY = "nv_inference_request_summary_us"


@dataclass(frozen=True)
class Load:
    """Counters of a model's version since its server started, the canary's requests included."""

    requests: int  # answered
    failures: int
    mean_batch: float | None  # mean images of an execution; None before the first
    p50_us: float | None  # of requests in the last minute; None without any
    p99_us: float | None


def loads(url: str, seconds: float = 2.0) -> dict[tuple[str, str], Load]:
    """Return the load of each version, by name and version, from the metrics at `url`.

    Raises ServerError if no answer comes within `seconds`.
    """
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            text = response.read().decode()
    except OSError as error:
        raise ServerError(f"no metrics from {url} ({error})") from error
    # For each version: values by the series' name, followed by the quantile if it has one.
    counted: dict[tuple[str, str], dict[str, float]]
    counted = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "model" in sample.labels and sample.value == sample.value:  # NaN: an empty quantile
                model = sample.labels["model"], sample.labels["version"]
                series = sample.name.removesuffix("_total") + sample.labels.get("quantile", "")
                counted[model][series] += sample.value  # sum of failures over their reasons
    return {
        model: Load(
            requests=int(values[REQUESTS]),
            failures=int(values[FAILURES]),
            mean_batch=values[IMAGES] / values[BATCHES] if values[BATCHES] else None,
            p50_us=values.get(f"{LATENCY}0.5"),
            p99_us=values.get(f"{LATENCY}0.99"),
        )
        for model, values in counted.items()
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
        again = f", started anew {times}, last: {server.why}" if restarts else ""
        minutes, seconds = divmod(int(self.uptime_seconds), 60)
        up = (
            f"{minutes // 60} h {minutes % 60} min"
            if minutes > 59
            else f"{minutes} min {seconds} s"
        )
        rows = [
            (
                name,
                model.version,
                model.sha256[:12],
                f"{model.load.requests:,}",
                f"{model.load.failures:,}",
                "-" if model.load.mean_batch is None else f"{model.load.mean_batch:.2f}",
                _ms(model.load.p50_us),
                _ms(model.load.p99_us),
            )
            for name, model in self.models.items()
        ]
        table = tabulate(
            rows,
            ("model", "version", "sha256", "requests", "failures", "mean batch", "p50", "p99"),
            tablefmt="plain",
            disable_numparse=True,
            colalign=("left", "right", "left", *["right"] * 5),
        )
        return Lines(
            f"up {up} (pid {server.pid}, {server.runtime}){again}",
            f"at {server.http_url} and {server.grpc_url}, metrics at {server.metrics_url}",
            *table.splitlines(),
            "right on its golden sets, over HTTP and gRPC just now",
        )


def _ms(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1000:.2f} ms"


def status(paths: Paths) -> ServerState:
    """Replay the golden sets on the recorded server, and return its state.

    Raises ServerError if there is no server or it is dead, CheckFailedError if it answers wrongly.
    """
    server = living(paths)
    counted = loads(server.metrics_url)
    models = {}
    for name in server.models:
        release = _answering(paths.named(name), server)
        load = counted.get((name, str(release.version)), Load(0, 0, None, None, None))
        models[name] = ModelState(release.version, release.sha256, load)
    return ServerState(server, time.time() - server.ready_at, models)


def _answering(paths: Paths, server: Server) -> Release:
    """Return the version that answers; CheckFailedError unless it is correct on both protocols.

    The server is asked, since the record may be late: a promotion loads a version before it records
    it.
    """
    while True:
        with (
            Client(server.http_url, paths.name, timeout=5.0) as http,
            Client(server.grpc_url, paths.name, timeout=5.0) as grpc,
        ):
            version = served_version(grpc)
            release = load_release(paths, version)
            results = {client: replay_golden(client, release.golden) for client in (http, grpc)}
            is_promoted = served_version(grpc) != version  # asked again: the replay takes longer
        if is_promoted:
            continue
        for client, result in results.items():
            wrongly = f"{paths.name} version {version} answers wrongly over {client.endpoint}"
            result.require_passed(wrongly, "'pipeline serve restart'")
        return release


def living(paths: Paths) -> Server:
    """Return the recorded server; raise ServerError with the reason unless it is ready."""
    server = load_server(paths)
    if server is None:
        said = last_words(paths)
        ended = f"; the last one ended with: {said}" if said else ": 'pipeline serve' starts one"
        raise ServerError(Lines(*f"no server of ours is running{ended}".split("\n")))
    is_watched = is_alive(server.supervisor_pid, server.supervisor_start_time)
    if not is_alive(server.pid, server.start_time):
        dead = "is dead: 'pipeline serve' starts it again"
        now = "is being started again" if is_watched else dead
        raise ServerError(f"the server (pid {server.pid}) died and {now}")
    if not is_watched:
        raise ServerError(
            f"the server (pid {server.pid}) runs without its supervisor, which was killed: "
            "'pipeline serve stop' clears it, 'pipeline serve' starts afresh"
        )
    if not server.is_ready:
        again = f" again ({server.why})" if server.why else ""
        raise ServerError(f"the server (pid {server.pid}) is starting{again}: ask in a moment")
    return server


def last_words(paths: Paths) -> str:
    """Return the error that ended the last detached server; empty if it ended without one."""
    if not paths.supervisor_log.exists():
        return ""
    log = paths.supervisor_log.read_text(errors="replace")
    error = re.search(r"^Error: (.*)", log, re.DOTALL | re.MULTILINE)
    return Lines(*error[1].strip().split("\n")) if error else ""


def logs(paths: Paths, count: int) -> list[str]:
    """Return the last `count` lines of the supervisor's log, then those of the server's log.

    Raises ServerError if there is no log.
    """
    written = [log for log in (paths.supervisor_log, paths.server_log) if log.exists()]
    if not written:
        raise ServerError("no server of ours has written a log: 'pipeline serve' starts one")
    lines = (log.read_text(errors="replace").splitlines() for log in written)
    return [line for part in lines for line in part[max(0, len(part) - count) :]]


def follow(paths: Paths) -> Iterator[str]:
    """Yield each new line of the server's log, until the server has ended."""
    with paths.server_log.open(errors="replace") as log:
        log.seek(0, 2)
        while True:
            line = log.readline()
            if line:
                yield line.rstrip("\n")
                continue
            if load_server(paths) is None:
                return
            if paths.server_log.stat().st_size < log.tell():  # truncated by bound_log
                log.seek(0)
            time.sleep(POLL_SECONDS)

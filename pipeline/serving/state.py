"""How our server is: what it says when it is asked, counts, and has written down.

What a running tritonserver counts, from its Prometheus endpoint.
"""

import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from pipeline.client.client import Client
from pipeline.core.errors import ServerError
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.repository.golden import require
from pipeline.repository.release import Release, load_release
from pipeline.serving.ready import replay_golden, served_version
from pipeline.serving.serve import POLL_SECONDS, Server, is_alive, recorded

# Counters of each model and version, and a summary of the last minute's latencies.
REQUESTS = "nv_inference_request_success"


FAILURES = "nv_inference_request_failure"


IMAGES = "nv_inference_count"


BATCHES = "nv_inference_exec_count"


LATENCY = "nv_inference_request_summary_us"


@dataclass(frozen=True)
class Load:
    """What a version of a model has done since its server started, our canary included."""

    requests: int  # that were answered
    failures: int
    mean_batch: float | None  # images that ran together, on average; None before the first
    p50_us: float | None  # of a request in the server, over the last minute; None without any
    p99_us: float | None


Samples = dict[tuple[str, str], dict[str, float]]  # of a model's version, by series and quantile


def loads(url: str, seconds: float = 2.0) -> dict[tuple[str, str], Load]:
    """The load of each version, by name and version, from the metrics at `url`.

    Raises ServerError when no answer comes in `seconds`.
    """
    return {model: _load(values) for model, values in _samples(_text(url, seconds)).items()}


def _text(url: str, seconds: float) -> str:
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            text: str = response.read().decode()
            return text
    except OSError as error:
        raise ServerError(f"no metrics from {url} ({error})") from error


def _samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "model" in sample.labels and sample.value == sample.value:  # a quantile of none: NaN
                model = sample.labels["model"], sample.labels["version"]
                series = sample.name.removesuffix("_total") + sample.labels.get("quantile", "")
                values = found.setdefault(model, {})
                values[series] = values.get(series, 0.0) + sample.value  # failures: by reason
    return found


def _load(values: dict[str, float]) -> Load:
    batches = values.get(BATCHES, 0.0)
    return Load(
        requests=int(values.get(REQUESTS, 0)),
        failures=int(values.get(FAILURES, 0)),
        mean_batch=values.get(IMAGES, 0.0) / batches if batches else None,
        p50_us=values.get(f"{LATENCY}0.5"),
        p99_us=values.get(f"{LATENCY}0.99"),
    )


@dataclass(frozen=True)
class ModelState:
    """A served version and what it has done."""

    version: int
    sha256: str  # of its model.onnx
    load: Load

    def record(self) -> dict[str, Any]:
        """The state as JSON has it."""
        return {"version": self.version, "sha256": self.sha256, **asdict(self.load)}


@dataclass(frozen=True)
class State:
    """A server that runs and answers rightly."""

    server: Server
    uptime_seconds: float
    models: dict[str, ModelState]

    def record(self) -> dict[str, Any]:
        """The state as JSON has it."""
        return {
            "pid": self.server.pid,
            "http": self.server.http_url,
            "grpc": self.server.grpc_url,
            "metrics": self.server.metrics_url,
            "runtime": self.server.runtime,
            "uptime_seconds": self.uptime_seconds,
            "restarts": self.server.restarts,
            "models": {name: model.record() for name, model in self.models.items()},
            "answers": "right, on its golden sets over HTTP and gRPC just now",
        }

    def __str__(self) -> str:
        restarts = self.server.restarts
        times = "once" if restarts == 1 else f"{restarts} times"
        again = f", started anew {times}, last: {self.server.why}" if restarts else ""
        lines = [
            f"up {_spelled(self.uptime_seconds)} (pid {self.server.pid}, {self.server.runtime})"
            f"{again}",
            f"at {self.server.http_url} and {self.server.grpc_url}, metrics at "
            f"{self.server.metrics_url}",
            f"{'model':<20} {'version':>7} {'sha256':<12} {'requests':>10} {'failures':>8} "
            f"{'mean batch':>10} {'p50':>9} {'p99':>9}",
        ]
        for name, model in self.models.items():
            load = model.load
            batch = "-" if load.mean_batch is None else f"{load.mean_batch:.2f}"
            lines.append(
                f"{name:<20} {model.version:>7} {model.sha256[:12]:<12} {load.requests:>10,} "
                f"{load.failures:>8,} {batch:>10} {_ms(load.p50_us):>9} {_ms(load.p99_us):>9}"
            )
        lines.append("right on its golden sets, over HTTP and gRPC just now")
        return Lines(*lines)


def _ms(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1000:.2f} ms"


def _spelled(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def status(paths: Paths) -> State:
    """What the recorded server is and does, after it answered its golden sets just now.

    Raises ServerError when there is none or it is dead, CheckFailedError when it answers wrongly.
    """
    server = living(paths)
    counted = loads(server.metrics_url)
    models = {}
    for name in server.models:
        release = _answering(paths.named(name), server)
        load = counted.get((name, str(release.version)), Load(0, 0, None, None, None))
        models[name] = ModelState(release.version, release.sha256, load)
    return State(server, time.time() - server.ready_at, models)


def _answering(paths: Paths, server: Server) -> Release:
    """The version that answers, and rightly over both protocols; CheckFailedError if it does not.

    Not the one that is recorded: a promotion loads the next one before it writes that down.
    """
    while True:
        before = _served(paths, server)
        release = load_release(paths, before)
        agreements = []
        for url in (server.http_url, server.grpc_url):
            with Client(url, paths.name, timeout=5.0) as client:
                agreements.append((url, replay_golden(client, release.golden)))
        if _served(paths, server) != before:
            continue  # promoted meanwhile, which takes longer than to ask again
        for url, agreement in agreements:
            wrongly = f"{paths.name} version {before} answers wrongly over {url}"
            require(agreement, wrongly, "'pipeline serve restart'")
        return release


def _served(paths: Paths, server: Server) -> int:
    with Client(server.grpc_url, paths.name, timeout=5.0) as client:
        return served_version(client)


def living(paths: Paths) -> Server:
    """The recorded server, which is ready; ServerError says why it is not."""
    server = recorded(paths)
    if server is None:
        said = last_words(paths)
        ended = f"; the last one ended with: {said}" if said else ": 'pipeline serve' starts one"
        raise ServerError(Lines(*f"no server of ours is running{ended}".split("\n")))
    is_watched = is_alive(server.supervisor_pid, server.supervisor_start_time)
    if not is_alive(server.pid, server.start_time):
        now = (
            "is being started again" if is_watched else "is dead: 'pipeline serve' starts it again"
        )
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
    """The error that ended the last detached server; empty when none did."""
    if not paths.supervisor_log.exists():
        return ""
    found = re.search(
        r"^Error: (.*)", paths.supervisor_log.read_text(errors="replace"), re.DOTALL | re.MULTILINE
    )
    return Lines(*found[1].strip().split("\n")) if found else ""


def logs(paths: Paths, count: int) -> list[str]:
    """The last lines of the supervisor's log, then those of the server's.

    Raises ServerError when no server has written any.
    """
    found = [log for log in (paths.supervisor_log, paths.server_log) if log.exists()]
    if not found:
        raise ServerError("no server of ours has written a log: 'pipeline serve' starts one")
    return [line for log in found for line in _tail(log, count)]


def follow(paths: Paths) -> Iterator[str]:
    """The lines that come to the server's log from now on, until the server is gone."""
    with paths.server_log.open(errors="replace") as log:
        log.seek(0, 2)
        while True:
            line = log.readline()
            if line:
                yield line.rstrip("\n")
                continue
            if recorded(paths) is None:
                return
            if paths.server_log.stat().st_size < log.tell():  # begun anew
                log.seek(0)
            time.sleep(POLL_SECONDS)


def _tail(log: Path, count: int) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-count:] if count else []

"""A trial of each model of a repository in a scratch server, and the real cause of a failure."""

import contextlib
import re
import secrets
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import lint_files, tritonserver
from pipeline.config import ServeConfig
from pipeline.errors import ServerError
from pipeline.lint import CONFIG, Linted, in_order
from pipeline.lint_ask import GoneError, Server, SilentError, wrong_answer
from pipeline.lint_backend import BACKEND, runs_on_gpu
from pipeline.lint_config import OTHER_BACKENDS
from pipeline.lint_files import Model
from pipeline.lint_text import Config, Finding, Level, read_config
from pipeline.paths import Paths
from pipeline.serve import POLL_SECONDS, with_free_ports
from pipeline.server_process import launched

LOAD_SECONDS = 30.0  # in which a model loads, or never will
# What our python-based backend refuses and the native one may not, in its words.
_LIMITS = re.compile(
    r"the python-based backend does not support|unsupported datatype tensor\((string|bfloat16)\)"
)
_SAID = {
    "refused": "does not load",
    "hangs": "never loads",
    "ends": "takes the whole server down",
    "unready": "is not ready",
    "wrong": "loads, and answers wrongly",
    "unanswered": "loads, and may not answer",
}


@dataclass(frozen=True)
class Trial:
    """What a server made of one model."""

    model: str
    outcome: str  # loads, not judged, or one of those in _SAID
    cause: str = ""
    source: str | None = None  # of the native backend, where only that can judge


def lint_live(linted: Linted, paths: Paths, seconds: float = LOAD_SECONDS) -> Linted:
    """`linted` with what a scratch server said of each model. The repository stays as it is."""
    trials = try_models(linted.repository, linted.models, paths, seconds)
    found = [finding for trial in trials for finding in _findings(linted.repository, trial)]
    return replace(linted, findings=tuple(in_order([*linted.findings, *found])), live=True)


def _findings(repository: Path, trial: Trial) -> Iterator[Finding]:
    file = repository / trial.model / CONFIG
    if trial.outcome == "not judged":
        said = f"not judged on a server here: {trial.cause}"
        yield Finding("live", "note", file, said, source=trial.source)
    elif trial.outcome != "loads":
        level: Level = "warning" if trial.outcome == "unanswered" else "error"
        yield Finding("live", level, file, f"{_SAID[trial.outcome]}: {trial.cause}")


def try_models(
    repository: Path, names: Iterable[str], paths: Paths, seconds: float = LOAD_SECONDS
) -> list[Trial]:
    """Load each model by itself, ask it, unload it. One that hangs costs a server, not the rest."""
    runtime = tritonserver.find(paths, "auto")
    trials = {name: _beyond(repository / name, runtime.kind) for name in names}
    while waiting := [name for name, trial in trials.items() if trial is None]:
        with _server(runtime, repository) as server:
            for name in waiting:
                trial = trials[name] = _limited(_try(server, name, seconds), runtime.kind)
                if trial.outcome in ("hangs", "ends"):
                    break  # what a load holds, the next one would wait for
    return [trial for trial in trials.values() if trial]


def _beyond(folder: Path, kind: str) -> Trial | None:
    """A verdict on a model that the server here cannot judge, or must not try."""
    if not re.fullmatch(r"[\w.~-]+", folder.name, re.ASCII):
        why = "Triton takes its name literally in a URL, which cannot hold it: rename it"
        return Trial(folder.name, "not judged", why)
    config = read_config(folder / CONFIG) if (folder / CONFIG).exists() else Config(folder / CONFIG)
    if isinstance(config, Finding):
        return None  # the server will say it
    message: Any = config.message
    named = str(message.backend or message.platform)

    def say(why: str, where: str = "") -> Trial:
        return Trial(folder.name, "not judged", why, f"{BACKEND} {where}" if where else None)

    if named in OTHER_BACKENDS:
        return say(f"it is for the backend {named}")
    if lint_files.brings_code(Model(folder, config, lint_files.versions(folder)[0])):
        return say("it may bring code of its own, which is not run here")
    if runs_on_gpu(message) and not any(Path("/dev").glob("nvidia[0-9]*")):
        return say("it asks for a GPU, and there is none", "LoadModel")
    asked = message.optimization.execution_accelerators
    for one in (*asked.gpu_execution_accelerator, *asked.cpu_execution_accelerator):
        if kind == "wheel" and one.name != "cuda":
            return say(f"only the native backend has the accelerator '{one.name}'", "LoadModel")
    return None


def _limited(trial: Trial, kind: str) -> Trial:
    """The trial, or that our own backend cannot tell."""
    if trial.outcome == "refused" and kind == "wheel" and _LIMITS.search(trial.cause):
        said = f"only the native backend can tell ({trial.cause})"
        return Trial(trial.model, "not judged", said, f"{BACKEND} ModelInstanceState")
    return trial


def _try(server: Server, name: str, seconds: float) -> Trial:
    """Load the model, ask it whether it is ready and for an answer, and unload it."""
    start = server.log.stat().st_size
    action = f"/v2/repository/models/{name}"
    outcome, said = "loads", ""
    try:
        status, _ = server.ask("POST", f"{action}/load", seconds, b"{}")
        if status != 200:
            outcome = "refused"
        elif server.ask("GET", f"/v2/models/{name}/ready", seconds)[0] != 200:
            outcome = "unready"
        else:
            said, is_certain = wrong_answer(server, name)
            outcome = ("wrong" if is_certain else "unanswered") if said else "loads"
            server.ask("POST", f"{action}/unload", seconds, b"{}")
    except SilentError:
        outcome, said = "hangs", f"no answer in {seconds:g} s"
    except GoneError:
        outcome = "ends"
    if outcome != "loads":
        said = said or cause(server.said(start))
    return Trial(name, outcome, said)


def cause(log: str) -> str:
    """The real cause of a failure in a part of tritonserver's log, in a line."""
    if crash := re.search(r"^Signal \((\d+)\) received", log, re.MULTILINE):
        number = int(crash[1])
        known = number in signal.valid_signals()
        name = signal.Signals(number).name if known else f"signal {number}"
        what = re.search(r"what\(\):\s*(.*)", log)
        return f"the server crashes ({name}{', ' + what[1] if what else ''})"
    parsing = re.findall(r"Error parsing text-format inference\.ModelConfig: (.*)", log)
    return parsing[-1] if parsing else tritonserver.cause(log)


@contextlib.contextmanager
def _server(runtime: tritonserver.Runtime, repository: Path) -> Iterator[Server]:
    """A scratch server on `repository` that has loaded nothing yet."""
    config = with_free_ports(ServeConfig())
    server_id, key = f"handwriting-{secrets.token_hex(6)}", secrets.token_urlsafe(24)
    with launched(runtime, repository, config, server_id, key) as (child, log):
        server = Server(child, log, config.http_port, {tritonserver.KEY_HEADER: key})
        _await(server, config.start_seconds)
        yield server


def _await(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(SilentError, GoneError):
            if server.ask("GET", "/v2/health/ready", 2.0)[0] == 200:
                return
        if server.child.poll() is not None or time.monotonic() > deadline:
            said = tritonserver.cause(server.log.read_text(errors="replace"))
            raise ServerError(f"the scratch server did not start: {said}")
        time.sleep(POLL_SECONDS)

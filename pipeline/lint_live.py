"""A trial load of each model of a repository in a scratch server, and the real cause of a failure."""

import contextlib
import http.client
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import lint_files, tritonserver
from pipeline.config import ServeConfig
from pipeline.errors import ServerError
from pipeline.lint import CONFIG, Linted, in_order
from pipeline.lint_backend import BACKEND, runs_on_gpu, type_name
from pipeline.lint_config import OTHER_BACKENDS
from pipeline.lint_files import Model
from pipeline.lint_text import Config, Finding, read_config
from pipeline.paths import Paths
from pipeline.serve import POLL_SECONDS, clear, with_free_ports

LOAD_SECONDS = 30.0  # in which a model loads, or never will
STOP_SECONDS = 3.0


@dataclass(frozen=True)
class Trial:
    """What a server made of one model."""

    model: str
    outcome: str  # loads, refused, hangs, unready or not judged
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
        verb = {"refused": "does not load", "hangs": "never loads", "unready": "is not ready"}
        yield Finding("live", "error", file, f"{verb[trial.outcome]}: {trial.cause}")


def try_models(
    repository: Path, names: Iterable[str], paths: Paths, seconds: float = LOAD_SECONDS
) -> list[Trial]:
    """Load each model by itself, and unload it. One that hangs costs a server, not the others."""
    runtime = tritonserver.find(paths, "auto")
    waiting = list(names)
    trials = []
    while waiting:
        with _server(runtime, repository) as server:
            while waiting:
                name = waiting.pop(0)
                unable = _beyond(repository / name, runtime.kind)
                trials.append(unable or server.trial(name, seconds))
                if trials[-1].outcome == "hangs":
                    break  # it holds a lock that the next load would wait for
    return trials


def _beyond(folder: Path, kind: str) -> Trial | None:
    """A verdict on a model that the server here cannot judge, or must not try."""
    read = read_config(folder / CONFIG) if (folder / CONFIG).exists() else Config(folder / CONFIG)
    config: Any = read.message if isinstance(read, Config) else None
    if config is None:
        return None

    def say(why: str, where: str = "") -> Trial:
        return Trial(folder.name, "not judged", why, f"{BACKEND} {where}" if where else None)

    model = Model(folder, Config(folder, config), lint_files.versions(folder)[0])
    if lint_files.brought_code(model) or config.model_operations.op_library_filename:
        return say("it brings code of its own, which is not run here")
    if not lint_files.is_onnx(config, folder) and config.platform != "ensemble":
        return say(f"it is for the backend {config.backend or config.platform}") if (
            config.backend in OTHER_BACKENDS
        ) else None  # fmt: skip
    if runs_on_gpu(config):
        return say("it asks for a GPU", "LoadModel") if not _has_gpu() else None
    if kind != "wheel":
        return None
    asked = config.optimization.execution_accelerators
    accelerators = [*asked.gpu_execution_accelerator, *asked.cpu_execution_accelerator]
    for one in accelerators:
        if one.name != "cuda":
            return say(f"it asks for the accelerator '{one.name}'", "LoadModel")
    for tensor in (*config.input, *config.output):
        if type_name(tensor.data_type) in ("TYPE_STRING", "TYPE_BF16"):
            return say(f"'{tensor.name}' is a type that only the native backend takes", "ValidateInputs")
    if any(tensor.optional or tensor.allow_ragged_batch for tensor in config.input):
        return say("an optional or ragged input is for the native backend only", "ValidateInputs")
    if config.HasField("sequence_batching") or config.batch_input or config.batch_output:
        return say("sequences and batch inputs are for the native backend only", "ModelInstanceState")
    return None


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


@dataclass(frozen=True)
class _Server:
    """A server without models that loads what it is told to."""

    child: subprocess.Popen[bytes]
    log: Path
    port: int
    headers: dict[str, str]

    def ask(self, method: str, path: str, seconds: float, body: str = "") -> tuple[int, str]:
        """Status and text of an answer; OSError or HTTPException when there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body or None, self.headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()

    def trial(self, name: str, seconds: float) -> Trial:
        """Load the model, ask whether it is ready, and unload it."""
        start = self.log.stat().st_size
        action = f"/v2/repository/models/{name}"
        try:
            status, text = self.ask("POST", f"{action}/load", seconds, "{}")
            ready = status == 200 and self.ask("GET", f"/v2/models/{name}/ready", 5.0)[0] == 200
        except TimeoutError:
            said = f"nothing happened for {seconds:g} s; its log ends: {self._cause(start, '')}"
            return Trial(name, "hangs", said)
        except (OSError, http.client.HTTPException):
            return Trial(name, "hangs", f"the server ended: {self._cause(start, '')}")
        if status != 200:
            return Trial(name, "refused", self._cause(start, text))
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.ask("POST", f"{action}/unload", 5.0, '{"parameters":{"unload_dependents":false}}')
        return Trial(name, "loads") if ready else Trial(name, "unready", self._cause(start, ""))

    def _cause(self, start: int, answer: str) -> str:
        with self.log.open("rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace")
        return tritonserver.cause(text) or answer


@contextlib.contextmanager
def _server(runtime: tritonserver.Runtime, repository: Path) -> Iterator[_Server]:
    """A scratch server on `repository` that has loaded nothing yet."""
    config = replace(with_free_ports(ServeConfig()), stop_seconds=STOP_SECONDS)
    server_id, key = f"handwriting-{secrets.token_hex(6)}", secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory(prefix=f"{server_id}-") as scratch:
        backends, log = Path(scratch) / "backends", Path(scratch) / "server.log"
        if runtime.kind == "wheel":
            tritonserver.lay_out_backends(runtime, backends)
        command = tritonserver.command(runtime, repository, config, server_id, key, backends)
        command = [part for part in command if not part.startswith("--load-model")]
        with log.open("wb") as output:
            child = subprocess.Popen(
                command,
                env=tritonserver.environment(runtime),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            headers = {tritonserver.KEY_HEADER: key, "Content-Type": "application/json"}
            server = _Server(child, log, config.http_port, headers)
            _await(server, config.start_seconds)
            yield server
        finally:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_SECONDS)
            clear(server_id)
            child.wait()


def _await(server: _Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.ask("GET", "/v2/health/ready", 2.0)[0] == 200:
                return
        if server.child.poll() is not None or time.monotonic() > deadline:
            cause = tritonserver.cause(server.log.read_text(errors="replace"))
            raise ServerError(f"the scratch server did not start: {cause}")
        time.sleep(POLL_SECONDS)

"""Trial of each model of a repository on a temporary server, with the real cause of a failure.

Each model is loaded, asked with blank images, and unloaded.
"""

import http.client
import json
import math
import re
import select
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.paths import Paths
from pipeline.repository.config_pbtxt import CONFIG
from pipeline.repository.lint import files
from pipeline.repository.lint.backend import BACKEND, SIZES, runs_on_gpu
from pipeline.repository.lint.check import LintResult, sort_findings
from pipeline.repository.lint.config import OTHER_BACKENDS
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.text import Config, Finding, Level, read_config
from pipeline.serving import tritonserver
from pipeline.serving.process import ServerProcess, launch
from pipeline.serving.serve import with_free_ports
from pipeline.serving.settings import ServeConfig

LOAD_SECONDS = 30.0  # after which a model is considered to hang
# Messages of our python-based backend about models that the native backend may accept.
_LIMITS = re.compile(
    r"the python-based backend does not support|unsupported datatype tensor\((string|bfloat16)\)"
)
# The finding for each outcome but "loads": its level and its message.
_OUTCOMES: dict[str, tuple[Level, str]] = {
    "not judged": ("note", "not judged on a server here"),
    "refused": ("error", "does not load"),
    "hangs": ("error", "never loads, or never answers"),
    "ends": ("error", "takes the whole server down"),
    "unready": ("error", "is not ready"),
    "wrong": ("error", "loads, but its answers are incorrect"),
    "unanswered": ("warning", "loads, but may not answer"),
}


@dataclass(frozen=True)
class LiveTrial:
    """The outcome of one model on the server."""

    model: str
    outcome: str  # loads, or one of those in _OUTCOMES
    cause: str = ""
    source: str | None = None  # function of the native backend, if only it can judge


def lint_live(linted: LintResult, paths: Paths, seconds: float = LOAD_SECONDS) -> LintResult:
    """Add to `linted` what a temporary server finds; the repository is not changed."""
    findings = list(linted.findings)
    for trial in try_models(linted.repository, linted.models, paths, seconds):
        if trial.outcome != "loads":
            level, problem = _OUTCOMES[trial.outcome]
            message = f"{problem}: {trial.cause}"
            file = linted.repository / trial.model / CONFIG
            findings.append(Finding("live", level, file, message, source=trial.source))
    return replace(linted, findings=sort_findings(findings), live=True)


def try_models(
    repository: Path, names: Iterable[str], paths: Paths, seconds: float = LOAD_SECONDS
) -> list[LiveTrial]:
    """Load, ask and unload each model alone; after one that hangs, continue on a new server."""
    runtime = tritonserver.find_runtime(paths, "auto")
    trials = {name: _skip(repository / name, runtime.kind) for name in names}
    while waiting := [name for name, trial in trials.items() if trial is None]:
        config = with_free_ports(ServeConfig())
        with launch(runtime, repository, config) as server:
            server.await_answer(config.start_seconds)
            for name in waiting:
                trial = _try_model(server, name, seconds)
                is_refused = trial.outcome == "refused" and runtime.kind == "wheel"
                if is_refused and _LIMITS.search(trial.cause):  # our own backend cannot judge it
                    cause = f"only the native backend can tell ({trial.cause})"
                    trial = LiveTrial(name, "not judged", cause, f"{BACKEND} ModelInstanceState")
                trials[name] = trial
                if trial.outcome in ("hangs", "ends"):
                    break  # the next load would wait for the one that hangs
    return [trial for trial in trials.values() if trial]


def _skip(folder: Path, kind: str) -> LiveTrial | None:
    """Return a verdict if the server here cannot judge the model or must not try it."""
    name, source = folder.name, f"{BACKEND} LoadModel"
    if not re.fullmatch(r"[\w.~-]+", name, re.ASCII):
        return LiveTrial(name, "not judged", "Triton's URLs cannot contain its name: rename it")
    config = read_config(folder / CONFIG) if (folder / CONFIG).exists() else Config(folder / CONFIG)
    if isinstance(config, Finding):
        return None  # the server will report it
    message: Any = config.message
    backend = str(message.backend or message.platform)
    if backend in OTHER_BACKENDS:
        return LiveTrial(name, "not judged", f"it is for the backend {backend}")
    if files.brings_code(ModelFolder(folder, config, files.list_version_folders(folder)[0])):
        return LiveTrial(name, "not judged", "it may contain code, which is not run here")
    if runs_on_gpu(message) and not any(Path("/dev").glob("nvidia[0-9]*")):
        return LiveTrial(name, "not judged", "it needs a GPU, which is not here", source)
    groups = message.optimization.execution_accelerators
    for accelerator in (*groups.gpu_execution_accelerator, *groups.cpu_execution_accelerator):
        if kind == "wheel" and accelerator.name != "cuda":
            cause = f"only the native backend has the accelerator '{accelerator.name}'"
            return LiveTrial(name, "not judged", cause, source)
    return None


MOST_BYTES = 64 * 1024 * 1024  # of a blank request; a larger one is not sent
SECONDS = 20.0  # timeout of an answer


class NoAnswerError(Exception):
    """The server gave no answer: it "hangs", or it "ends", at least by its log."""


def _request(
    server: ServerProcess, path: str, seconds: float, body: bytes = b"", json_bytes: int = 0
) -> tuple[int, bytes]:
    """Return status and body of the answer to a POST, or to a GET without a body.

    `json_bytes` is the length of the JSON that precedes binary data. Raises NoAnswerError.
    """
    port, start = server.config.http_port, server.log.stat().st_size
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    headers = {tritonserver.KEY_HEADER: server.admin_key}
    if json_bytes:
        headers["Inference-Header-Content-Length"] = str(json_bytes)
    try:
        connection.request("POST" if body else "GET", path, body or None, headers)
        # A server that crashes may keep its connections open.
        for _ in range(max(1, int(seconds / 0.25))):
            if select.select([connection.sock], [], [], 0.25)[0]:
                response = connection.getresponse()
                return response.status, response.read()
            has_crashed = re.search(r"^Signal \(", server.read_log(start), re.MULTILINE)
            if has_crashed or server.child.poll() is not None:
                raise NoAnswerError("ends")
        raise NoAnswerError("hangs")
    except TimeoutError as error:
        raise NoAnswerError("hangs") from error
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswerError("ends") from error
    finally:
        connection.close()


def _check_answers(server: ServerProcess, name: str) -> tuple[str, str]:
    """Return the outcome of asking about one and two blank images, and its cause.

    A correct model may refuse blank data, but it may not refuse two images after it accepted one.
    """
    status, text = _request(server, f"/v2/models/{name}/config", SECONDS)
    if status != 200:
        return "loads", ""
    config = json.loads(text)
    largest = int(config.get("max_batch_size", 0))
    for size in (1, 2) if largest > 1 else (1,):
        blank = _make_blank(config, size if largest else 0)
        if blank is None:
            break
        header, data = blank
        path = f"/v2/models/{name}/infer"
        status, answer = _request(server, path, SECONDS, header + data, len(header))
        if status != 200:
            try:
                reason = str(json.loads(answer)["error"])
            except (ValueError, KeyError, TypeError):
                reason = answer.decode(errors="replace")[:200]
            outcome = "wrong" if size == 2 else "unanswered"
            return outcome, f"answers a batch of {size} zeros with: {reason}"
        record = json.JSONDecoder().raw_decode(answer.decode("latin-1"))[0]  # then binary data
        for output in record.get("outputs", ()) if largest else ():
            shape = list(output["shape"])
            if shape[:1] != [size]:
                return "wrong", f"answers a batch of {size} with {output['name']} of shape {shape}"
    return "loads", ""


def _make_blank(config: dict[str, Any], size: int) -> tuple[bytes, bytes] | None:
    """Return header and data of a binary request of zeros, or None if too large.

    A size of 0 means that the model has no batch dimension.
    """
    inputs, total = [], 0
    for tensor in config.get("input", ()):
        if tensor.get("optional"):
            continue
        kind = tensor["data_type"].removeprefix("TYPE_")
        shape = [size] * bool(size) + [max(1, int(dim)) for dim in tensor["dims"]]
        # For strings: a length of 0, thus an empty one.
        count = math.prod(shape) * (4 if kind == "STRING" else SIZES.get(kind, 0))
        total += count
        datatype = "BYTES" if kind == "STRING" else kind
        spec = {"name": tensor["name"], "shape": shape, "datatype": datatype}
        inputs.append({**spec, "parameters": {"binary_data_size": count}})
    header = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    return (json.dumps(header).encode(), bytes(total)) if total <= MOST_BYTES else None


def _try_model(server: ServerProcess, name: str, seconds: float) -> LiveTrial:
    """Load the model, check that it is ready and answers, and unload it."""
    start = server.log.stat().st_size
    action = f"/v2/repository/models/{name}"
    outcome, cause = "loads", ""
    try:
        if _request(server, f"{action}/load", seconds, b"{}")[0] != 200:
            outcome = "refused"
        elif _request(server, f"/v2/models/{name}/ready", seconds)[0] != 200:
            outcome = "unready"
        else:
            outcome, cause = _check_answers(server, name)
            _request(server, f"{action}/unload", seconds, b"{}")
    except NoAnswerError as error:
        outcome = str(error)
        cause = f"no answer in {seconds:g} s" if outcome == "hangs" else ""
    if outcome != "loads":
        cause = cause or tritonserver.find_cause(server.read_log(start))
    return LiveTrial(name, outcome, cause)

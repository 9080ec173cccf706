"""Trial of each model of a repository on a temporary server, with the real cause of a failure.

Each model is loaded, asked with blank images, and unloaded.
"""

import http.client
import json
import math
import re
import select
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.paths import Paths
from pipeline.repository.config_pbtxt import CONFIG
from pipeline.repository.lint import files
from pipeline.repository.lint.backend import BACKEND, SIZES, runs_on_gpu
from pipeline.repository.lint.check import Linted, in_order
from pipeline.repository.lint.config import OTHER_BACKENDS
from pipeline.repository.lint.files import ModelFolder
from pipeline.repository.lint.text import Config, Finding, Level, read_config
from pipeline.serving import tritonserver
from pipeline.serving.process import Launched, launched
from pipeline.serving.serve import with_free_ports
from pipeline.serving.settings import ServeConfig

LOAD_SECONDS = 30.0  # after which a model is considered to hang
# Messages of our python-based backend about models that the native backend may accept.
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
class LiveTrial:
    """The outcome of one model on the server."""

    model: str
    outcome: str  # loads, not judged, or one of those in _SAID
    cause: str = ""
    source: str | None = None  # function of the native backend, if only it can judge


def lint_live(linted: Linted, paths: Paths, seconds: float = LOAD_SECONDS) -> Linted:
    """Add to `linted` what a temporary server finds; the repository is not changed."""
    findings = list(linted.findings)
    for trial in try_models(linted.repository, linted.models, paths, seconds):
        file = linted.repository / trial.model / CONFIG
        if trial.outcome == "not judged":
            said = f"not judged on a server here: {trial.cause}"
            findings.append(Finding("live", "note", file, said, source=trial.source))
        elif trial.outcome != "loads":
            level: Level = "warning" if trial.outcome == "unanswered" else "error"
            said = f"{_SAID[trial.outcome]}: {trial.cause}"
            findings.append(Finding("live", level, file, said))
    return replace(linted, findings=in_order(findings), live=True)


def try_models(
    repository: Path, names: Iterable[str], paths: Paths, seconds: float = LOAD_SECONDS
) -> list[LiveTrial]:
    """Load, ask and unload each model alone; after one that hangs, continue on a new server."""
    runtime = tritonserver.find(paths, "auto")
    trials = {name: _beyond(repository / name, runtime.kind) for name in names}
    while waiting := [name for name, trial in trials.items() if trial is None]:
        config = with_free_ports(ServeConfig())
        with launched(runtime, repository, config) as server:
            server.await_answer(config.start_seconds)
            for name in waiting:
                trial = _try(server, name, seconds)
                is_refused = trial.outcome == "refused" and runtime.kind == "wheel"
                if is_refused and _LIMITS.search(trial.cause):  # our own backend cannot judge it
                    said = f"only the native backend can tell ({trial.cause})"
                    trial = LiveTrial(name, "not judged", said, f"{BACKEND} ModelInstanceState")
                trials[name] = trial
                if trial.outcome in ("hangs", "ends"):
                    break  # the next load would wait for the one that hangs
    return [trial for trial in trials.values() if trial]


def _beyond(folder: Path, kind: str) -> LiveTrial | None:
    """Return a verdict if the server here cannot judge the model or must not try it."""
    name, source = folder.name, f"{BACKEND} LoadModel"
    if not re.fullmatch(r"[\w.~-]+", name, re.ASCII):
        why = "Triton takes its name literally in a URL, which cannot hold it: rename it"
        return LiveTrial(name, "not judged", why)
    config = read_config(folder / CONFIG) if (folder / CONFIG).exists() else Config(folder / CONFIG)
    if isinstance(config, Finding):
        return None  # the server will report it
    message: Any = config.message
    named = str(message.backend or message.platform)
    if named in OTHER_BACKENDS:
        return LiveTrial(name, "not judged", f"it is for the backend {named}")
    if files.brings_code(ModelFolder(folder, config, files.version_folders(folder)[0])):
        return LiveTrial(name, "not judged", "it may bring code of its own, which is not run here")
    if runs_on_gpu(message) and not any(Path("/dev").glob("nvidia[0-9]*")):
        return LiveTrial(name, "not judged", "it asks for a GPU, and there is none", source)
    asked = message.optimization.execution_accelerators
    for one in (*asked.gpu_execution_accelerator, *asked.cpu_execution_accelerator):
        if kind == "wheel" and one.name != "cuda":
            why = f"only the native backend has the accelerator '{one.name}'"
            return LiveTrial(name, "not judged", why, source)
    return None


MOST_BYTES = 64 * 1024 * 1024  # of a blank request; a larger one is not sent


SECONDS = 20.0  # timeout of an answer


class SilentError(Exception):
    """The server gave no answer in time."""


class GoneError(Exception):
    """The server ended, or its log shows that it has crashed."""


def _ask(
    server: Launched,
    method: str,
    path: str,
    seconds: float,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Return status and body of an answer; raise SilentError or GoneError if there is none."""
    port, start = server.config.http_port, server.log.stat().st_size
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    key = {tritonserver.KEY_HEADER: server.admin_key}
    try:
        connection.request(method, path, body or None, {**key, **(headers or {})})
        # A server that crashes may keep its connections open.
        for _ in range(max(1, int(seconds / 0.25))):
            if select.select([connection.sock], [], [], 0.25)[0]:
                response = connection.getresponse()
                return response.status, response.read()
            has_crashed = re.search(r"^Signal \(", server.written(start), re.MULTILINE)
            if has_crashed or server.child.poll() is not None:
                raise GoneError(path)
        raise SilentError(path)
    except TimeoutError as error:
        raise SilentError(path) from error
    except (OSError, http.client.HTTPException) as error:
        raise GoneError(path) from error
    finally:
        connection.close()


def wrong_answer(server: Launched, name: str) -> tuple[str, bool]:
    """Describe what is wrong with the answers to one and two blank images, and if it is certain.

    The description is empty if nothing is wrong. A correct model may refuse blank data, but it may
    not refuse two images after it accepted one.
    """
    status, text = _ask(server, "GET", f"/v2/models/{name}/config", SECONDS)
    if status != 200:
        return "", False
    config = json.loads(text)
    largest = int(config.get("max_batch_size", 0))
    for size in (1, 2) if largest > 1 else (1,):
        request = _blank(config, size if largest else 0)
        if request is None:
            break
        header, data = request
        length = {"Inference-Header-Content-Length": str(len(header))}
        path = f"/v2/models/{name}/infer"
        status, answer = _ask(server, "POST", path, SECONDS, header + data, length)
        if status != 200:
            try:
                said = str(json.loads(answer)["error"])
            except (ValueError, KeyError, TypeError):
                said = answer.decode(errors="replace")[:200]
            return f"answers a batch of {size} zeros with: {said}", size == 2
        described = json.JSONDecoder().raw_decode(answer.decode("latin-1"))[0]  # then binary data
        for output in described.get("outputs", ()) if largest else ():
            if list(output["shape"])[:1] != [size]:
                said = f"answers a batch of {size} with {output['name']} of shape "
                return f"{said}{output['shape']}", True
    return "", False


def _blank(config: dict[str, Any], size: int) -> tuple[bytes, bytes] | None:
    """Return header and data of a binary request of zeros, or None if too large.

    A size of 0 means that the model has no batch dimension.
    """
    inputs, data = [], b""
    for tensor in config.get("input", ()):
        if tensor.get("optional"):
            continue
        kind = tensor["data_type"].removeprefix("TYPE_")
        shape = [size] * bool(size) + [max(1, int(dim)) for dim in tensor["dims"]]
        count = math.prod(shape) * (4 if kind == "STRING" else SIZES.get(kind, 0))
        if len(data) + count > MOST_BYTES:
            return None
        data += bytes(count)  # for strings: a length of 0, thus an empty one
        inputs.append(
            {
                "name": tensor["name"],
                "shape": shape,
                "datatype": "BYTES" if kind == "STRING" else kind,
                "parameters": {"binary_data_size": count},
            }
        )
    header = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    return json.dumps(header).encode(), data


def _try(server: Launched, name: str, seconds: float) -> LiveTrial:
    """Load the model, check that it is ready and answers, and unload it."""
    start = server.log.stat().st_size
    action = f"/v2/repository/models/{name}"
    outcome, said = "loads", ""
    try:
        if _ask(server, "POST", f"{action}/load", seconds, b"{}")[0] != 200:
            outcome = "refused"
        elif _ask(server, "GET", f"/v2/models/{name}/ready", seconds)[0] != 200:
            outcome = "unready"
        else:
            said, is_certain = wrong_answer(server, name)
            outcome = ("wrong" if is_certain else "unanswered") if said else "loads"
            _ask(server, "POST", f"{action}/unload", seconds, b"{}")
    except SilentError:
        outcome, said = "hangs", f"no answer in {seconds:g} s"
    except GoneError:
        outcome = "ends"
    if outcome != "loads":
        said = said or tritonserver.cause(server.written(start))
    return LiveTrial(name, outcome, said)

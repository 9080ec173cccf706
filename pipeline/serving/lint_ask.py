"""A blank request to any served model, and what is wrong with its answer."""

import http.client
import json
import math
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.repository.lint.backend import SIZES

MOST_BYTES = 64 * 1024 * 1024  # of a blank request; a larger one is not sent
SECONDS = 20.0  # for an answer


class SilentError(Exception):
    """No answer came in time."""


class GoneError(Exception):
    """The server went, or its log says that it is about to."""


@dataclass(frozen=True)
class Server:
    """A tritonserver of ours that loads what it is told to."""

    child: subprocess.Popen[bytes]
    log: Path
    port: int
    headers: dict[str, str]

    def ask(
        self,
        method: str,
        path: str,
        seconds: float,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Status and body of an answer; SilentError or GoneError when there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body or None, {**self.headers, **(headers or {})})
            self._await_answer(connection, seconds)
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError as error:
            raise SilentError(path) from error
        except (OSError, http.client.HTTPException) as error:
            raise GoneError(path) from error
        finally:
            connection.close()

    def _await_answer(self, connection: http.client.HTTPConnection, seconds: float) -> None:
        """Return once an answer begins: a server that crashes may keep its connections open."""
        start = self.log.stat().st_size
        for _ in range(max(1, int(seconds / 0.25))):
            if select.select([connection.sock], [], [], 0.25)[0]:
                return
            if self.child.poll() is not None or "\nSignal (" in self.said(start):
                raise GoneError("it crashed")
        raise SilentError("no answer")

    def said(self, start: int) -> str:
        """What was written into the log since it had `start` bytes."""
        with self.log.open("rb") as log:
            log.seek(max(0, start - 1))
            return log.read().decode(errors="replace")


def wrong_answer(server: Server, name: str) -> tuple[str, bool]:
    """What is wrong with the answers to one and to two blank images, and whether that is certain.

    Blank data may be refused by a model that is right; two where one was taken may not.
    """
    status, text = server.ask("GET", f"/v2/models/{name}/config", SECONDS)
    if status != 200:
        return "", False
    config = json.loads(text)
    largest = int(config.get("max_batch_size", 0))
    for size in (1, 2):
        if size > max(1, largest):
            break
        request = _blank(config, size if largest else 0)
        if request is None:
            break
        header, data = request
        length = {"Inference-Header-Content-Length": str(len(header))}
        status, answer = server.ask(
            "POST", f"/v2/models/{name}/infer", SECONDS, header + data, length
        )
        if status != 200:
            said = _error(answer)
            return f"answers a batch of {size} zeros with: {said}", size == 2
        for output in _outputs(answer) if largest else ():
            if list(output["shape"])[:1] != [size]:
                said = f"answers a batch of {size} with {output['name']} of shape "
                return f"{said}{output['shape']}", True
    return "", False


def _blank(config: dict[str, Any], size: int) -> tuple[bytes, bytes] | None:
    """A request of zeros in Triton's binary form: header and data. A size of 0 is no batch."""
    inputs, data = [], b""
    for tensor in config.get("input", ()):
        if tensor.get("optional"):
            continue
        kind = tensor["data_type"].removeprefix("TYPE_")
        shape = [size] * bool(size) + [max(1, int(dim)) for dim in tensor["dims"]]
        count = math.prod(shape) * (4 if kind == "STRING" else SIZES.get(kind, 0))
        if len(data) + count > MOST_BYTES:
            return None
        data += bytes(count)  # of strings, each an empty one
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


def _outputs(answer: bytes) -> list[dict[str, Any]]:
    """The outputs that an answer describes before its data."""
    found = json.JSONDecoder().raw_decode(answer.decode("latin-1"))[0]
    return list(found.get("outputs", ()))


def _error(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace")[:200]

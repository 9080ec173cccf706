"""A client of one served model, over HTTP or gRPC."""

# Shape letters: N images, B batch, K classes.

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc
import tritonclient.http
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from google.protobuf import json_format
from greenlet import error as GreenletError
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from pipeline import triton
from pipeline.errors import PipelineError, ServerError, SlowError
from pipeline.images import read_image

TIMEOUT = 10.0  # seconds for a whole call
_PORTS = {"http": 8000, "grpc": 8001}
# tritonclient lets these through beside its own exception.
_LOST = (OSError, HTTPConnectionClosed, HTTPParseError, GreenletError)
_START = "is it running? 'pipeline serve status' tells, 'pipeline serve' starts it"
T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image."""

    label: str
    probability: float  # of that label, 0 to 1
    top: tuple[tuple[str, float], ...]  # labels with probabilities, the likeliest first
    version: str  # of the model that answered
    sha256: str | None  # of its file, as the server's config states it
    is_sure: bool = True  # its probability is at or above the model's threshold

    def record(self) -> dict[str, Any]:
        """The prediction as JSON has it."""
        record = asdict(self)
        return {**record, "sure": record.pop("is_sure")}


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and for which protocol."""

    protocol: str  # http or grpc
    address: str  # host:port

    def __str__(self) -> str:
        return f"{self.protocol}://{self.address}"


def endpoint(url: str) -> Endpoint:
    """The endpoint that `url` names: http://HOST:PORT or grpc://HOST:PORT."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise PipelineError(f"{url!r} has no valid port: {error}") from error
    if parts.scheme not in _PORTS or not parts.hostname or parts.path not in ("", "/"):
        raise PipelineError(f"{url!r} is no server: write http://HOST:8000 or grpc://HOST:8001")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Endpoint(parts.scheme, f"{host}:{port or _PORTS[parts.scheme]}")


class Client:
    """A client of one served model, over HTTP or gRPC, that threads may share.

    Every failure is a PipelineError: a ServerError when no answer came in `timeout` seconds.
    """

    def __init__(self, url: str, name: str = "handwriting", timeout: float = TIMEOUT) -> None:
        if not timeout > 0:
            raise PipelineError(f"the timeout must be above 0 seconds, got {timeout}")
        self.endpoint = endpoint(url)
        self.name = name
        self.timeout = timeout
        self._local = threading.local()
        self._config: triton.ModelConfig | None = None

    def classify(
        self, images: Sequence[Path | bytes | np.ndarray], top: int = 3
    ) -> list[Prediction]:
        """A prediction for each image: a file, its bytes, or an array of the model's shape.

        Raises PipelineError for a file where the model says that it takes arrays only.
        """
        if not images:
            return []
        pictures = self.pictures()
        if pictures == "arrays" and not all(isinstance(image, np.ndarray) for image in images):
            raise PipelineError(
                f"{self.name} does not say how a picture becomes what it takes: give arrays of "
                f"its shape, {list(self.config().input[0].dims)}"
            )
        arrays = [
            image if isinstance(image, np.ndarray) else read_image(image, pictures=pictures)
            for image in images
        ]
        outputs, version = self.infer(np.stack(arrays))
        return [self._prediction(row, version, top) for row in outputs]

    def infer(self, images: np.ndarray, timeout: float | None = None) -> tuple[np.ndarray, str]:
        """Log-probabilities (N, K) of images (N, ...), and the version that answered last.

        Asks as often as the server's largest batch needs, within one timeout.
        """
        deadline = time.monotonic() + (timeout or self.timeout)
        size = max(1, self.config(deadline).max_batch_size)
        answers, version = [], ""
        for start in range(0, len(images), size):
            outputs, version = self._infer(images[start : start + size], deadline)
            answers.append(outputs)
        return np.concatenate(answers), version

    def config(self, deadline: float | None = None) -> triton.ModelConfig:
        """The served model's configuration, asked for once."""
        if self._config is None:
            self._config = self._ask(
                self._grpc_config if self.endpoint.protocol == "grpc" else self._http_config,
                deadline or time.monotonic() + self.timeout,
            )
        return self._config

    def pictures(self) -> str:
        """How pictures become the served model's images: see config.pictures_of."""
        return triton.pictures(self.config())

    def metadata(self, of_model: bool = False) -> dict[str, Any]:
        """What the server says of itself, or of the model: name, version or versions, and more."""

        def ask(left: float) -> dict[str, Any]:
            if self.endpoint.protocol == "grpc":
                library, options = self._grpc(), {"as_json": True, "client_timeout": left}
            else:
                library, options = self._http(left), {}
            if of_model:
                return dict(library.get_model_metadata(self.name, **options))
            return dict(library.get_server_metadata(**options))

        return self._ask(ask, time.monotonic() + self.timeout)

    def server_name(self) -> str:
        """What the server calls itself: the `--id` that it was started with."""
        return str(self.metadata().get("name"))

    def labels(self, image: np.ndarray) -> tuple[str, ...]:
        """What the server calls each class when it is asked to classify an image.

        The names come from its label file; a class without one is called by its number.
        """
        config = self.config()
        count = int(config.output[0].dims[-1])
        answer, _ = self._infer(image[np.newaxis], time.monotonic() + self.timeout, count)
        names: dict[int, str] = {}
        for entry in answer.reshape(-1):  # bytes value:index:label
            _, index, *label = entry.decode().split(":", 2)
            names[int(index)] = label[0] if label else index
        return tuple(names.get(index, str(index)) for index in range(count))

    def close(self) -> None:
        """Close this thread's connections."""
        for connection in vars(self._local).values():
            connection.close()
        vars(self._local).clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prediction(self, row: np.ndarray, version: str, top: int) -> Prediction:
        config = self.config()
        labels = triton.classes(config) or tuple(map(str, range(len(row))))
        order = np.argsort(-row)[: max(1, top)]
        chances = probabilities(row, triton.kind(config))
        ranked = tuple((labels[index], float(chances[index])) for index in order)
        is_sure = ranked[0][1] >= triton.min_probability(config)
        return Prediction(*ranked[0], ranked, version, triton.digest(config, version), is_sure)

    def _infer(
        self, images: np.ndarray, deadline: float, class_count: int = 0
    ) -> tuple[np.ndarray, str]:
        config = self.config(deadline)
        if len(config.input) != 1 or not config.output:
            raise PipelineError(f"{self.name} at {self.endpoint} does not take just one tensor")
        library = tritonclient.grpc if self.endpoint.protocol == "grpc" else tritonclient.http
        tensor = library.InferInput(
            config.input[0].name, images.shape, np_to_triton_dtype(images.dtype)
        )
        tensor.set_data_from_numpy(np.ascontiguousarray(images))
        output = config.output[0].name
        wanted = [library.InferRequestedOutput(output, class_count=class_count)]

        def ask(left: float) -> tuple[np.ndarray | None, str]:
            if self.endpoint.protocol == "grpc":
                result = self._grpc().infer(
                    self.name, [tensor], outputs=wanted, client_timeout=left
                )
                return result.as_numpy(output), result.get_response().model_version
            result = self._http(left).infer(self.name, [tensor], outputs=wanted)
            return result.as_numpy(output), str(result.get_response().get("model_version", ""))

        answer, version = self._ask(ask, deadline)
        if answer is None or len(answer) != len(images):
            raise ServerError(f"{self.endpoint} answered without a row for each image")
        return answer, version

    def _grpc_config(self, left: float) -> triton.ModelConfig:
        return self._grpc().get_model_config(self.name, client_timeout=left).config

    def _http_config(self, left: float) -> triton.ModelConfig:
        answer = self._http(left).get_model_config(self.name)
        message = triton.ModelConfig()
        try:
            return json_format.ParseDict(answer, message, ignore_unknown_fields=True)
        except json_format.ParseError as error:
            raise ServerError(f"{self.endpoint} does not answer as Triton does") from error

    def _grpc(self) -> Any:
        if not hasattr(self._local, "grpc"):
            self._local.grpc = tritonclient.grpc.InferenceServerClient(self.endpoint.address)
        return self._local.grpc

    def _http(self, left: float) -> Any:
        if not hasattr(self._local, "http"):
            self._local.http = tritonclient.http.InferenceServerClient(
                self.endpoint.address, connection_timeout=left, network_timeout=left
            )
        return self._local.http

    def _ask(self, call: Callable[[float], T], deadline: float) -> T:
        """What `call` answers, given the seconds that are left; every failure one of ours."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._slow()
        try:
            return call(left)
        except InferenceServerException as error:
            raise self._explain(error) from error
        except TimeoutError as error:
            self.close()
            raise self._slow() from error
        except _LOST as error:
            self.close()
            reason = str(error) or type(error).__name__
            if isinstance(error, HTTPParseError):
                reason = "it closed the connection, or does not speak HTTP: is it a gRPC port?"
            raise ServerError(f"no answer from {self.endpoint} ({reason}): {_START}") from error
        except ValueError as error:  # its answer was no JSON
            raise ServerError(f"{self.endpoint} does not answer as Triton does: {error}") from error

    def _slow(self) -> SlowError:
        return SlowError(f"no answer from {self.endpoint} in {self.timeout:g} s: {_START}")

    def _explain(self, error: InferenceServerException) -> PipelineError:
        status, message = str(error.status()), str(error.message())
        if "DEADLINE_EXCEEDED" in status:
            return self._slow()
        if "has no available versions" in message:
            return ServerError(
                f"{self.endpoint} has unloaded {self.name}: it is stopping, or starting anew"
            )
        if "unknown model" in message:
            return PipelineError(
                f"{self.endpoint} serves no model {self.name!r}: choose with --name"
            )
        if "Stub process" in message:
            return ServerError(
                f"the model's process at {self.endpoint} died: 'pipeline serve stop', then "
                "'pipeline serve' starts it again"
            )
        if "UNAVAILABLE" in status:
            return ServerError(f"no answer from {self.endpoint} ({message}): {_START}")
        return PipelineError(f"{self.endpoint} refuses: {message}")


def probabilities(row: np.ndarray, kind: str) -> np.ndarray:
    """The probabilities (K,) in a row of outputs (K,) of that kind."""
    values = row.astype(np.float64)
    if kind == "probabilities":
        return values
    exponents = np.exp(values - values.max())
    chances: np.ndarray = exponents / exponents.sum()
    return chances if kind == "logits" else np.exp(values)

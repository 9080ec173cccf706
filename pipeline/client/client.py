"""The synchronous client of one served model, over HTTP or gRPC, with or without TLS."""

# Shape letters: N images, K classes.

import threading
import time
from collections.abc import Iterable
from typing import Any, Self, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message

from pipeline.client import wire
from pipeline.client.calls import Attempt, BaseClient, Pause, Steps
from pipeline.client.endpoint import Certificates as Certificates
from pipeline.client.endpoint import Endpoint, GrpcChannel
from pipeline.client.faults import Fault, of_grpc
from pipeline.client.http import HttpConnection
from pipeline.client.prediction import Image
from pipeline.client.prediction import Prediction as Prediction
from pipeline.repository import config_pbtxt

T = TypeVar("T")


class _Http:
    """A pool of HTTP connections: a thread takes one for each exchange and returns it."""

    def __init__(
        self, target: Endpoint, certificates: Certificates, headers: dict[str, str]
    ) -> None:
        self._endpoint, self._headers = target, headers
        self._context = certificates.context() if target.is_secure else None
        self._lock, self._idle = threading.Lock(), list[HttpConnection]()

    def exchange(self, call: wire.Call, seconds: float) -> Message | Fault:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or HttpConnection(self._endpoint, self._context)
        if connection.is_stale():
            connection.close()
        answer = connection.exchange(wire.to_http(call, self._headers), seconds)
        with self._lock:
            self._idle.append(connection)
        return answer if isinstance(answer, Fault) else wire.from_http(call, answer)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


class _Grpc:
    def __init__(
        self, target: Endpoint, certificates: Certificates, headers: dict[str, str]
    ) -> None:
        self._channel = GrpcChannel(grpc, target, certificates, headers)

    def exchange(self, call: wire.Call, seconds: float) -> Message | Fault:
        send = self._channel.open().unary_unary(call.path)  # bytes out, bytes in
        request = call.request.SerializeToString()
        try:
            content = send(request, timeout=seconds, metadata=self._channel.metadata)
        except grpc.RpcError as error:
            return of_grpc(error.code().name, error.details() or "", error)
        except ValueError as error:  # another thread closed the channel
            return Fault("lost", "the client was closed", error)
        return wire.from_grpc(call, content)

    def close(self) -> None:
        if channel := self._channel.take():
            channel.close()


class Client(BaseClient):
    """A client of one served model, over HTTP or gRPC, that threads may share.

    `url` is http, https, grpc or grpcs://HOST:PORT. Every failure is a PipelineError that says
    what was tried and how to fix it; it is a ServerError if there was no answer. `timeout`, in
    seconds, is for a whole call: all its requests and all retries. After a temporary fault (a
    refused or lost connection, a server with too much to do) a request is repeated up to `retries`
    times, after pauses of random length; that is safe because an inference changes nothing on the
    server. No proxy is used. Close the client after use. Its predictions are appended to
    `prediction_log`, a file's path, if it is given.
    """

    _wires = (_Http, _Grpc)

    def classify(self, images: Image | Iterable[Image], top: int = 3) -> list[Prediction]:
        """Return a prediction for each image, in order; `images` may be one image or many.

        An image is a file's path or bytes, a Pillow image, or an array. An array of the model's
        shape is sent unchanged (0 for paper, 255 for ink); any other array is a picture, (H, W) or
        (H, W, 3), and is prepared first, which counts towards the timeout. Raises PipelineError
        for a picture if the model takes arrays only.
        """
        return self._run(self._ask_predictions(images, top, self._deadline()))

    def infer(self, images: np.ndarray, timeout: float | None = None) -> tuple[np.ndarray, str]:
        """Return log-probabilities (N, K) of images (N, ...), and the version that answered last.

        Sends as many requests as the server's largest batch size requires, within one timeout.
        """
        return self._run(self._ask_outputs(images, self._deadline(timeout)))

    def config(self) -> config_pbtxt.ModelConfig:
        """Return the served model's configuration, which is requested once."""
        return self._run(self._ask_config(self._deadline()))

    def pictures(self) -> str:
        """Return how pictures become the served model's images: see signature.pictures_of."""
        return config_pbtxt.pictures(self.config())

    def metadata(self, of_model: bool = False) -> dict[str, Any]:
        """Return metadata of the server, or of the model: name, version or versions, and more."""
        return self._run(self._ask_metadata(of_model, self._deadline()))

    def server_name(self) -> str:
        """Return the server's name: the `--id` that it was started with."""
        return str(self.metadata().get("name"))

    def labels(self, image: np.ndarray) -> tuple[str, ...]:
        """Return the name that the server gives each class when it classifies an image.

        The names come from its label file; a class without a name there has its number.
        """
        return self._run(self._ask_labels(image, self._deadline()))

    def close(self) -> None:
        """Close the connections; a further call opens new ones."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, call: wire.Call) -> Message:
        """Return the answer to a call of any kind."""
        return self._run(self._ask(call, self._deadline()))

    def _run(self, steps: Steps[T]) -> T:
        """Execute the steps one after the other, and return their result."""
        result: Any = None
        while True:
            try:
                step = steps.send(result)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if isinstance(step, Attempt):
                result = self._wire.exchange(step.call, step.seconds)
            elif isinstance(step, Pause):
                time.sleep(step.seconds)
                result = None
            else:
                result = step.do()

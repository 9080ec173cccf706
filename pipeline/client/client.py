"""A client of one served model, over HTTP or gRPC, with or without TLS."""

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
    """Connections that threads take and give back."""

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
    what was tried and how to mend it, a ServerError when there was no answer. `timeout` is for a
    whole call: all requests that it takes, and all retries. What may pass (a refused or lost
    connection, a server with too much to do) is tried again up to `retries` times, after pauses
    of random length; that is safe because an inference changes nothing on the server, so that
    asked twice is as good as asked once. No proxy is used. Close it when you are done.
    What it answers goes into `prediction_log`, a file's path, if you name one.
    """

    _wires = (_Http, _Grpc)

    def classify(self, images: Image | Iterable[Image], top: int = 3) -> list[Prediction]:
        """A prediction for each image: one or many, in order.

        An image is a file's path or bytes, an image of Pillow, or an array: of the model's shape
        it is taken as it is (0 for paper, 255 for ink), any other is a picture, (H, W) or
        (H, W, 3), and is prepared, which takes of the timeout as well. Raises PipelineError for a
        picture where the model says that it takes arrays only.
        """
        return self._run(self._ask_predictions(images, top, self._deadline()))

    def infer(self, images: np.ndarray, timeout: float | None = None) -> tuple[np.ndarray, str]:
        """Log-probabilities (N, K) of images (N, ...), and the version that answered last.

        Asks as often as the server's largest batch needs, within one timeout.
        """
        return self._run(self._ask_outputs(images, self._deadline(timeout)))

    def config(self) -> config_pbtxt.ModelConfig:
        """The served model's configuration, asked for once."""
        return self._run(self._ask_config(self._deadline()))

    def pictures(self) -> str:
        """How pictures become the served model's images: see signature.pictures_of."""
        return config_pbtxt.pictures(self.config())

    def metadata(self, of_model: bool = False) -> dict[str, Any]:
        """What the server says of itself, or of the model: name, version or versions, and more."""
        return self._run(self._ask_metadata(of_model, self._deadline()))

    def server_name(self) -> str:
        """What the server calls itself: the `--id` that it was started with."""
        return str(self.metadata().get("name"))

    def labels(self, image: np.ndarray) -> tuple[str, ...]:
        """What the server calls each class when it is asked to classify an image.

        The names come from its label file; a class without one is called by its number.
        """
        return self._run(self._ask_labels(image, self._deadline()))

    def close(self) -> None:
        """Close its connections; a further call opens new ones."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, call: wire.Call) -> Message:
        """The answer to a call of any kind."""
        return self._run(self._ask(call, self._deadline()))

    def _run(self, steps: Steps[T]) -> T:
        """Do what the steps ask for, one after the other."""
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

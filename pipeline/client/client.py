"""The synchronous client of one served model, over HTTP or gRPC, with or without TLS."""

# Shape letters: N images, K classes.

import asyncio
import concurrent.futures
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack

import numpy as np

from pipeline.client.async_client import TIMEOUT, AsyncClient
from pipeline.client.connection import Connection
from pipeline.client.endpoint import Certificates as Certificates
from pipeline.client.endpoint import Endpoint
from pipeline.client.log import PredictionLog
from pipeline.client.prediction import Image
from pipeline.client.prediction import Prediction as Prediction
from pipeline.core.errors import PipelineError
from pipeline.repository import config_pbtxt

T = TypeVar("T")


class _DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """Runs each call in a daemon thread.

    The threads of a usual pool hold up the interpreter's exit, for as long as a slow lookup of a
    host's name takes.
    """

    def submit(self, call: Callable[..., T], /, *args: Any, **options: Any) -> Any:
        future = concurrent.futures.Future[T]()

        def run() -> None:
            future.set_running_or_notify_cancel()
            try:
                future.set_result(call(*args, **options))
            except BaseException as error:  # the future's owner raises it
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


class _Loop:
    """The event loop of all clients of this process, in a daemon thread."""

    lock = threading.Lock()
    loop: asyncio.AbstractEventLoop | None = None
    is_grpc_lost = False

    @classmethod
    def get(cls) -> asyncio.AbstractEventLoop:
        """Return the loop; start it at first."""
        with cls.lock:
            if cls.loop is None:
                cls.loop = asyncio.new_event_loop()
                cls.loop.set_default_executor(_DaemonThreads())
                threading.Thread(target=cls.loop.run_forever, daemon=True).start()
            return cls.loop

    @classmethod
    def forget(cls) -> None:
        """Forget the loop in a forked process, which has none of its parent's threads."""
        cls.is_grpc_lost = cls.loop is not None  # its own threads are gone as well
        cls.lock, cls.loop = threading.Lock(), None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_Loop.forget)


def _close_later(client: AsyncClient) -> None:
    if client.loop and client.loop is _Loop.loop:  # not in a forked process
        asyncio.run_coroutine_threadsafe(client.close(), client.loop)


class Options(TypedDict, total=False):
    """What a client takes besides the URL, the model's name and the timeout."""

    version: int | str  # of the model; by default the one that the server chooses
    certificates: Certificates  # for TLS
    headers: Mapping[str, str] | None  # sent with each request, such as keys
    retries: int
    prediction_log: PredictionLog | str | Path | None


class Client:
    """A client of one served model, over HTTP or gRPC, that threads may share.

    `url` is http, https, grpc or grpcs://HOST:PORT. Every failure is a PipelineError that says
    what was tried and how to fix it; it is a ServerError if there was no answer. `timeout`, in
    seconds, is for a whole call: all its requests and all retries. After a temporary fault (a
    refused or lost connection, a server that is overloaded or without the model for a moment) a
    request is repeated up to `retries` times, after pauses of random length; that is safe because
    an inference changes nothing on the server. No proxy is used. Close the client after use. Its
    predictions are appended to `prediction_log`, a file's path, if it is given.
    """

    def __init__(
        self,
        url: str | Endpoint,
        name: str = "handwriting",
        timeout: float = TIMEOUT,
        **options: Unpack[Options],
    ) -> None:
        self._client = AsyncClient(url, name, timeout, **options)
        self.endpoint, self.name, self.timeout = self._client.endpoint, name, timeout
        # Closes it when this client is collected without having been closed, or at exit.
        weakref.finalize(self, _close_later, self._client)

    def classify(self, images: Image | Iterable[Image], top: int = 3) -> list[Prediction]:
        """Return a prediction for each image, in order; `images` may be one image or many.

        An image is a file's path or bytes, a Pillow image, or an array. An array of the model's
        shape, or several of them in one array, is sent unchanged (0 for paper, 255 for ink), but
        floats become the model's float type; any other array is a picture, (H, W) or (H, W, 3), and
        is prepared first, which counts towards the timeout. Raises PipelineError for a picture if
        the model takes arrays only.
        """
        return self._run(self._client.classify(images, top))

    def infer(
        self, images: np.ndarray, timeout: float | None = None, output: str = ""
    ) -> tuple[np.ndarray, str]:
        """Return log-probabilities (N, K) of images (N, ...), and the version that answered last.

        Sends as many requests as the server's largest batch size requires, within one timeout. With
        `output`, returns that output of the model, such as `scores` of an exact one.
        """
        return self._run(self._client.infer(images, timeout, output))

    def config(self) -> config_pbtxt.ModelConfig:
        """Return the model's configuration, requested once, and again after a lost server."""
        return self._run(self._client.config())

    def pictures(self) -> str:
        """Return how pictures become the served model's images: see signature.pictures_of.

        Raises PipelineError if the model takes arrays only.
        """
        return config_pbtxt.require_pictures(self.config())

    def metadata(self, of_model: bool = False) -> dict[str, Any]:
        """Return metadata of the server, or of the model: name, version or versions, and more."""
        return self._run(self._client.metadata(of_model))

    def server_name(self) -> str:
        """Return the server's name: the `--id` that it was started with."""
        return str(self.metadata().get("name"))

    def labels(self, image: np.ndarray) -> tuple[str, ...]:
        """Return the name that the server gives each class when it classifies an image.

        The names come from its label file; a class without a name there has its number.
        """
        return self._run(self._client.labels(image))

    def call_triton(self, method: str, *args: str, may_repeat: bool = True, **options: Any) -> Any:
        """Return the result of a method of tritonclient's own client, with this client's faults."""

        async def request(connection: Connection) -> Any:
            with connection.faults():
                call = getattr(connection.triton, method)
                return await call(*args, headers=connection.headers, **options)

        return self._run(self._client.ask(request, may_repeat))

    def close(self) -> None:
        """Close the connections; a further call opens new ones."""
        self._run(self._client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of a call, which runs in the event loop's thread."""
        is_forked = self._client.loop not in (None, _Loop.loop)
        if is_forked or (_Loop.is_grpc_lost and self.endpoint.is_grpc):
            call.close()
            raise PipelineError(
                "a client does not work after a fork: make a new client in this process. gRPC does "
                "not work here at all: use an HTTP URL, or start processes with 'spawn'"
            )
        future = asyncio.run_coroutine_threadsafe(call, _Loop.get())
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nothing waits for the call any more
            future.cancel()
            raise

"""The asynchronous client of one served model, for programs that use asyncio."""

# Shape letters: N images, K classes.

import asyncio
from collections.abc import Iterable
from typing import Any, Self, TypeVar

import aiohttp
import grpc.aio
import numpy as np
from google.protobuf.message import Message

from pipeline.client import wire
from pipeline.client.calls import Attempt, BaseClient, Pause, Steps
from pipeline.client.endpoint import Certificates, Endpoint, GrpcChannel
from pipeline.client.faults import Fault, of_connection, of_grpc
from pipeline.client.prediction import Image, Prediction
from pipeline.core.errors import PipelineError
from pipeline.repository import config_pbtxt

T = TypeVar("T")


class _Http:
    def __init__(
        self, target: Endpoint, certificates: Certificates, headers: dict[str, str]
    ) -> None:
        self._endpoint, self._headers = target, headers
        self._context = certificates.context() if target.is_secure else None
        self._session: aiohttp.ClientSession | None = None

    async def exchange(self, call: wire.Call, seconds: float) -> Message | Fault:
        request = wire.to_http(call, self._headers)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._context or True),
                timeout=aiohttp.ClientTimeout(total=None),  # ours is around each exchange
            )
        try:
            async with self._session.request(
                request.verb,
                f"{self._endpoint}{request.path}",
                data=request.body or None,
                headers=request.headers,
                allow_redirects=False,
            ) as response:
                content = bytearray()
                async for part in response.content.iter_chunked(2**16):
                    content += part
                    if len(content) > wire.MAX_ANSWER_BYTES:
                        raise ValueError(f"an answer of more than {wire.MAX_ANSWER_BYTES:,} bytes")
        except aiohttp.ClientError as error:
            return _fault(error)
        except (OSError, ValueError) as error:
            return of_connection(error, is_connected=True)
        headers = {name.lower(): value for name, value in response.headers.items()}
        return wire.from_http(call, wire.HttpAnswer(response.status, headers, bytes(content)))

    async def close(self) -> None:
        session, self._session = self._session, None
        if session:
            await session.close()


def _fault(error: aiohttp.ClientError) -> Fault:
    """Return the fault of an error of aiohttp, which wraps the socket's errors."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Fault("unnamed", str(error.os_error), error)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return of_connection(error.certificate_error, is_connected=False)
    if isinstance(error, aiohttp.ClientConnectorError):  # includes TLS errors
        return of_connection(error.os_error, is_connected=False)
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
        return Fault("lost", str(error) or "it closed the connection", error)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Fault("lost", "it closed the connection within an answer", error)
    return Fault("alien", " ".join(str(error).split())[:200] or type(error).__name__, error)


class _Grpc:
    def __init__(
        self, target: Endpoint, certificates: Certificates, headers: dict[str, str]
    ) -> None:
        self._channel = GrpcChannel(grpc.aio, target, certificates, headers)

    async def exchange(self, call: wire.Call, seconds: float) -> Message | Fault:
        send = self._channel.open().unary_unary(call.path)  # bytes out, bytes in
        request = call.request.SerializeToString()
        try:
            content = await send(request, timeout=seconds, metadata=self._channel.metadata)
        except grpc.aio.AioRpcError as error:
            return of_grpc(error.code().name, error.details() or "", error)
        except grpc.aio.UsageError as error:  # another task closed the channel
            return Fault("lost", "the client was closed", error)
        return wire.from_grpc(call, content)

    async def close(self) -> None:
        if channel := self._channel.take():
            await channel.close()


class AsyncClient(BaseClient):
    """A client of one served model, over HTTP or gRPC, that tasks of one event loop may share.

    Otherwise it is like `Client`: see there for URLs, errors, the deadline and retries.
    """

    _wires = (_Http, _Grpc)
    _loop: asyncio.AbstractEventLoop | None = None

    async def classify(self, images: Image | Iterable[Image], top: int = 3) -> list[Prediction]:
        """Return a prediction for each image, one or many: see `Client.classify`."""
        return await self._run(self._ask_predictions(images, top, self._deadline()))

    async def infer(
        self, images: np.ndarray, timeout: float | None = None
    ) -> tuple[np.ndarray, str]:
        """Return log-probabilities (N, K) of images (N, ...), and the last answer's version."""
        return await self._run(self._ask_outputs(images, self._deadline(timeout)))

    async def config(self) -> config_pbtxt.ModelConfig:
        """Return the served model's configuration, which is requested once."""
        return await self._run(self._ask_config(self._deadline()))

    async def metadata(self, of_model: bool = False) -> dict[str, Any]:
        """Return metadata of the server, or of the model: name, version or versions, and more."""
        return await self._run(self._ask_metadata(of_model, self._deadline()))

    async def close(self) -> None:
        """Close the connections; a further call opens new ones."""
        await self._wire.close()
        self._loop = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        """Execute the steps one after the other, and return their result."""
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise PipelineError("this client is another event loop's: make one in each")
        self._loop = loop
        result: Any = None
        while True:
            try:
                step = steps.send(result)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if isinstance(step, Attempt):
                try:
                    async with asyncio.timeout(step.seconds):
                        result = await self._wire.exchange(step.call, step.seconds)
                except TimeoutError as error:
                    result = Fault("slow", "no answer in time", error)
            elif isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                result = None
            else:
                result = await asyncio.to_thread(step.do)

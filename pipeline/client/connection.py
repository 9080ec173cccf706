"""Connections to a server by tritonclient's asynchronous clients; every failure is a Fault."""

# Shape letters: N images.

import asyncio
import contextlib
import struct
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype

from pipeline.client.endpoint import RemoteModel
from pipeline.client.faults import Fault, short
from pipeline.repository import config_pbtxt

# The exceptions of reading an answer that is not Triton's.
_UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError),
    *(struct.error, DecodeError, json_format.ParseError, AssertionError),
)
M = TypeVar("M", bound=Message)


class Connection:
    """A connection about one model to a server, for the tasks of one event loop, which opens it."""

    library: Any  # tritonclient's module of the protocol, for its input and output classes
    triton: Any  # that module's InferenceServerClient, for calls that are not here

    def __init__(self, target: RemoteModel) -> None:
        self.headers, self._model = dict(target.headers), (target.name, target.version)

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Convert what tritonclient raises to a Fault."""
        try:
            with self._library_faults():
                yield
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise  # the caller gave up, or its deadline passed
            raise Fault("lost", "the client was closed") from error
        except _UNREADABLE as error:
            raise Fault("alien", short(str(error)) or type(error).__name__) from error

    def _library_faults(self) -> contextlib.AbstractContextManager[None]:
        """Convert what the protocol's library raises to a Fault."""
        raise NotImplementedError

    async def config(self) -> config_pbtxt.ModelConfig:
        """Return the configuration of the model."""
        with self.faults():
            answer = await self.triton.get_model_config(*self._model, headers=self.headers)
            if isinstance(answer, dict):  # HTTP answers with the configuration itself
                answer = {"config": answer}
            config = to_message(answer, service_pb2.ModelConfigResponse).config
            if not config.name:
                raise ValueError("a config without a name")
        return config

    async def metadata(self, of_model: bool) -> dict[str, Any]:
        """Return metadata of the model, or of the server."""
        kind = service_pb2.ModelMetadataResponse if of_model else service_pb2.ServerMetadataResponse
        with self.faults():
            if of_model:
                answer = self.triton.get_model_metadata(*self._model, headers=self.headers)
            else:
                answer = self.triton.get_server_metadata(headers=self.headers)
            message = to_message(await answer, kind)
            return dict(json_format.MessageToDict(message, preserving_proto_field_name=True))

    async def infer(
        self, config: config_pbtxt.ModelConfig, images: np.ndarray, class_count: int = 0
    ) -> tuple[np.ndarray, str]:
        """Return outputs (N, ...) of images (N, ...), and the version that answered.

        With `class_count`, the answer is that many labels of each image instead of numbers.
        """
        output, dtype = config.output[0], config_pbtxt.type_name(config.output[0])
        tensor = self.library.InferInput(
            config.input[0].name, list(images.shape), np_to_triton_dtype(images.dtype)
        )
        tensor.set_data_from_numpy(images)
        wanted = [self.library.InferRequestedOutput(output.name, class_count=class_count)]
        with self.faults():
            # A copy of the headers: over HTTP, tritonclient adds its own to them.
            name, version = self._model
            result = await self.triton.infer(
                name, [tensor], version, wanted, headers=dict(self.headers)
            )
            response, values = result.get_response(), result.as_numpy(output.name)
            if values is None:
                raise ValueError(f"an answer without {output.name!r}")
            told = result.get_output(output.name)
            shape = tuple(told["shape"] if isinstance(told, dict) else told.shape)
            if not shape or shape != values.shape or len(values) != len(images):
                raise ValueError(f"an answer of shape {list(shape)} to {len(images)} images")
            # tritonclient reads a type that it does not know as float64.
            if not class_count and str(values.dtype) != dtype:
                raise ValueError(f"an answer of type {values.dtype}, not {dtype}")
            if values.dtype.kind == "f" and np.isnan(values).any():
                raise ValueError("an answer with NaN")
            if isinstance(response, dict):
                return values, str(response["model_version"])
            return values, response.model_version

    async def close(self) -> None:
        """Close the connection."""
        await self.triton.close()


def open_connection(target: RemoteModel) -> Connection:
    """Return a connection to a model.

    Each protocol's library is imported only here: over gRPC, nothing waits for aiohttp and gevent.
    """
    if target.endpoint.is_grpc:
        from pipeline.client.grpc_connection import GrpcConnection

        return GrpcConnection(target)
    from pipeline.client.http_connection import HttpConnection

    return HttpConnection(target)


def to_message(answer: Any, kind: type[M]) -> M:
    """Return an answer as its message: over HTTP, tritonclient returns it as JSON."""
    if isinstance(answer, kind):
        return answer
    return json_format.ParseDict(answer, kind(), ignore_unknown_fields=True)

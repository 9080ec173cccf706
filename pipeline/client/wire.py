"""Requests and answers in both protocols: gRPC's messages, and their form over HTTP."""

# Shape letters: N images, K classes.

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, triton_to_np_dtype

from pipeline.client.faults import Fault, of_http
from pipeline.repository import config_pbtxt

SERVICE = "inference.GRPCInferenceService"
MAX_ANSWER_BYTES = 256 * 2**20
_LENGTH = "Inference-Header-Content-Length"  # of the JSON before the tensors
# The exceptions of reading an answer that is not Triton's.
_UNREADABLE = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError),
    *(DecodeError, json_format.ParseError),
)


@dataclass(frozen=True)
class Call:
    """A method of Triton's service with its request message; the answer is a message too."""

    method: str
    request: Message
    may_repeat: bool = True  # repeating the request does no harm

    @property
    def path(self) -> str:
        """The method's path in gRPC."""
        return f"/{SERVICE}/{self.method}"


@dataclass(frozen=True)
class HttpRequest:
    """A request over HTTP."""

    verb: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class HttpAnswer:
    """An answer over HTTP; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def infer(
    name: str,
    version: str,
    config: config_pbtxt.ModelConfig,
    images: np.ndarray,
    class_count: int = 0,
) -> Call:
    """Return the call of an inference on images (N, ...).

    With `class_count`, the server answers with that many labels instead of numbers. The call may be
    repeated: a model without state gives the same answer, and nothing else changes.
    """
    request = service_pb2.ModelInferRequest(model_name=name, model_version=version)
    request.inputs.add(
        name=config.input[0].name,
        datatype=np_to_triton_dtype(images.dtype) or "",
        shape=images.shape,
    )
    request.raw_input_contents.append(images.tobytes())
    output = request.outputs.add(name=config.output[0].name)
    if class_count:
        output.parameters["classification"].int64_param = class_count
    return Call("ModelInfer", request)


def to_http(call: Call, headers: Mapping[str, str]) -> HttpRequest:
    """Convert a call to an HTTP request with further headers; only for the calls of a client."""
    request: Any = call.request
    if call.method == "ServerMetadata":
        return HttpRequest("GET", "/v2", headers)
    if call.method != "ModelInfer":
        assert call.method in ("ModelConfig", "ModelMetadata"), f"{call.method} is for gRPC"
        path = _model_path(request.name, request.version)
        return HttpRequest(
            "GET", f"{path}/config" if call.method == "ModelConfig" else path, headers
        )
    (tensor,), (content,), (output,) = request.inputs, request.raw_input_contents, request.outputs
    wanted: dict[str, Any] = {"binary_data": True}
    if "classification" in output.parameters:
        wanted["classification"] = output.parameters["classification"].int64_param
    given = {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.shape),
        "parameters": {"binary_data_size": len(content)},
    }
    named = [{"name": output.name, "parameters": wanted}]
    head = json.dumps({"inputs": [given], "outputs": named}).encode()
    ours = {"Content-Type": "application/octet-stream", _LENGTH: str(len(head))}
    path = f"{_model_path(request.model_name, request.model_version)}/infer"
    return HttpRequest("POST", path, {**headers, **ours}, head + content)


def _model_path(name: str, version: str) -> str:
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _answer_to(call: Call) -> type[Message]:
    return getattr(service_pb2, f"{call.method}Response")  # type: ignore[no-any-return]


def from_grpc(call: Call, content: bytes) -> Message | Fault:
    """Return the message in an answer over gRPC, or a Fault if it cannot be read."""
    try:
        return _answer_to(call).FromString(content)
    except DecodeError as error:
        return alien(error)


def from_http(call: Call, answer: HttpAnswer) -> Message | Fault:
    """Return the message in an answer over HTTP, or the Fault of its status or content."""
    headers = answer.headers
    if answer.status != 200:
        return of_http(answer.status, answer.body, headers)
    message: Any = _answer_to(call)()
    length = headers.get(_LENGTH.lower())
    try:
        end = int(length) if length else len(answer.body)
        told, rest = json.loads(answer.body[:end]), answer.body[end:]
        if call.method != "ModelInfer":
            part = message.config if call.method == "ModelConfig" else message
            json_format.ParseDict(told, part, ignore_unknown_fields=True)
            return message  # type: ignore[no-any-return]
        message.model_name = told["model_name"]
        message.model_version = str(told["model_version"])
        for output in told["outputs"]:
            name, datatype, shape = output["name"], output["datatype"], output["shape"]
            message.outputs.add(name=name, datatype=datatype, shape=shape)
            size = output["parameters"]["binary_data_size"]
            message.raw_output_contents.append(rest[:size])
            rest = rest[size:]
    except _UNREADABLE as error:
        return alien(error)
    return message  # type: ignore[no-any-return]


def read_outputs(answer: Any, name: str, images: int) -> np.ndarray | Fault:
    """Return the output of that name, one row per image, or a Fault if it cannot be read."""
    try:
        index = [output.name for output in answer.outputs].index(name)
        tensor, content = answer.outputs[index], answer.raw_output_contents[index]
        shape = tuple(tensor.shape)
        if not shape or shape[0] != images or min(shape) < 0:
            raise ValueError(f"answers of shape {list(shape)} to {images} images")
        if tensor.datatype == "BYTES":
            return np.asarray(deserialize_bytes_tensor(content)).reshape(shape)
        dtype = triton_to_np_dtype(tensor.datatype)
        if dtype is None:
            raise ValueError(f"an answer of type {tensor.datatype!r}")
        values = np.frombuffer(content, dtype).reshape(shape)
        if np.isnan(values).any():
            raise ValueError("an answer that is not a number")
    except (*_UNREADABLE, OSError, ArithmeticError, struct.error) as error:
        return alien(error)
    return values


def alien(error: Exception) -> Fault:
    """Return the fault of an answer that cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return Fault("alien", reason or type(error).__name__, error)

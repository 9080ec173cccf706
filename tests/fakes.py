"""Servers on loopback that answer as Triton does, or go wrong as they are told to."""

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from pipeline.core.signature import IMAGES, log_probabilities
from pipeline.repository import config_pbtxt
from pipeline.repository.settings import PackageConfig

DIGEST = "ab" * 32
LARGEST = 4  # images in a batch


def config() -> config_pbtxt.ModelConfig:
    """The config of a model of ten digits, as a packaged one has it."""
    classes = [str(digit) for digit in range(10)]
    settings = PackageConfig(max_batch_size=LARGEST)
    message = config_pbtxt.base_config(
        "handwriting", IMAGES, log_probabilities(10), classes, settings
    )
    config_pbtxt.set_parameter(message, "sha256.1", DIGEST)
    config_pbtxt.set_parameter(message, config_pbtxt.MIN_PROBABILITY, "0.5")
    return message


def outputs(images: np.ndarray) -> np.ndarray:
    """The fake model takes the first pixel for the digit, and is 90 % sure of it."""
    digits = images.reshape(len(images), -1)[:, 0]
    rows = np.full((len(images), 10), np.log(0.1 / 9), np.float32)
    rows[np.arange(len(images)), digits] = np.log(0.9)
    return rows


@dataclass
class Asked:
    """What a fake was asked for, in order."""

    methods: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of the batches

    @property
    def inferences(self) -> int:
        return self.methods.count("ModelInfer")


@dataclass(frozen=True)
class Reply:
    """An answer of the fakes' own, over either protocol."""

    status: int = 200
    body: bytes = b""
    code: grpc.StatusCode | None = None
    details: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


Before = Callable[[str, Asked], Reply | None]  # what to answer instead; None: as Triton does


def as_triton(method: str, asked: Asked) -> None:
    """Answer everything rightly."""


def _inferred(images: np.ndarray, asked: Asked) -> bytes:
    asked.sizes.append(len(images))
    return outputs(images).tobytes()


@contextlib.contextmanager
def tcp(
    script: Callable[[socket.socket], None], context: ssl.SSLContext | None = None, port: int = 0
) -> Iterator[int]:
    """The port of a server that runs the script on each connection, each in its own thread."""
    stopping, open_ones = threading.Event(), list[socket.socket]()

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection:
            open_ones.append(connection)
            if context is None:
                script(connection)
            else:
                with context.wrap_socket(connection, server_side=True) as secured:
                    open_ones.append(secured)
                    script(secured)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while not stopping.is_set():
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", port)) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stopping.set()
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            acceptor.join()
            for connection in open_ones:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def request(stream: Any) -> tuple[str, dict[str, str], bytes]:
    """The path, headers and body of an HTTP request."""
    _, path, _ = stream.readline().decode().split()
    headers = {}
    while line := stream.readline().decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return path, headers, stream.read(int(headers.get("content-length", 0)))


def response(reply: Reply) -> bytes:
    """The reply as HTTP has it."""
    headers = {"Content-Length": str(len(reply.body)), **reply.headers}
    lines = [f"HTTP/1.1 {reply.status} Scripted", *(f"{n}: {v}" for n, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + reply.body


def _over_http(path: str, headers: Mapping[str, str], body: bytes, asked: Asked) -> Reply:
    if not path.startswith("/v2/models/handwriting/"):
        return Reply(400, headers={"Connection": "close"})
    if path.endswith("/config"):
        return Reply(body=config_pbtxt.to_json(config()).encode())
    length = int(headers["inference-header-content-length"])
    shape = json.loads(body[:length])["inputs"][0]["shape"]
    rows = _inferred(np.frombuffer(body[length:], np.uint8).reshape(shape), asked)
    output = {
        "name": "log_probabilities",
        "datatype": "FP32",
        "shape": [shape[0], 10],
        "parameters": {"binary_data_size": len(rows)},
    }
    head = json.dumps({"model_name": "handwriting", "model_version": "1", "outputs": [output]})
    return Reply(
        body=head.encode() + rows, headers={"Inference-Header-Content-Length": str(len(head))}
    )


@contextlib.contextmanager
def http_server(
    before: Before, context: ssl.SSLContext | None = None, port: int = 0
) -> Iterator[tuple[int, Asked]]:
    """The port of an HTTP server, and what it was asked."""
    asked = Asked()

    def script(connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        while True:
            path, headers, body = request(stream)
            method = "ModelInfer" if path.endswith("/infer") else "ModelConfig"
            asked.methods.append(method)
            reply = before(method, asked) or _over_http(path, headers, body, asked)
            connection.sendall(response(reply))
            if reply.headers.get("Connection") == "close":
                return

    with tcp(script, context, port) as found:
        yield found, asked


@contextlib.contextmanager
def grpc_server(
    before: Before, credentials: grpc.ServerCredentials | None = None, port: int = 0
) -> Iterator[tuple[int, Asked]]:
    """The port of a gRPC server, and what it was asked."""
    asked = Asked()

    def answer(method: str, content: bytes, context: grpc.ServicerContext) -> bytes:
        asked.methods.append(method)
        reply = before(method, asked)
        if reply is None:
            return _over_grpc(method, content, asked)
        if reply.code:
            context.abort(reply.code, reply.details)
        return reply.body

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            method = details.method.rpartition("/")[2]
            return grpc.unary_unary_rpc_method_handler(
                lambda content, context: answer(method, content, context)
            )

    server = grpc.server(ThreadPoolExecutor(8), handlers=[Handler()])
    address = f"127.0.0.1:{port}"
    found = (
        server.add_secure_port(address, credentials)
        if credentials
        else server.add_insecure_port(address)
    )
    server.start()
    try:
        yield found, asked
    finally:
        server.stop(None).wait()


def _over_grpc(method: str, content: bytes, asked: Asked) -> bytes:
    if method == "ModelConfig":
        found = service_pb2.ModelConfigResponse(config=config())
        return bytes(found.SerializeToString())
    request = service_pb2.ModelInferRequest.FromString(content)
    shape = request.inputs[0].shape
    images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape)
    answer = service_pb2.ModelInferResponse(model_name="handwriting", model_version="1")
    answer.outputs.add(name="log_probabilities", datatype="FP32", shape=[shape[0], 10])
    answer.raw_output_contents.append(_inferred(images, asked))
    return bytes(answer.SerializeToString())


@dataclass(frozen=True)
class Authority:
    """A CA in a folder, and whom it has signed: a server here, one elsewhere, and a client."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name

    def context(self, server: str = "server", is_asking: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.file("ca.crt"))
        context.load_cert_chain(self.file(f"{server}.crt"), self.file(f"{server}.key"))
        context.verify_mode = ssl.CERT_REQUIRED if is_asking else ssl.CERT_NONE
        return context

    def credentials(
        self, server: str = "server", is_asking: bool = False
    ) -> grpc.ServerCredentials:
        pair = (self.file(f"{server}.key").read_bytes(), self.file(f"{server}.crt").read_bytes())
        return grpc.ssl_server_credentials([pair], self.file("ca.crt").read_bytes(), is_asking)


def authority(folder: Path) -> Authority:
    """A new CA with its certificates, made by openssl."""
    folder.mkdir(parents=True)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(
        *("req", "-x509", *new_key, "-days", "2", "-subj", "/CN=a test's CA"),
        *("-keyout", "ca.key", "-out", "ca.crt"),
    )
    for name, host in (("server", "IP:127.0.0.1"), ("elsewhere", "DNS:a.test"), ("me", "DNS:me")):
        openssl(
            *("req", "-x509", *new_key, "-days", "2", "-subj", f"/CN={name}"),
            *("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", f"subjectAltName={host}"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-keyout", f"{name}.key", "-out", f"{name}.crt"),
        )
    return Authority(folder)


@contextlib.contextmanager
def tls_front(behind: int, context: ssl.SSLContext) -> Iterator[int]:
    """Forward TLS connections to the port `behind` without TLS, as a load balancer does."""
    context.set_alpn_protocols(["h2", "http/1.1"])

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", behind)
        await asyncio.gather(copy(source, to_server), copy(server, target))

    loop = asyncio.new_event_loop()
    start = asyncio.start_server(forward, "127.0.0.1", ssl=context)
    front = loop.run_until_complete(start)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield front.sockets[0].getsockname()[1]
    finally:

        async def stop() -> None:
            front.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

"""Load over HTTP/1.1: requests are built once and sent as bytes, by one thread per connection.

Meant for large requests: this client spends a tenth of the time that a gRPC library spends on each,
and on a machine that client and server share, only the server should be measured.
"""

# Shape letters: B batch.

import http.client
import io
import json
import queue
import re
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.benchmark.target import PAUSE, InputTensor, LoadTarget, Measured
from pipeline.client.faults import Fault, of_connection, of_http

_CHUNK = 1 << 16  # bytes
_LARGEST = 1 << 30  # bytes of an answer
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_HEADER = re.compile(rb"\r\ninference-header-content-length: *(\d+)\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close *\r\n", re.IGNORECASE)
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_Answer = tuple[bytes, float, bool]  # head and body, when it began to come, if it is the last one


def build_request(target: LoadTarget, tensors: Sequence[InputTensor]) -> bytes:
    """Build a request with its inputs (B, ...) as binary data, if the server takes that.

    Follows KServe's protocol, version 2, with Triton's extension for binary data.
    """
    data = [tensor.raw() for tensor in tensors] if target.is_binary else []
    content: dict[str, list[object]] = {"inputs": [], "outputs": []}
    for index, (name, datatype, values) in enumerate(tensors):
        entry: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": datatype}
        if target.is_binary:
            entry["parameters"] = {"binary_data_size": len(data[index])}
        else:
            text = np.char.decode(values.astype(bytes)) if datatype == "BYTES" else values
            entry["data"] = text.ravel().tolist()
        content["inputs"].append(entry)
    binary = {"parameters": {"binary_data": True}} if target.is_binary else {}
    content["outputs"] += [{"name": name, **binary} for name in target.outputs]
    header = json.dumps({key: entries for key, entries in content.items() if entries}).encode()
    body = b"".join([header, *data])
    version = f"/versions/{target.version}" if target.version else ""
    length = {"Inference-Header-Content-Length": len(header)} if target.is_binary else {}
    headers = {
        "Host": target.endpoint.address,
        "Content-Type": "application/octet-stream" if target.is_binary else "application/json",
        "Content-Length": len(body),
        **length,
        **target.headers,
    }
    head = f"POST /v2/models/{target.name}{version}/infer HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{head}\r\n".encode() + body


def ask_all(
    target: LoadTarget, requests: tuple[bytes, ...], concurrency: int, measured: Measured
) -> None:
    """Keep `concurrency` requests in progress until the end, each on a connection of its own."""

    def caller(turn: int) -> None:
        connection: socket.socket | None = None
        while (start := time.perf_counter()) < measured.end:
            is_open = connection is not None
            try:
                # Allow silence until 30 s after the window's end, for a server that stalls.
                connection = connection or _connect(target, measured.end - start + 30.0)
                is_open = True
                connection.sendall(requests[turn % len(requests)])
                sent = time.perf_counter()
                answer, first, is_last = _answer(connection)
            except (OSError, ValueError, Fault) as error:
                measured.faults.append(_to_fault(error, is_open))
                is_last = True
                time.sleep(PAUSE)
            else:
                measured.add(turn, answer, start, sent, first)
                turn += concurrency
            if is_last and connection:
                connection.close()
                connection = None
        if connection:
            connection.close()

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            list(pool.map(caller, range(concurrency)))
        except BaseException:  # Ctrl-C: the other threads stop soon
            measured.end = 0.0
            raise


def _to_fault(error: Exception, is_connected: bool) -> Fault:
    if isinstance(error, Fault):
        return error
    if isinstance(error, OSError):
        return of_connection(error, is_connected)
    return Fault("alien", str(error))


class Pool:
    """A pool of connections for an open loop; requests that find none free wait."""

    def __init__(self, target: LoadTarget, size: int, silence: float) -> None:
        self._target, self._silence = target, silence
        self._idle: queue.LifoQueue[socket.socket] = queue.LifoQueue()
        self._workers = ThreadPoolExecutor(size)

    def send(self, request: bytes, done: Callable[[bytes | None], None]) -> None:
        """Start a request; `done` receives the answer, or None if there is none."""
        self._workers.submit(self._ask, request, done)

    def _ask(self, request: bytes, done: Callable[[bytes | None], None]) -> None:
        connection = None
        try:
            try:
                connection = self._idle.get_nowait()
            except queue.Empty:
                connection = _connect(self._target, self._silence)
            connection.sendall(request)
            answer, _, is_last = _answer(connection)
        except (OSError, ValueError, Fault):
            if connection:
                connection.close()
            done(None)
            return
        done(answer)
        if is_last:
            connection.close()
        else:
            self._idle.put(connection)

    def close(self) -> None:
        """Wait for the requests in progress, and close the connections."""
        self._workers.shutdown()
        while not self._idle.empty():
            self._idle.get().close()


def _connect(target: LoadTarget, silence: float) -> socket.socket:
    """Connect to the target, with a timeout of `silence` seconds for each operation."""
    host = target.endpoint.host
    connection = socket.create_connection((host, target.endpoint.port), silence)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if target.context is None:
        return connection
    return target.context.wrap_socket(connection, server_hostname=host)


def _answer(connection: socket.socket) -> _Answer:
    """Return the next answer; raise Fault for a status but 200, ValueError for a broken one."""
    answer = bytearray(_more(connection, 0))
    first = time.perf_counter()
    while (split := answer.find(b"\r\n\r\n") + 4) < 4:
        answer += _more(connection, len(answer))
    head = bytes(answer[:split])
    status, length = _STATUS.match(head), _LENGTH.search(head)
    if not status or not length:
        raise ValueError(f"the answer is not HTTP/1.1 with a Content-Length: {head[:100]!r}")
    while len(answer) < split + int(length[1]):
        answer += _more(connection, len(answer))
    if status[1] != b"200":
        headers = http.client.parse_headers(io.BytesIO(head.partition(b"\r\n")[2]))
        raise of_http(int(status[1]), bytes(answer[split:]), dict(headers.items()))
    return bytes(answer), first, bool(_CLOSE.search(head))


def _more(connection: socket.socket, size: int) -> bytes:
    chunk = connection.recv(_CHUNK)
    if not chunk or size > _LARGEST:
        raise ValueError("the answer breaks off, or does not end")
    return chunk


def content_of(answer: bytes) -> bytes:
    """Return the bytes of an answer's output; raise ValueError if they cannot be found."""
    header = _HEADER.search(answer)
    if not header:
        raise ValueError("an answer without binary data")
    return answer[answer.index(b"\r\n\r\n") + 4 + int(header[1]) :]

"""Load over HTTP/1.1: requests are built once and sent as bytes, by one thread per connection.

Meant for large requests: this client spends a tenth of the time that a gRPC library spends on each,
and on a machine that client and server share, only the server should be measured.
"""

# Shape letters: B batch.

import itertools
import json
import queue
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tritonclient.utils import np_to_triton_dtype

from pipeline.repository import config_pbtxt

Measured = tuple[list[float], list[tuple[int, bytes]], int]  # latencies, answers by turn, failures

_CHUNK = 1 << 16  # bytes
_LARGEST = 1 << 26  # bytes of an answer
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_HEADER = re.compile(rb"\r\ninference-header-content-length: *(\d+)\r\n", re.IGNORECASE)
_OK = b"HTTP/1.1 200 "


def build_request(config: config_pbtxt.ModelConfig, images: np.ndarray) -> bytes:
    """Build a request for the first output of a batch (B, ...), with the array as binary data.

    Follows KServe's protocol, version 2, with Triton's extension for binary data.
    """
    array = np.ascontiguousarray(images)
    tensor = {
        "name": config.input[0].name,
        "shape": list(array.shape),
        "datatype": np_to_triton_dtype(array.dtype),
        "parameters": {"binary_data_size": array.nbytes},
    }
    output = {"name": config.output[0].name, "parameters": {"binary_data": True}}
    header = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
    head = (
        f"POST /v2/models/{config.name}/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n"
        f"Content-Length: {len(header) + array.nbytes}\r\n\r\n"
    )
    return head.encode() + header + array.tobytes()


def ask_all(
    address: str, requests: tuple[bytes, ...], concurrency: int, begin: float, end: float
) -> Measured:
    """Keep `concurrency` requests in progress until `end`; record latencies from `begin` on."""

    def caller(turn: int) -> Measured:
        latencies: list[float] = []
        answers: list[tuple[int, bytes]] = []
        failed = 0
        while (now := time.perf_counter()) < end:
            try:
                # Allow silence until 30 s after the window's end, for a server that stalls.
                patience = max(0.0, end - time.perf_counter()) + 30.0
                with _connect(address, patience) as connection:
                    while now < end:
                        connection.sendall(requests[turn % len(requests)])
                        answers.append((turn, _answer(connection)))
                        then, now = now, time.perf_counter()
                        turn += concurrency
                        if begin <= now < end:
                            latencies.append(now - then)
            except (OSError, ValueError):
                failed += 1
        return latencies, answers, failed

    with ThreadPoolExecutor(concurrency) as pool:
        latencies, answers, failed = zip(*pool.map(caller, range(concurrency)), strict=True)
    chain = itertools.chain.from_iterable
    return list(chain(latencies)), list(chain(answers)), sum(failed)


class Pool:
    """A pool of connections for an open loop; requests that find none free wait."""

    def __init__(self, address: str, size: int, silence: float) -> None:
        self._address, self._silence = address, silence
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
                connection = _connect(self._address, self._silence)
            connection.sendall(request)
            answer = _answer(connection)
        except (OSError, ValueError):
            if connection:
                connection.close()
            done(None)
            return
        done(answer)
        self._idle.put(connection)

    def close(self) -> None:
        """Wait for the requests in progress, and close the connections."""
        self._workers.shutdown()
        while not self._idle.empty():
            self._idle.get().close()


def _connect(address: str, silence: float) -> socket.socket:
    """Connect to host:port, with a timeout of `silence` seconds for each operation."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), silence)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _answer(connection: socket.socket) -> bytes:
    """Return the next answer, head and body; raise ValueError if it is not OK or incomplete."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += _more(connection, answer)
    length = _LENGTH.search(answer)
    if not answer.startswith(_OK) or not length:
        raise ValueError(f"the answer is not 200 OK with a Content-Length: {answer[:100]!r}")
    whole = answer.index(b"\r\n\r\n") + 4 + int(length[1])
    while len(answer) < whole:
        answer += _more(connection, answer)
    return answer


def _more(connection: socket.socket, answer: bytes) -> bytes:
    chunk = connection.recv(_CHUNK)
    if not chunk or len(answer) > _LARGEST:
        raise ValueError("the answer breaks off, or does not end")
    return chunk


def content_of(answer: bytes) -> bytes:
    """Return the bytes of an answer's output; raise ValueError if they cannot be found."""
    header = _HEADER.search(answer)
    if not header:
        raise ValueError("an answer without binary data")
    return answer[answer.index(b"\r\n\r\n") + 4 + int(header[1]) :]

"""A gateway on a free port, a client that stands in for Triton, and hostile pictures."""

import contextlib
import functools
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image, ImageDraw

from pipeline.client.client import Prediction
from pipeline.client.log import PredictionLog
from pipeline.core.errors import PipelineError
from pipeline.core.signature import IMAGES, MNIST_CLASSES, log_probabilities
from pipeline.repository import config_pbtxt
from pipeline.repository.settings import PackageConfig
from pipeline.web import server as webserver
from pipeline.web.gateway import Gateway
from pipeline.web.link import Link
from pipeline.web.settings import GatewayConfig

WAIT_SECONDS = 20.0


class Player:
    """A stand-in for AsyncClient, with answers and failures that a test sets."""

    version = "1"
    failure: PipelineError | None = None  # raised instead of an answer
    gate = threading.Event()  # an answer waits for it
    made: int = 0

    def __init__(self, url: str, name: str, timeout: float) -> None:
        type(self).made += 1

    async def config(self) -> config_pbtxt.ModelConfig:
        if self.failure:
            raise self.failure
        specs = IMAGES, log_probabilities(10)
        return config_pbtxt.base_config("handwriting", *specs, MNIST_CLASSES, PackageConfig())

    async def classify(self, images: list[np.ndarray], top: int) -> list[Prediction]:
        import asyncio

        assert [image.shape for image in images] == [(1, 28, 28)]
        while not self.gate.is_set():
            await asyncio.sleep(0.005)
        if self.failure:
            raise self.failure
        ranked = tuple((name, 0.91 if name == "7" else 0.01) for name in "7012345689")[:top]
        return [Prediction("7", 0.91, ranked, self.version, "0" * 64, True)]

    async def close(self) -> None:
        pass


@dataclass
class Reply:
    """Response of the gateway over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def record(self) -> dict[str, Any]:
        record = json.loads(self.body)
        assert isinstance(record, dict)
        return record


@dataclass
class Served:
    """A running gateway."""

    port: int
    gateway: Gateway
    server: uvicorn.Server

    def ask(
        self,
        method: str = "GET",
        path: str = "/",
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read())
        finally:
            connection.close()

    def classify(self, body: Any, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", "/classify", body, named)

    def raw(self, text: bytes) -> bytes:
        """Send these bytes; return what is received until the gateway closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), WAIT_SECONDS) as connection:
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while part := connection.recv(65536):
                received += part
            return received


def connected(port: int, client: str, begun: bytes = b"") -> socket.socket:
    """Open a non-blocking connection from the address `client`, and send the bytes `begun`."""
    connection = socket.socket()
    # The smallest buffer for unread bytes; closing resets the connection and leaves nothing behind.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.settimeout(WAIT_SECONDS)
    connection.bind((client, 0))
    connection.connect(("127.0.0.1", port))
    connection.setblocking(False)
    connection.send(begun)
    return connection


@contextlib.contextmanager
def served(link: Link, config: GatewayConfig, log: PredictionLog | None = None) -> Iterator[Served]:
    """Run the gateway in a thread, on a free port, until the end of the block."""
    gateway = Gateway(link, config, log)
    with webserver.bind_listener(config) as listener:
        server = uvicorn.Server(webserver.make_uvicorn_config(gateway))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until(lambda: server.started)
        yield Served(listener.getsockname()[1], gateway, server)
        server.should_exit = True
        thread.join(WAIT_SECONDS)


def until(condition: Any) -> None:
    """Wait until the condition is true; AssertionError after WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def player(monkeypatch: pytest.MonkeyPatch) -> type[Player]:
    """Make a Player class for one test, which every link then uses as AsyncClient."""

    class OneTest(Player):
        gate = threading.Event()

    OneTest.gate.set()
    monkeypatch.setattr("pipeline.web.link.AsyncClient", OneTest)
    return OneTest


def picture(kind: str = "PNG", size: tuple[int, int] = (200, 200), mode: str = "L") -> bytes:
    """Draw a seven; return the content of its file."""
    image = Image.new(mode, size, "white")
    points = [(0.25 * size[0], 0.2 * size[1]), (0.75 * size[0], 0.2 * size[1])]
    points.append((0.45 * size[0], 0.8 * size[1]))
    ImageDraw.Draw(image).line(points, fill="black", width=max(1, size[0] // 12), joint="curve")
    return encoded(image, kind)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image as the content of a file of format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Small files that are expensive to decode.


def chunk(name: bytes, data: bytes) -> bytes:
    """Make a chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *before: bytes, colour: int = 0, rows: int = 0) -> bytes:
    """Make a PNG whose header states this size, with `rows` rows of zeros as its data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    data = zlib.compress(bytes(rows * (1 + width * {0: 1, 2: 3, 6: 4}[colour])), 9)
    parts = [header, *before, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg(width: int, height: int) -> bytes:
    """Make a valid JPEG whose header is changed to state this size."""
    content = bytearray(encoded(Image.new("L", (16, 16)), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def webp(kind: bytes, width: int, height: int) -> bytes:
    """Make a WebP with only a first chunk, which states this size."""
    if kind == b"VP8X":
        data = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        data = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + bytes(5)
    else:
        data = b"\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height)
    body = b"WEBP" + kind + struct.pack("<I", len(data)) + data + bytes(64)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_scans(count: int) -> bytes:
    """Make a progressive JPEG whose last scan is repeated; decoding each visits every pixel."""
    content = encoded(picture_of(800, 800), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


def picture_of(width: int, height: int) -> Image.Image:
    """Make an image of this size that shows a seven."""
    return Image.open(io.BytesIO(picture("PNG", (width, height))))


@functools.cache
def bombs() -> dict[str, bytes]:
    """Make twelve small pictures that are expensive to decode, by their descriptions."""
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000), 9))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(60_000_000), 9))
    return {
        "a PNG with all the pixels that its header can name": png(2**31 - 1, 2**31 - 1),
        "a PNG of 900 million pixels": png(30_000, 30_000),
        "a PNG of nine million colours, all of them there": png(3000, 3000, colour=6, rows=3000),
        "a PNG that is one pixel high": png(2**31 - 1, 1),
        "a PNG with a second header": png(
            28, 28, chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
        ),
        "a PNG with texts of 90 MB": png(28, 28, *[text] * 100),
        "a PNG with a profile of 60 MB": png(28, 28, profile),
        "a JPEG of 4 billion pixels": jpeg(65_500, 65_500),
        "a JPEG of 2000 scans": many_scans(2000),
        "a WebP with a large canvas": webp(b"VP8X", 2**24, 2**24),
        "a lossless WebP of 268 million pixels": webp(b"VP8L", 16_383, 16_383),
        "a lossy WebP of 268 million pixels": webp(b"VP8 ", 16_383, 16_383),
    }


GET = b"GET /page.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
# What a client sends first to hold a connection, and what it sends repeatedly after that.
HOLDING = {
    "says nothing": (b"", b""),
    "never ends a head": (b"GET / HTTP/1.1\r\nX: ", b"x"),
    "never ends a body": (
        b"POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999\r\n\r\n",
        b"x",
    ),
    "never reads": (GET * 2000, GET),
}

# Requests from foreign pages or hosts: their headers, and the status that refuses them.
OURS = b"Host: 127.0.0.1\r\n"
ATTEMPTS = {
    "a rebound name": (b"Host: evil.example\r\n", 421),
    "a rebound name with our port": (b"Host: evil.example:8080\r\n", 421),
    "a name that begins as ours": (b"Host: localhost.evil.example\r\n", 421),
    "our name before an @": (b"Host: localhost@evil.example\r\n", 400),
    "another address": (b"Host: 192.168.0.7\r\n", 421),
    "no host at all": (b"", 400),
    "two hosts": (OURS + b"Host: evil.example\r\n", 400),
    "a page of another site": (OURS + b"Origin: https://evil.example\r\n", 403),
    "a page of another port": (OURS + b"Origin: http://127.0.0.1:3000\r\n", 403),
    "a frame without an origin": (OURS + b"Origin: null\r\n", 403),
    "a form of another site": (OURS + b"Sec-Fetch-Site: cross-site\r\n", 403),
    "a page of the same site": (OURS + b"Sec-Fetch-Site: same-site\r\n", 403),
    "a rebound page, sure of itself": (
        b"Host: evil.example\r\nOrigin: http://evil.example\r\nSec-Fetch-Site: same-origin\r\n",
        421,
    ),
}

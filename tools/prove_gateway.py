"""Attack the gateway with invalid requests, overload and foreign origins; check its answers.

prove_gateway.py RESULT REQUESTS PICTURES USERS SECONDS
"""

import asyncio
import contextlib
import http.client
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from PIL import Image

from pipeline.core.machine import machine
from pipeline.core.paths import Paths
from pipeline.data.splits import load_split
from pipeline.serving import serve, supervise
from pipeline.serving.settings import ServeConfig
from tools.gateways import ATTEMPTS, HOLDING, bombs, connected, encoded
from tools.prove_kill import project
from tools.provenance import write_figure
from tools.readme import render_pages

HANG_SECONDS = 60.0
CHECK_EVERY = 500  # hostile requests between two checks for a correct answer
BOMB_BYTES = 20 * 2**20
MAY_GROW = 200 * 2**20  # bytes, under many users: their concurrent requests, and decoding them
KINDS = ("PNG", "JPEG", "WEBP")
LOCKOUTS = {"unread": "never reads", "trickled": "never ends a body"}
ATTACKER = "127.0.0.2"  # other clients have 127.0.0.1
ATTACKS = 512  # connections that it tries to hold: all that the gateway has
OTHERS = 4
AGAIN_SECONDS = 0.2  # interval at which it sends more, and replaces closed connections


@dataclass
class Gateway:
    """A gateway in a separate process, and pictures with their expected labels."""

    pid: int
    port: int
    pictures: list[bytes]
    labels: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/classify"

    def memory(self, name: str = "VmRSS") -> int:
        """Return the bytes of memory that it holds; with VmHWM, the peak until now."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
        raise AssertionError("the gateway has gone")

    def send(self, content: bytes, client: str = "127.0.0.1") -> tuple[int, dict[str, Any]]:
        """Send a picture; return the status and the record of the response, {} without a body."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=HANG_SECONDS, source_address=(client, 0)
        )
        connection.request("POST", "/classify", content)
        answer = connection.getresponse()
        record = json.loads(answer.read() or "{}")
        connection.close()
        return answer.status, record

    def answers(self, client: str) -> bool:
        """Return whether a client with this address gets an answer."""
        try:
            return self.send(self.pictures[0], client)[0] == 200
        except (ConnectionError, http.client.HTTPException):
            return False

    def raw(self, text: bytes) -> int:
        """Send these bytes; return the status, or 0 if the connection is closed without one."""
        with socket.create_connection(("127.0.0.1", self.port), HANG_SECONDS) as connection:
            # Closed with a reset, so that this machine's ports are not used up.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(text)
                connection.shutdown(socket.SHUT_WR)
                line = connection.recv(4096).split(b"\r\n", 1)[0].split()
                return int(line[1]) if len(line) > 1 else 0
        return 0

    def check(self, number: int) -> None:
        """Check one answer against the expected label."""
        index = number % len(self.pictures)
        status, record = self.send(self.pictures[index])
        assert (status, record.get("label")) == (200, self.labels[index]), (status, record)


@contextlib.contextmanager
def running() -> Iterator[Gateway]:
    """Run the real command with a real server, with 60 test digits as pictures."""
    images = load_split("mnist", Paths().data("mnist"), "test").images[:60]
    pictures = [
        encoded(Image.fromarray(np.kron(image[0], np.ones((4, 4), np.uint8))), KINDS[number % 3])
        for number, image in enumerate(images)
    ]
    with project() as paths:
        supervise.detach(paths, serve.with_free_ports(ServeConfig()))
        command = [sys.executable, "-m", "pipeline", "--root", str(paths.root), "--json"]
        child = subprocess.Popen([*command, "web", "--port", "0"], stdout=subprocess.PIPE)
        try:
            assert child.stdout
            port = urlsplit(json.loads(child.stdout.readline())["url"]).port
            assert port
            gateway = Gateway(child.pid, port, pictures)
            gateway.labels = [gateway.send(content)[1]["label"] for content in pictures]
            yield gateway
            assert child.poll() is None, "the gateway has ended"
        finally:
            child.terminate()
            child.wait(HANG_SECONDS)
            supervise.stop(paths)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Mutate the bytes of a picture or a request at random places."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 1 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 2:
                del changed[place : place + rng.randint(1, 40)]
            case 3:
                changed[place:place] = rng.randbytes(rng.randint(1, 40))
            case 4:
                part = changed[place : place + rng.randint(1, 200)]
                changed[place:place] = part
            case 5:
                changed[place : place + 4] = struct.pack(">I", rng.choice((0, 1, 2**31, 2**32 - 1)))
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.1 else changed)


def request(content: bytes, rng: random.Random) -> bytes:
    """Make a request that is almost valid, or valid."""

    def usual(value: bytes, *others: bytes) -> bytes:
        return value if rng.random() < 0.85 else rng.choice(others)

    method = usual(b"POST", b"GET", b"PUT", b"OPTIONS", b"HEAD", b"\0")
    path = usual(b"/classify", b"/", b"/readyz", b"/metrics", b"/../x", b"*", b"//")
    protocol = usual(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2", b"HTTP/9.9", b"")
    host = usual(b"127.0.0.1", b"localhost:80", b"evil.example", b"[::", b"\xff", b"")
    size = len(content)
    length = usual(b"%d" % size, b"0", b"-1", b"%d" % 2**63, b"%d" % (size + 1), b"%d" % (size - 1))
    lines = [b" ".join((method, path, protocol)), b"Host: " + host, b"Content-Length: " + length]
    odd = [
        b"Host: 127.0.0.1",
        b"Content-Length: 5",
        b"Transfer-Encoding: " + rng.choice((b"chunked", b"gzip, chunked", b"identity")),
        b"Origin: " + rng.choice((b"null", b"http://127.0.0.1", b"http://", b"://\x80")),
        b"Sec-Fetch-Site: " + rng.choice((b"none", b"same-origin", b"cross-site", b"?")),
        b"Content-Type: " + rng.randbytes(6).hex().encode(),
        b"Expect: 100-continue",
        b"Connection: upgrade\r\nUpgrade: " + rng.choice((b"websocket", b"h2c")),
        b"X: " + b"y" * rng.choice((1, 5000, 70_000)),
    ]
    lines += rng.sample(odd, rng.choice((0, 0, 1, 1, 2, 5)))
    text = b"\r\n".join(lines) + b"\r\n\r\n" + content
    return text if rng.random() < 0.7 else mutated(text, rng)


def fuzz(gateway: Gateway, requests: int) -> Counter[int]:
    """Send almost valid requests; return the count of each status."""
    statuses: Counter[int] = Counter()
    rng = random.Random(0)
    for number in range(requests):
        status = gateway.raw(request(rng.choice(gateway.pictures), rng))
        assert status < 500 or status == 503, status
        statuses[status] += 1
        if number % CHECK_EVERY == CHECK_EVERY - 1:
            gateway.check(number // CHECK_EVERY)
    return statuses


def mutate(gateway: Gateway, pictures: int) -> Counter[int]:
    """Send mutated pictures; return the count of each status."""
    statuses: Counter[int] = Counter()
    rng = random.Random(1)
    for number in range(pictures):
        content = mutated(rng.choice(gateway.pictures), rng)
        status, record = gateway.send(content)
        assert status in (200, 400, 413, 415, 422, 503), (status, record)
        statuses[status] += 1
        if number % CHECK_EVERY == CHECK_EVERY - 1:
            gateway.check(number // CHECK_EVERY)
    return statuses


def blow(gateway: Gateway) -> int:
    """Send twelve decompression bombs, all refused; return the growth in bytes of peak memory."""
    Path(f"/proc/{gateway.pid}/clear_refs").write_text("5")  # resets the peak to the current memory
    before = gateway.memory("VmHWM")
    for name, content in bombs().items():
        status, record = gateway.send(content)
        assert status in (400, 413), (name, record)
        gateway.check(len(name))
    return gateway.memory("VmHWM") - before


def trespass(gateway: Gateway) -> int:
    """Check that every attempt from a foreign page or host is refused; return their number."""
    content = gateway.pictures[0]
    length = f"Content-Length: {len(content)}\r\n\r\n".encode()
    for attempt, (headers, status) in ATTEMPTS.items():
        answer = gateway.raw(b"POST /classify HTTP/1.1\r\n" + headers + length + content)
        assert answer == status, (attempt, answer)
    return len(ATTEMPTS)


async def crowd(gateway: Gateway, users: int, seconds: float) -> dict[str, Any]:
    """Send requests of many concurrent users; count correct, wrong and refused answers.

    Users do not wait between requests, except after a refusal.
    """
    counts: Counter[str] = Counter()
    before, most = gateway.memory(), 0
    end = time.monotonic() + seconds

    async def user(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal most
        rng = random.Random(number)
        while time.monotonic() < end:
            index = rng.randrange(len(gateway.pictures))
            async with session.post(gateway.url, data=gateway.pictures[index]) as answer:
                record = await answer.json()
                if answer.status == 503:
                    assert int(answer.headers["retry-after"]) >= 1
                    counts["refused"] += 1
                    await asyncio.sleep(rng.random() * 0.1)
                    continue
                assert answer.status == 200, record
                is_right = record["label"] == gateway.labels[index]
                counts["right" if is_right else "wrong"] += 1
            if number == 0:
                most = max(most, gateway.memory())

    timeout = aiohttp.ClientTimeout(total=HANG_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(users):
            tasks.create_task(user(session, number))
    grown = max(most, gateway.memory()) - before
    return {"users": users, "seconds": seconds, **counts, "grown_bytes": grown}


@contextlib.contextmanager
def attacked(gateway: Gateway, how: str) -> Iterator[threading.Event]:
    """Run a client that holds all connections it gets; after the event, it replaces lost ones."""
    begun, more = HOLDING[how]
    connections: list[socket.socket] = []
    again, ended = threading.Event(), threading.Event()

    def connect() -> None:
        while len(connections) < ATTACKS and not ended.is_set():
            with contextlib.suppress(OSError):
                connections.append(connected(gateway.port, ATTACKER, begun))

    def attack() -> None:
        while not ended.wait(AGAIN_SECONDS):
            for connection in list(connections):
                try:
                    connection.send(more)
                except BlockingIOError:
                    pass
                except OSError:
                    connection.close()
                    connections.remove(connection)
            if again.is_set():
                connect()

    with ThreadPoolExecutor(1) as pool:
        connect()
        attacking = pool.submit(attack)
        try:
            yield again
        finally:
            ended.set()
            attacking.result()
            for connection in connections:
                connection.close()


def lock_out(gateway: Gateway, how: str, seconds: float) -> dict[str, Any]:
    """Measure a lock-out: seconds until the attacker gets an answer again, and others' answers.

    The attacker holds all connections that it can. The other clients send requests while it
    replaces its lost connections.
    """
    counts: Counter[str] = Counter()
    waits = []

    def other(end: float, number: int) -> None:
        while (start := time.monotonic()) < end:
            number = (number + 1) % len(gateway.pictures)
            status, record = gateway.send(gateway.pictures[number])
            waits.append(time.monotonic() - start)
            is_right = record.get("label") == gateway.labels[number]
            counts["refused" if status != 200 else "right" if is_right else "wrong"] += 1

    with attacked(gateway, how) as again, ThreadPoolExecutor(OTHERS) as pool:
        start = time.monotonic()
        assert not gateway.answers(ATTACKER), how
        while not gateway.answers(ATTACKER):
            assert time.monotonic() - start < HANG_SECONDS, how
            time.sleep(AGAIN_SECONDS)
        free = time.monotonic() - start
        again.set()
        end = time.monotonic() + seconds
        for task in [pool.submit(other, end, number) for number in range(OTHERS)]:
            task.result()
    return {
        "connections": ATTACKS,
        "seconds": seconds,
        "others": OTHERS,
        **counts,
        "longest_seconds": round(max(waits), 2),
        "free_seconds": round(free, 1),
    }


def prove(requests: int, pictures: int, users: int, seconds: float) -> dict[str, Any]:
    """Run all checks; return the record, or raise AssertionError if a check fails."""
    with running() as gateway:
        bomb_bytes = blow(gateway)
        attempts = trespass(gateway)
        crowded = asyncio.run(crowd(gateway, users, seconds))
        lockouts = {name: lock_out(gateway, how, seconds) for name, how in LOCKOUTS.items()}
        before = gateway.memory()
        fuzzed = fuzz(gateway, requests)
        damaged = mutate(gateway, pictures)
        grown = gateway.memory() - before
        gateway.check(0)
    assert bomb_bytes < BOMB_BYTES, bomb_bytes
    assert crowded.get("wrong", 0) == 0, crowded
    assert min(crowded.get(kind, 0) for kind in ("right", "refused")) > 0, crowded
    for lockout in lockouts.values():
        assert lockout.get("right", 0) > 0 == lockout.get("wrong", 0), lockout
        assert lockout.get("refused", 0) == 0, lockout
    assert max(crowded["grown_bytes"], grown) < MAY_GROW, (crowded, grown)
    return {
        "command": "make prove-gateway",
        "requests": requests,
        "statuses": {str(status): count for status, count in sorted(fuzzed.items())},
        "pictures": pictures,
        "picture_statuses": {str(status): count for status, count in sorted(damaged.items())},
        "grown_bytes": grown,
        "bombs": len(bombs()),
        "bomb_bytes": bomb_bytes,
        "attempts": attempts,
        "crowd": crowded,
        "lockouts": lockouts,
    }


def main(result: Path, *counts: int) -> None:
    """Run the checks and write the record."""
    requests, pictures, users, seconds = counts
    record = prove(requests, pictures, users, seconds)
    record |= machine()
    print(json.dumps(record, indent=1))
    write_figure("gateway", result, record)
    render_pages()
    print(f"wrote {result}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

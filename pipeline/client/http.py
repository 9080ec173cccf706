"""HTTP to one server with a deadline that includes name lookup, handshake and slow answers.

Python's own client restarts its timeout with each packet, and waits for a name's address without
limit.
"""

import contextlib
import http.client
import io
import ipaddress
import select
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from typing import Any

from pipeline.client.endpoint import Endpoint
from pipeline.client.faults import Fault, of_connection
from pipeline.client.wire import MAX_ANSWER_BYTES, HttpAnswer, HttpRequest

Address = tuple[Any, ...]


class _Timed:
    """The part of a socket that http.client uses; every wait ends at one deadline."""

    def __init__(self, connected: socket.socket, end: float) -> None:
        self.socket, self.end = connected, end

    def arm(self) -> socket.socket:
        """Return the socket with its timeout set to the time that is left."""
        self.socket.settimeout(_left(self.end))
        return self.socket

    def sendall(self, content: bytes) -> None:
        self.arm().sendall(content)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        self.socket.close()


class _Reader(io.RawIOBase):
    def __init__(self, timed: _Timed) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._timed.arm().recv_into(buffer)


class HttpConnection:
    """One connection, for one thread at a time."""

    def __init__(self, target: Endpoint, context: ssl.SSLContext | None) -> None:
        self._endpoint, self._context = target, context
        self._library = http.client.HTTPConnection(target.host, target.port)
        self._timed: _Timed | None = None

    def exchange(self, request: HttpRequest, seconds: float) -> HttpAnswer | Fault:
        """Send a request; return the answer, or a Fault, after which the connection is closed."""
        end = time.monotonic() + seconds
        try:
            if self._timed is None:
                self._timed = _Timed(_connected(self._endpoint, self._context, end), end)
                self._library.sock = self._timed
            self._timed.end = end
            self._library.request(request.verb, request.path, request.body or None, request.headers)
            response = self._library.getresponse()
            body = response.read(MAX_ANSWER_BYTES + 1)
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
            if response.length:  # bytes that were announced and not sent
                raise http.client.IncompleteRead(body, response.length)
            headers = {name.lower(): value for name, value in response.getheaders()}
            if response.will_close:
                self.close()
            return HttpAnswer(response.status, headers, body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            fault = of_connection(error, is_connected=self._timed is not None)
        except BaseException:  # Ctrl-C: half an answer may be left on this connection
            self.close()
            raise
        self.close()
        return fault

    def is_stale(self) -> bool:
        """Return whether the server has closed the connection or sent unexpected data."""
        if self._timed is None:
            return False
        try:
            return bool(select.select([self._timed.socket], [], [], 0)[0])
        except (OSError, ValueError):  # more open files than select() supports
            return True

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._library.close()
        if self._timed:
            self._timed.close()
        self._timed = None

    def __del__(self) -> None:
        self.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time left")
    return left


def _connected(target: Endpoint, context: ssl.SSLContext | None, end: float) -> socket.socket:
    """Connect to the first of the host's addresses that accepts, with TLS if `context` is given."""
    refused: OSError = OSError("the host's name has no address")
    for family, address in _addresses(target, end):
        candidate = socket.socket(family, socket.SOCK_STREAM)
        try:
            candidate.settimeout(_left(end))
            candidate.connect(address)
            candidate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            candidate.settimeout(_left(end))
        except OSError as error:
            candidate.close()
            refused = error
            continue
        except BaseException:
            candidate.close()
            raise
        try:
            return (
                context.wrap_socket(candidate, server_hostname=target.host)
                if context
                else candidate
            )
        except BaseException:
            candidate.close()
            raise
    raise refused


def _addresses(target: Endpoint, end: float) -> list[tuple[int, Address]]:
    """Return the host's addresses; look a name up in a thread, as a lookup has no timeout."""
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(target.host).version
        return [(socket.AF_INET if version == 4 else socket.AF_INET6, (target.host, target.port))]
    answer: Future[list[tuple[Any, ...]]] = Future()

    def look_up() -> None:
        try:
            answer.set_result(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        return [(family, address) for family, _, _, _, address in answer.result(_left(end))]
    except TimeoutError as error:
        raise TimeoutError(f"no address of {target.host} in time") from error

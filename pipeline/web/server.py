"""The gateway's server: a fair share of connections for each client, a deadline for each wait."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.client.log import PredictionLog
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.repository import config_pbtxt
from pipeline.web.gateway import Gateway
from pipeline.web.limits import client_of, is_fair
from pipeline.web.link import Link, find_url
from pipeline.web.settings import GatewayConfig

IDLE_SECONDS = 15  # after which a connection without requests is closed
HEADER_BYTES = 32 * 1024  # of one request
END_SECONDS = 5  # for answers under way to end when the server stops
BACKLOG = 64  # connections that asyncio accepts before we can refuse any of them
QUEUE = 1024  # connections that the system keeps until we accept; further clients retry after 1 s
MAX_CONNECTIONS = 512  # open together: below the 1024 files that a process may usually open
MAX_REFUSED = 128  # further connections that may read why they are refused; others are just closed
REQUEST_SECONDS = 15.0  # from a request's first byte, or from connecting, to its last header
ANSWER_SECONDS = 10.0  # for a client to read an answer that the system cannot buffer
REFUSED_SECONDS = 1.0  # for a refused client to read why
READ_BYTES = 16 * 1024  # at a time: parsing them must not keep the other clients waiting
SEND_BYTES = 64 * 1024  # that the system buffers; without a limit, up to 4 MiB per client
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)


def serve_page(
    paths: Paths,
    config: GatewayConfig,
    url: str | None,
    started: Callable[[str, str], None],
    log: PredictionLog | None = None,
) -> None:
    """Serve the page and its gateway until Ctrl-C (KeyboardInterrupt) or SIGTERM.

    `started` is called with the page's address once it is served, and with the reason why the model
    does not answer yet (empty if it does). Raises PipelineError if the port
    is taken, if the address is not one of this machine's, or if the model takes only arrays.
    """
    link = Link(lambda: url or find_url(paths), paths.name, config.timeout)
    packaged = paths.packaged / config_pbtxt.CONFIG
    with bind_listener(config) as listener:
        server = uvicorn.Server(make_uvicorn_config(Gateway(link, config, log)))

        async def serve() -> None:
            model = None if url or not packaged.exists() else config_pbtxt.read(packaged)
            problem = ""
            try:
                model = await link.config()
            except PipelineError as error:  # a server that is not there yet
                problem = str(error)
            if model:
                config_pbtxt.require_pictures(model)
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not (server.started or task.done()):
                await asyncio.sleep(0.01)
            if server.started:
                # Asyncio sets its own backlog, and accepts as many at a time.
                listener.listen(QUEUE)
                started(page_url(config, listener), problem)
            await task

        asyncio.run(serve())


def make_uvicorn_config(gateway: Gateway) -> uvicorn.Config:
    """Return uvicorn's configuration for a gateway."""
    return uvicorn.Config(
        gateway.app(),
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # no line for each invalid request
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )


@contextlib.contextmanager
def bind_listener(config: GatewayConfig) -> Iterator[socket.socket]:
    """Yield a socket bound to the config's host and port; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            where = f"{config.host} port {config.port} ({error.strerror})"
            fix = "choose another port, or a free one with --port auto"
            raise PipelineError(f"cannot listen on {where}: {fix}") from error
        yield listener


def page_url(config: GatewayConfig, listener: socket.socket) -> str:
    """Return the page's URL for a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """Uvicorn's connection with deadlines: its own waits forever for requests and for readers."""

    _patience: asyncio.TimerHandle | None = None  # deadline of a request, or of a refused client
    _unread: asyncio.TimerHandle | None = None  # deadline of the client to read its answer
    _is_refused = False
    _owner = ""  # as client_of names it

    def connection_made(self, transport: Any) -> None:
        """Accept the connection, or answer 503 if its client has its share already."""
        super().connection_made(transport)
        self._buffer = bytearray(READ_BYTES)
        self._owner = client_of(self.client[0] if self.client else "::")
        owners = [other._owner for other in self._list_others() if not other._is_refused]
        if is_fair(1, owners.count(self._owner), len(owners), MAX_CONNECTIONS):
            self.flow = _Flow(self)
            transport.set_write_buffer_limits(0)  # any unread byte calls pause_writing
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            self._watch()
        else:
            transport.write(_FULL)
            self._refuse()

    def get_buffer(self, sizehint: int) -> bytearray:
        """Return the buffer for the next bytes."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process the `nbytes` bytes that have arrived."""
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Process the data; a request that arrives byte by byte gets no more time for each byte."""
        if not self._is_refused:
            super().data_received(data)
            self._watch()

    def pause_writing(self) -> None:
        """Start the deadline for the client to read its answer."""
        super().pause_writing()
        self._unread = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the deadline: the client has read its answer."""
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer 400 to data that is not HTTP, and drop a request that had begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        headers = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun, or has no body
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=msg.encode()), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._refuse()

    def shutdown(self) -> None:
        """Close after the answer under way; abort if refused. Uvicorn calls this at its end."""
        if self._is_refused:
            self.transport.abort()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadlines of the closed connection."""
        self._stop_watching()
        self.resume_writing()
        super().connection_lost(exc)

    def _refuse(self) -> None:
        """Close after the client had time to read why; an immediate close could lose the answer."""
        self._stop_watching()
        self._is_refused = True
        with contextlib.suppress(OSError):  # the client has closed it already
            self.transport.write_eof()
        too_many = sum(other._is_refused for other in self._list_others()) >= MAX_REFUSED
        seconds = 0 if too_many else REFUSED_SECONDS
        self._patience = self.loop.call_later(seconds, self.transport.abort)

    def _list_others(self) -> list["Connection"]:
        return [c for c in self.connections if isinstance(c, Connection) and c is not self]

    def _watch(self) -> None:
        """Start the deadline of an incomplete request; cancel it once the request is complete."""
        if self._is_refused:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._patience is None:
            self._patience = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class _Flow(FlowControl):
    """Flow control that stops reading while a complete request waits for its answer.

    Uvicorn's own continues to read each time the application asks for a body, so that a client that
    pipelines POST requests makes it buffer everything that the client sends.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection.transport)
        self._connection = connection

    def resume_reading(self) -> None:
        """Continue to read, unless a complete request waits for its answer."""
        cycle = self._connection.cycle
        if cycle is None or cycle.more_body or cycle.response_complete:
            super().resume_reading()

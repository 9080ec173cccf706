"""The gateway on a socket, until Ctrl-C."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn

from pipeline.config import GatewayConfig
from pipeline.connections import BACKLOG, QUEUE, Connection
from pipeline.errors import PipelineError
from pipeline.gateway import Gateway
from pipeline.link import Link, finder
from pipeline.paths import Paths
from pipeline.prediction_log import PredictionLog

IDLE_SECONDS = 15  # after which a connection that asks nothing is closed
HEADER_BYTES = 32 * 1024  # of one request
END_SECONDS = 5  # in which answers under way may end


def serve_page(
    paths: Paths,
    config: GatewayConfig,
    url: str | None,
    started: Callable[[str], None],
    log: PredictionLog | None = None,
) -> None:
    """Serve the page and its gateway until Ctrl-C (KeyboardInterrupt) or SIGTERM.

    `started` is told the page's address once it is served. Raises PipelineError for a port that
    is taken or an address that is none of ours.
    """
    gateway = Gateway(Link(finder(paths, url), paths.name, config.timeout), config, log)
    with listening(config) as listener:
        server = uvicorn.Server(settings(gateway))
        asyncio.run(_serve(server, listener, lambda: started(address(config, listener))))


def settings(gateway: Gateway) -> uvicorn.Config:
    """How uvicorn serves a gateway."""
    return uvicorn.Config(
        gateway.app(),
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # not a line for each request that is none
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=END_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )


@contextlib.contextmanager
def listening(config: GatewayConfig) -> Iterator[socket.socket]:
    """A socket that listens where the config says; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise PipelineError(
                f"cannot listen on {config.host} port {config.port} ({error.strerror}): stop what "
                "listens there, or choose another port with --port, 0 for a free one"
            ) from error
        yield listener


def address(config: GatewayConfig, listener: socket.socket) -> str:
    """Where a browser on this machine finds the page."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


async def _serve(
    server: uvicorn.Server, listener: socket.socket, started: Callable[[], None]
) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if server.started:
        listener.listen(QUEUE)  # asyncio sets its own backlog, and accepts as many at a time
        started()
    await serving

"""The gateway behind the page: a picture in over HTTP, Triton's answer out."""

import asyncio
import base64
import contextlib
import math
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.client.log import PredictionLog
from pipeline.core.errors import PipelineError, ServerError
from pipeline.images.read import LARGE, BlankError, prepare_picture
from pipeline.repository import config_pbtxt
from pipeline.web.guard import Counters, Guard, host_names, stated_length
from pipeline.web.limits import MAX_BYTES, FullError, RefusedError, Room, check_picture, client_of
from pipeline.web.link import Link
from pipeline.web.settings import GatewayConfig

PAGE = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
RETRY_SECONDS = 1
READY_SECONDS = 1.0  # for so long an answer to /readyz holds: probes must not be a load


@dataclass
class Ticket:
    """The bytes of one request, then its place; held until nothing works for it any more."""

    room: Room
    client: str
    held: int = 0  # bytes
    has_place: bool = False
    job: "Future[np.ndarray] | None" = None  # a thread that has begun cannot be stopped

    def hold(self, count: int) -> None:
        """Hold `count` more bytes, or raise FullError."""
        self.room.hold(self.client, count)
        self.held += count

    def enter(self) -> None:
        """Take a place, or raise FullError."""
        self.room.enter(self.client)
        self.has_place = True

    def give_back(self) -> None:
        """Give all of it back once the thread that works for it has ended, if there is one."""
        if self.job is None:
            self._leave()
        else:
            loop = asyncio.get_running_loop()
            self.job.add_done_callback(lambda job: loop.call_soon_threadsafe(self._leave))

    def _leave(self) -> None:
        self.room.release(self.client, self.held)
        if self.has_place:
            self.room.leave(self.client)


class Gateway:
    """Answers requests of one page about one model."""

    def __init__(
        self,
        link: Link,
        config: GatewayConfig = GatewayConfig(),
        log: PredictionLog | None = None,
    ) -> None:
        self.link, self.config, self.log = link, config, log
        self.room = Room(config.requests)
        self.counters = Counters(self.room, lambda: log.lost if log else 0)
        self._pool = ThreadPoolExecutor(config.decoders, "decode")
        self._ready = _Ready(link)

    def app(self) -> Guard:
        """The ASGI application."""
        routes = [
            Route("/classify", self.classify, methods=["POST"]),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
            *(_static(file) for file in sorted(PAGE.iterdir()) if file.suffix in TYPES),
        ]
        handlers: Any = {
            PipelineError: _explained,
            HTTPException: _unknown,
            ClientDisconnect: _gone,
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        names = host_names(self.config.host, self.config.allow_hosts)
        return Guard(app, names, self.counters, {route.path for route in routes})

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self.link.close()
        self._pool.shutdown(cancel_futures=True)

    async def healthz(self, request: Request) -> Response:
        """That this process answers, whatever Triton does."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """Whether Triton is there and the model answers; and which model that is."""
        record = await self._ready.record()
        status = 200 if record["ready"] else 503
        return JSONResponse(
            record, status, {"retry-after": str(RETRY_SECONDS)} if status > 200 else {}
        )

    async def metrics(self, request: Request) -> Response:
        """What was counted, for Prometheus."""
        return Response(self.counters.text(), media_type=self.counters.media_type)

    async def classify(self, request: Request) -> Response:
        """What the model says of the picture in the body."""
        start = time.monotonic()
        _check_length(request)
        ticket = Ticket(self.room, client_of(request.client.host if request.client else "::"))
        try:
            async with asyncio.timeout(self.config.timeout):
                content = await _body(request, ticket)
                ticket.enter()  # only now: a slow body must not hold a place
                record = await self._answer(content, ticket)
        except TimeoutError as error:
            raise FullError(f"no answer in {self.config.timeout:g} s: ask again") from error
        finally:
            ticket.give_back()
        milliseconds = (time.monotonic() - start) * 1000
        record["server_ms"] = round(milliseconds, 2)
        timing = f"total;dur={milliseconds:.2f}, model;dur={record['model_ms']}"
        return JSONResponse(record, headers={"server-timing": timing})

    async def _answer(self, content: bytes, ticket: Ticket) -> dict[str, Any]:
        config = await self.link.config()
        pictures = config_pbtxt.pictures(config)
        if pictures == "arrays":
            raise ServerError(f"{self.link.name} takes arrays only: serve a model of pictures")
        ticket.job = self._pool.submit(_read, content, pictures)
        image = await asyncio.wrap_future(ticket.job)
        classes = config_pbtxt.classes(config)
        asked = time.monotonic()
        prediction = await self.link.ask(image, len(classes))
        milliseconds = (time.monotonic() - asked) * 1000
        if log := self.log:
            await asyncio.to_thread(log.add, self.link.name, image[np.newaxis], [prediction])
        return {
            **prediction.record(),
            "model": self.link.name,
            "classes": classes,
            "seen": base64.b64encode(image.tobytes()).decode(),  # 28 rows of 28, 255 is ink
            "model_ms": round(milliseconds, 2),
        }


class _Ready:
    """Whether the model answers, asked at most once at a time and once a second."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._asking = asyncio.Lock()
        self._asked, self._record = -math.inf, dict[str, Any]()

    async def record(self) -> dict[str, Any]:
        async with self._asking:
            if time.monotonic() - self._asked >= READY_SECONDS:
                self._record = await self._ask()
                self._asked = time.monotonic()
            return self._record

    async def _ask(self) -> dict[str, Any]:
        try:
            config = await self._link.config()
            blank = np.zeros(tuple(config.input[0].dims), config_pbtxt.dtype(config.input[0]))
            answer = await self._link.ask(blank, 1)
        except PipelineError as error:
            return {"ready": False, "model": self._link.name, "error": str(error)}
        return {
            "ready": True,
            "model": self._link.name,
            "version": answer.version,
            "sha256": answer.sha256,
            "classes": config_pbtxt.classes(config),
        }


def _read(content: bytes, pictures: str) -> np.ndarray:
    """The picture as the model takes it; RefusedError where it cannot be read or shows nothing."""
    check_picture(content)
    try:
        return prepare_picture(content, "the picture", pictures)
    except PipelineError as error:
        status = 422 if isinstance(error, BlankError) else 400
        raise RefusedError(status, str(error)) from error


def _check_length(request: Request) -> None:
    """Refuse by its own word what is too long, before a byte of it is read."""
    if stated_length(request.headers) > MAX_BYTES:
        raise _too_long()


def _too_long() -> RefusedError:
    return RefusedError(413, LARGE.format(name="the picture", allowed=MAX_BYTES))


async def _body(request: Request, ticket: Ticket) -> bytes:
    """The body, refused as soon as it has become too long."""
    content = bytearray()
    async for chunk in request.stream():
        if len(content) + len(chunk) > MAX_BYTES:
            raise _too_long()
        ticket.hold(len(chunk))
        content += chunk
    return bytes(content)


def _static(file: Path) -> Route:
    """A file of the page, held in memory."""
    content, media_type = file.read_bytes(), TYPES[file.suffix]

    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return Route("/" if file.name == "index.html" else f"/{file.name}", answer)


async def _explained(request: Request, error: PipelineError) -> Response:
    status = error.status if isinstance(error, RefusedError) else 503
    headers = {"retry-after": str(RETRY_SECONDS)} if status == 503 else {}
    return JSONResponse({"error": str(error)}, status, headers)


async def _unknown(request: Request, error: HTTPException) -> Response:
    """For a path or a method that there is not."""
    record = {"error": f"{error.detail}: GET / for the page, POST a picture to /classify"}
    return JSONResponse(record, error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    """For the counters only: nobody reads it any more."""
    return Response(status_code=499)

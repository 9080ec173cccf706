"""The gateway behind the page: it receives a picture over HTTP and returns Triton's answer."""

import asyncio
import base64
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.client.log import PredictionLog
from pipeline.core.errors import PipelineError
from pipeline.core.paths import list_names
from pipeline.images.read import LARGE, BlankError, Prepared, prepare_picture, to_picture
from pipeline.repository import config_pbtxt
from pipeline.web.collect import store_picture
from pipeline.web.guard import Guard, RequestCounters, host_names, stated_length
from pipeline.web.limits import MAX_BYTES, FullError, RefusedError, Room, check_picture, client_of
from pipeline.web.link import Link
from pipeline.web.settings import GatewayConfig

PAGE = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
RETRY = {"retry-after": "1"}  # s
READY_SECONDS = 1.0  # how long an answer to /readyz is reused, so that probes are not a load


@dataclass
class Ticket:
    """What one request holds of the room, its bytes and then a place, until all its work ends."""

    room: Room
    client: str
    held: int = 0  # bytes
    has_place: bool = False
    job: "Future[Any] | None" = None  # a thread that has begun cannot be stopped

    async def read_body(self, request: Request) -> bytes:
        """Return the body; raise RefusedError as soon as it is too long or there is no room."""
        too_long = LARGE.format(name="the picture", allowed=MAX_BYTES)
        if stated_length(request.headers) > MAX_BYTES:  # before a byte of it is read
            raise RefusedError(413, too_long)
        content = bytearray()
        async for chunk in request.stream():
            if len(content) + len(chunk) > MAX_BYTES:
                raise RefusedError(413, too_long)
            self.room.hold(self.client, len(chunk))
            self.held += len(chunk)
            content += chunk
        return bytes(content)

    def leave(self) -> None:
        """Release everything once the thread that works for the request, if any, has ended."""
        if self.job and not self.job.done():
            loop = asyncio.get_running_loop()
            self.job.add_done_callback(lambda job: loop.call_soon_threadsafe(self.leave))
            return
        self.room.release(self.client, self.held)
        if self.has_place:
            self.room.leave(self.client)


class Gateway:
    """The request handlers of one page about one model."""

    def __init__(
        self, link: Link, config: GatewayConfig = GatewayConfig(), log: PredictionLog | None = None
    ) -> None:
        self.link, self.config, self.log = link, config, log
        self.room = Room(config.requests)
        self.counters = RequestCounters(self.room, lambda: log.lost if log else 0)
        self._pool = ThreadPoolExecutor(config.decoders, "decode")
        self._probing = asyncio.Lock()
        self._probed, self._readiness = -math.inf, dict[str, Any]()

    def app(self) -> Guard:
        """Return the ASGI application."""
        routes = [
            Route("/classify", self.classify, methods=["POST"]),
            # Shows that this process answers, independent of Triton.
            Route("/healthz", JSONResponse({"status": "ok"}), methods=["GET"]),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
        ]
        if self.config.collect:
            routes.append(Route("/collect", self.collect, methods=["POST"]))
        for file in sorted(PAGE.iterdir()):  # kept in memory
            if file.suffix in TYPES:
                path = "/" if file.name == "index.html" else f"/{file.name}"
                page = Response(file.read_bytes(), media_type=TYPES[file.suffix])
                routes.append(Route(path, page, methods=["GET"]))
        errors: Any = (PipelineError, HTTPException, ClientDisconnect)
        handlers = dict.fromkeys(errors, _answer_error)
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        names = host_names(self.config.host, self.config.allow_hosts)
        return Guard(app, names, self.counters, {route.path for route in routes})

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self.link.close()
        self._pool.shutdown(cancel_futures=True)

    async def readyz(self, request: Request) -> Response:
        """Answer whether Triton and the model are ready (503 if not), and which model it is."""
        async with self._probing:  # at most one probe at a time, and one a second
            if time.monotonic() - self._probed >= READY_SECONDS:
                self._readiness = await self._probe()
                self._probed = time.monotonic()
            record = self._readiness
        return JSONResponse(record) if record["ready"] else JSONResponse(record, 503, RETRY)

    async def _probe(self) -> dict[str, Any]:
        model = self.link.name
        try:
            config = await self.link.config()
            blank = np.zeros(tuple(config.input[0].dims), config_pbtxt.dtype(config.input[0]))
            answer = await self.link.ask(blank, 1)
        except PipelineError as error:
            return {"ready": False, "model": model, "error": str(error)}
        record = {"ready": True, "model": model, "version": answer.version, "sha256": answer.sha256}
        record |= {"classes": config_pbtxt.classes(config), "collects": bool(self.config.collect)}
        return record

    async def metrics(self, request: Request) -> Response:
        """Answer with the metrics for Prometheus."""
        return Response(self.counters.text(), media_type=self.counters.media_type)

    async def classify(self, request: Request) -> Response:
        """Answer with the model's prediction for the picture in the body."""
        start = time.monotonic()
        record = await self._work(request, self._answer)
        milliseconds = (time.monotonic() - start) * 1000
        record["server_ms"] = round(milliseconds, 2)
        timing = f"total;dur={milliseconds:.2f}, model;dur={record['model_ms']}"
        return JSONResponse(record, headers={"server-timing": timing})

    async def collect(self, request: Request) -> Response:
        """Store the picture in the body as one of the class that the query's `label` names."""
        label = request.query_params.get("label", "")

        async def store(content: bytes, ticket: Ticket) -> dict[str, Any]:
            config = await self.link.config()
            classes = config_pbtxt.classes(config)
            if label not in classes:
                raise RefusedError(400, f"{label!r} is not a class: {list_names(label, classes)}")
            # It refuses what an import would.
            ticket.job = self._pool.submit(_read, content, config_pbtxt.require_pictures(config))
            await asyncio.wrap_future(ticket.job)
            folder = Path(self.config.collect)
            job = ticket.job = self._pool.submit(store_picture, folder, label, content)
            return await asyncio.wrap_future(job)

        return JSONResponse(await self._work(request, store))

    async def _work(
        self, request: Request, work: Callable[[bytes, Ticket], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """Return what `work` makes of the body, within the limits of time, bytes and places."""
        ticket = Ticket(self.room, client_of(request.client.host if request.client else "::"))
        try:
            async with asyncio.timeout(self.config.timeout):
                content = await ticket.read_body(request)
                self.room.enter(ticket.client)  # only now: a slow body must not hold a place
                ticket.has_place = True
                return await work(content, ticket)
        except TimeoutError as error:
            raise FullError(f"no answer in {self.config.timeout:g} s: try again") from error
        finally:
            ticket.leave()

    async def _answer(self, content: bytes, ticket: Ticket) -> dict[str, Any]:
        config = await self.link.config()
        job = ticket.job = self._pool.submit(_read, content, config_pbtxt.require_pictures(config))
        prepared = await asyncio.wrap_future(job)
        classes = config_pbtxt.classes(config)
        start = time.monotonic()
        prediction = await self.link.ask(prepared.image, len(classes))
        milliseconds = (time.monotonic() - start) * 1000
        if log := self.log:
            await asyncio.to_thread(
                log.add, self.link.name, prepared.image[np.newaxis], [prediction]
            )
        seen = to_picture(prepared.image)
        assert seen is not None  # every rule makes a picture
        return {
            **replace(prediction, parts=prepared.parts).record(),
            "model": self.link.name,
            "classes": classes,
            "seen": base64.b64encode(seen.tobytes()).decode(),  # row by row, 255 is ink
            "seen_shape": seen.shape,  # (C, H, W)
            "model_ms": round(milliseconds, 2),
        }


def _read(content: bytes, pictures: str) -> Prepared:
    """Convert a picture to the model's input; raise RefusedError if it is unreadable or blank."""
    check_picture(content)
    try:
        return prepare_picture(content, "the picture", pictures)
    except PipelineError as error:
        status = 422 if isinstance(error, BlankError) else 400
        raise RefusedError(status, str(error)) from error


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):  # only for the counters: the client is gone
        return Response(status_code=499)
    if isinstance(error, HTTPException):  # an unknown path or method
        text = f"{error.detail}: get the page from /, or post a picture to /classify"
        return JSONResponse({"error": text}, error.status_code, error.headers)
    status = error.status if isinstance(error, RefusedError) else 503
    return JSONResponse({"error": str(error)}, status, RETRY if status == 503 else None)

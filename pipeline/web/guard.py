"""Protection from other sites' pages and from DNS rebinding, and the counters for Prometheus."""

import contextlib
import ipaddress
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import prometheus_client as prometheus
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.web.limits import MAX_BYTES, RefusedError, Room

# No inline script or style, nothing from other sites, no embedding in a frame.
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def host_names(bound: str, allowed: tuple[str, ...] = ()) -> frozenset[str]:
    """Return the host names, in lower case, that a gateway which listens on `bound` accepts."""
    return frozenset(name.lower() for name in (*LOOPBACK, bound, *allowed))


def check_request(method: str, headers: Mapping[str, str], names: frozenset[str]) -> None:
    """Raise RefusedError unless the Host header is one of `names` and no other site sends this.

    The first stops DNS rebinding: a page whose own name was made to point here sends that name. If
    the gateway listens on every address (0.0.0.0 or ::), any IP address is accepted, since only
    names can be rebound. The second is for requests that send something; programs send no Origin.
    """
    name, host = None, headers.get("host", "")
    if host and not any(letter in host for letter in "/\\@?# \t,"):
        with contextlib.suppress(ValueError):
            parts = urlsplit(f"//{host}")
            _ = parts.port  # ValueError if it is not a number
            name = parts.hostname
    if name is None:
        raise RefusedError(400, "the Host header is not valid: write HOST or HOST:PORT")
    is_ours = name in names
    if not is_ours and names & {"0.0.0.0", "::"}:
        with contextlib.suppress(ValueError):
            is_ours = bool(ipaddress.ip_address(name))
    if not is_ours:
        raise RefusedError(421, f"the host {name} is not allowed: add --allow-host {name}")
    if method in ("GET", "HEAD"):
        return
    site = headers.get("sec-fetch-site")
    if site not in (None, "same-origin", "none"):
        raise RefusedError(403, f"a page of another site ({site}) may not send requests here")
    scheme, _, rest = headers.get("origin", "").partition("://")
    is_ours = scheme in ("http", "https") and rest.lower() == host.lower()
    if "origin" in headers and not is_ours:
        raise RefusedError(403, "a page of another origin may not send requests here")


def stated_length(headers: Mapping[str, str]) -> int:
    """Return the body's length in bytes as its header states it; 0 if there is no valid one."""
    length = headers.get("content-length", "0")[:20]
    return int(length) if length.isdecimal() else 0


_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class RequestCounters:
    """Prometheus metrics: requests by path and status, their duration, and what is in progress."""

    media_type = prometheus.CONTENT_TYPE_LATEST

    def __init__(self, room: Room, unlogged: Callable[[], int] = lambda: 0) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._requests = prometheus.Counter(
            "gateway_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        text = "From a request's headers to the end of its answer."
        self._seconds = prometheus.Histogram(
            "gateway_request_seconds", text, ["path"], buckets=_SECONDS, registry=registry
        )
        for name, text, value in (
            ("gateway_in_flight", "Pictures in progress.", lambda: room.taken.total()),
            ("gateway_held_bytes", "Bytes of all bodies in memory.", lambda: room.held.total()),
            ("gateway_unlogged", "Predictions missing from the prediction log.", unlogged),
        ):
            prometheus.Gauge(name, text, registry=registry).set_function(value)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count one request that was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return bytes(prometheus.generate_latest(self._registry))


class Guard:
    """A wrapper of an application: it refuses requests, adds our headers, and counts answers."""

    def __init__(
        self, app: ASGIApp, names: frozenset[str], counters: RequestCounters, paths: set[str]
    ) -> None:
        self._app, self._names = app, names
        self._counters, self._paths = counters, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass the application's lifespan events on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, headers = time.monotonic(), 0, Headers(scope=scope)
        # A body too long to be read to its end after an error: the connection is closed instead.
        is_endless = "transfer-encoding" in headers or stated_length(headers) > MAX_BYTES

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
                if status >= 400 and is_endless:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        app = self._app
        try:
            check_request(scope["method"], headers, self._names)
        except RefusedError as error:
            app = JSONResponse({"error": str(error)}, error.status)
        try:
            await app(scope, receive, send_guarded)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._counters.count(path, status, time.monotonic() - start)

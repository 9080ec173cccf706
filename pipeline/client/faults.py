"""Faults between a client and a server: their kinds, and how they are explained to a user."""

import json
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Literal

from pipeline.client.endpoint import RemoteModel
from pipeline.core.errors import PipelineError, ServerError, SlowError
from pipeline.core.text import escape

Kind = Literal[
    "slow",  # no answer before the deadline
    "unnamed",  # the host's name has no address
    "insecure",  # the TLS connection failed
    "unreached",  # nothing accepted the request
    "lost",  # the connection ended before the answer
    "busy",  # the server has too much to do
    "unloaded",  # the server has no version of the model now
    "died",  # the model's process died
    "alien",  # the answer is not Triton's
    "large",  # too much for one request
    "restricted",
    "unknown",  # no such model, or no such version of it
    "refused",
]
# Temporary kinds, after which a request may be repeated. "unknown" is one of them because a server
# that restarts has no model for a moment.
PASSING: frozenset[Kind] = frozenset({"unreached", "lost", "busy", "unloaded", "unknown"})
_LONGEST = 300  # characters of a server's own message that are passed on
# Parts of Triton's messages, in lower case.
_MESSAGES: tuple[tuple[str, Kind], ...] = (
    ("has no available versions", "unloaded"),
    ("restricted", "restricted"),
    ("stub process", "died"),
    ("is not at ready state", "unknown"),
    ("unknown model", "unknown"),
    ("exceeds maximum queue size", "busy"),
    ("larger than max", "large"),
)
# Parts of gRPC's messages about a failed connection, in lower case.
_CONNECTING: tuple[tuple[str, Kind], ...] = (
    ("errors resolving", "unnamed"),
    ("dns resolution failed", "unnamed"),
    ("name resolution", "unnamed"),
    ("certificate", "insecure"),
    ("handshake", "insecure"),
    ("ssl", "insecure"),
    ("hostname verification", "insecure"),
    ("peer name", "insecure"),
    ("http1.x server", "alien"),
    ("http2 header with status", "alien"),
    ("parsing http/2", "alien"),
    ("connection refused", "unreached"),
    ("socket closed", "lost"),
    ("connection reset", "lost"),
    ("broken pipe", "lost"),
    ("goaway", "lost"),
    ("failed to connect", "unreached"),
)
# The text that gRPC puts before the reason of a failed connection.
_CONNECTED = re.compile(r"^failed to connect to all addresses; last error: [A-Z_]+: \S+:\d+: ")


class Fault(Exception):
    """The reason why a request has no answer."""

    times = 1  # that it was sent

    def __init__(self, kind: Kind, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason
        self.pause = pause  # seconds to wait before a retry, as the server asks


def of_grpc(code: str, details: str) -> Fault:
    """Return the fault of a gRPC status: the name of its code, and its message."""
    message = details.lower()
    kind = next((kind for part, kind in _MESSAGES if part in message), None)
    if code == "DEADLINE_EXCEEDED":
        kind = "slow"
    elif kind is None and code in ("UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED"):
        kind = next((kind for part, kind in _CONNECTING if part in message), None)
        if kind is None and code in ("UNAVAILABLE", "CANCELLED"):
            kind = "busy" if code == "UNAVAILABLE" else "lost"
    elif kind is None:
        kind = {"RESOURCE_EXHAUSTED": "busy", "UNIMPLEMENTED": "alien"}.get(code)  # type: ignore[assignment]
    reason = short(_CONNECTED.sub("", details)).removesuffix(": OK") or code
    return Fault(kind or "refused", reason)


# The kind of an HTTP status, unless Triton's message says more.
_STATUSES: dict[int, Kind] = {
    **dict.fromkeys((429, 502, 503, 504), "busy"),
    **dict.fromkeys((401, 403), "restricted"),
    413: "large",
}


def of_http(status: int, body: bytes, headers: Mapping[str, str]) -> Fault:
    """Return the fault of an HTTP status that is not 200; `headers` ignores the case of names."""
    retry_after = headers.get("retry-after")
    pause = float(retry_after) if retry_after and retry_after.isdigit() else 0.0
    if 300 <= status < 400:
        reason = f"status {status}, a redirect to {short(headers.get('location', ''))!r}"
        return Fault("alien", reason, pause=pause)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    error = answer.get("error") if isinstance(answer, dict) else None  # Triton's message
    words = short(error) if isinstance(error, str) else ""
    kind = next((kind for part, kind in _MESSAGES if part in words.lower()), None)
    kind = kind or _STATUSES.get(status) or ("refused" if words else "alien")
    return Fault(kind, f"{words} (status {status})" if words else f"status {status}", pause=pause)


# The kinds of the exceptions of sockets and TLS; the first match counts.
_RAISED: tuple[tuple[tuple[type[Exception], ...], Kind], ...] = (
    ((TimeoutError,), "slow"),
    ((ssl.SSLError,), "insecure"),
    ((socket.gaierror, UnicodeError), "unnamed"),
    ((ConnectionRefusedError,), "unreached"),
    ((ConnectionError,), "lost"),
)


def of_connection(error: BaseException, is_connected: bool) -> Fault:
    """Return the fault of an exception from a socket."""
    otherwise: Kind = "lost" if is_connected else "unreached"
    kind = next((kind for types, kind in _RAISED if isinstance(error, types)), otherwise)
    return Fault(kind, short(str(error)) or type(error).__name__)


def explain_fault(fault: Fault, target: RemoteModel, timeout: float) -> PipelineError:
    """Return the error that tells a user what was tried, in how many seconds, and how to fix it."""
    reason, where = fault.reason, target.endpoint
    # Suggest TLS if the request was without it, and no TLS if it was with it.
    other = f"if it uses TLS, write {where.protocol}s://{where.address}"
    if where.is_secure:
        other = f"if it does not use TLS, write {where.protocol[:-1]}://{where.address}"
    problem = reason.lower().replace("_", " ")
    if any(part in problem for part in ("hostname", "mismatch", "not valid for")):
        secure = (
            "its certificate is for another host: use a host name that the certificate contains"
        )
    elif any(part in problem for part in ("verify failed", "self-signed", "peer name")):
        secure = "give the certificate of the CA that signed the server's certificate (--ca)"
    elif any(part in problem for part in ("wrong version", "record layer", "unexpected eof")):
        secure = other
    else:
        secure = f"give the CA that signed the server's certificate (--ca); {_CLIENTS}; {other}"
    is_version = fault.kind == "unknown" and target.version
    text = _EXPLAINED["version" if is_version else fault.kind].format(
        where=where,
        reason=reason,
        tried=f"{reason}, tried {fault.times} times" if fault.times > 1 else reason,
        model=target,
        timeout=timeout,
        other=f"{other}; {_CLIENTS}" if where.is_secure else other,
        secure=secure,
    )
    if fault.kind in _REFUSING:
        return PipelineError(text)
    return SlowError(text) if fault.kind == "slow" else ServerError(text)


_CLIENTS = "if it requires a client certificate, give it and its key (--certificate, --key)"
_PORTS = "check host and port; by default Triton's HTTP is on 8000 and its gRPC on 8001"
_REFUSING: frozenset[Kind] = frozenset({"unknown", "restricted", "large", "refused"})
_EXPLAINED = {
    "slow": "no answer from {where} in {timeout:g} s: raise the timeout (--timeout), or see "
    "whether the server runs ('pipeline serve status')",
    "unreached": "no answer from {where} ({tried}): see whether the server runs ('pipeline serve "
    "status') or start it ('pipeline serve')",
    "lost": "no answer from {where} ({tried}): it closed the connection. See whether the server "
    f"runs ('pipeline serve status') and the port is for this protocol: {_PORTS}; {{other}}",
    "unnamed": "no answer from {where}: its host name has no address ({tried}): check its "
    "spelling, or give the address itself",
    "busy": "{where} is overloaded ({tried}): try later, or with fewer concurrent requests",
    "unloaded": "{where} has unloaded {model.name} ({tried}): it is stopping or restarting",
    "died": "the model's process at {where} died ({tried}): restart it with 'pipeline serve stop' "
    "and 'pipeline serve'",
    "alien": f"{{where}} does not answer as Triton does ({{tried}}): {_PORTS}",
    "insecure": "no secure connection to {where} ({reason}): {secure}",
    "version": "{where} does not serve version {model.version} of model {model.name!r}: leave the "
    "version out for the served one",
    "unknown": "{where} does not serve a model {model.name!r}: choose another name (--name), or "
    "try again in a moment if the server has just started; 'pipeline serve status' lists its "
    "models",
    "restricted": "{where} refuses: {reason}; this needs the server's key: ask its operator, and "
    "give the key in `headers`, with 'pipeline query' as --header NAME=KEY",
    "large": "{where} refuses: {reason}; the request is too large: ask about fewer images",
    "refused": "{where} refuses: {reason}",
}


def short(text: str) -> str:
    """Return the text as one line, cut after 300 characters."""
    line = escape(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."

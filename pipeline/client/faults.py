"""What can go wrong between a client and a server: known by its kind, explained to a user."""

import json
import re
import socket
import ssl
from dataclasses import dataclass
from http.client import BadStatusLine, HTTPException, IncompleteRead, RemoteDisconnected
from typing import Literal

from pipeline.client.endpoint import Endpoint
from pipeline.core.errors import PipelineError, ServerError, SlowError
from pipeline.core.text import escape

Kind = Literal[
    "slow",  # no answer before the deadline
    "unnamed",  # the host's name has no address
    "insecure",  # no TLS connection came about
    "unreached",  # nothing accepted the request
    "lost",  # the connection ended before the answer
    "busy",  # the server has too much to do
    "unloaded",  # the server has no version of the model now
    "died",  # the process of the model did
    "alien",  # what answers is no Triton
    "large",  # too much for one request
    "restricted",
    "unknown",  # no such model, or no such version of it
    "refused",
]
# These may be over in a moment.
# A server that starts anew has no model for a moment.
PASSING: frozenset[Kind] = frozenset({"unreached", "lost", "busy", "unloaded", "unknown"})
_START = "is it running? 'pipeline serve status' tells, 'pipeline serve' starts it"
_LONGER = (
    "it may need longer (timeout, on the command line --timeout), or not run: 'pipeline serve "
    "status' tells"
)
_PORTS = "check host and port; by default Triton's HTTP is on 8000 and its gRPC on 8001"
_CLIENTS = (
    "where it asks who you are, give the client's own certificate and key (--certificate, --key)"
)
_LONGEST = 300  # characters of a server's own words that are passed on
# Parts of what Triton says, in lower case.
_SAID: tuple[tuple[str, Kind], ...] = (
    ("has no available versions", "unloaded"),
    ("restricted", "restricted"),
    ("stub process", "died"),
    ("is not at ready state", "unknown"),
    ("unknown model", "unknown"),
    ("exceeds maximum queue size", "busy"),
    ("larger than max", "large"),
)
# Parts of what gRPC says of a connection that it could not make, in lower case.
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
# What gRPC puts before the reason for which it has no connection.
_CONNECTED = re.compile(r"^failed to connect to all addresses; last error: [A-Z_]+: \S+:\d+: ")


@dataclass(frozen=True)
class Fault:
    """Why a request has no answer."""

    kind: Kind
    reason: str
    error: BaseException | None = None
    pause: float = 0.0  # seconds after which the server wants to be asked again


def of_grpc(code: str, details: str, error: BaseException) -> Fault:
    """The fault behind a gRPC status, by the name of its code."""
    said = details.lower()
    kind = next((kind for part, kind in _SAID if part in said), None)
    if code == "DEADLINE_EXCEEDED":
        kind = "slow"
    elif kind is None and code in ("UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED"):
        kind = next((kind for part, kind in _CONNECTING if part in said), None)
        if kind is None and code in ("UNAVAILABLE", "CANCELLED"):
            kind = "busy" if code == "UNAVAILABLE" else "lost"
    elif kind is None:
        kind = {"RESOURCE_EXHAUSTED": "busy", "UNIMPLEMENTED": "alien"}.get(code)  # type: ignore[assignment]
    reason = _short(_CONNECTED.sub("", details)).removesuffix(": OK") or code
    return Fault(kind or "refused", reason, error)


def of_http(status: int, body: bytes, retry_after: str | None, location: str | None) -> Fault:
    """The fault behind an HTTP status that is not 200."""
    said = _error_of(body)
    pause = float(retry_after) if retry_after and retry_after.isdigit() else 0.0
    what = f"{said} (status {status})" if said else f"status {status}"
    kind = next((kind for part, kind in _SAID if said and part in said.lower()), None)
    if kind is None and status in (429, 502, 503, 504):
        kind = "busy"
    elif kind is None and status in (401, 403):
        kind = "restricted"
    elif kind is None and status == 413:
        kind = "large"
    elif kind is None:
        kind = "refused" if said else "alien"
    if 300 <= status < 400:
        kind, what = "alien", f"status {status}, a redirect to {_short(str(location))!r}"
    return Fault(kind, what, pause=pause)


def of_connection(error: BaseException, is_connected: bool) -> Fault:
    """The fault behind what a socket or the reading of an answer from it raised."""
    reason = _short(str(error)) or type(error).__name__
    if isinstance(error, TimeoutError):
        return Fault("slow", reason, error)
    if isinstance(error, ssl.SSLError):
        return Fault("insecure", reason, error)
    if isinstance(error, socket.gaierror | UnicodeError):
        return Fault("unnamed", reason, error)
    if isinstance(error, ConnectionRefusedError):
        return Fault("unreached", reason, error)
    if isinstance(error, RemoteDisconnected | IncompleteRead | ConnectionError):
        return Fault("lost", reason, error)
    if isinstance(error, BadStatusLine):
        return Fault("alien", f"no HTTP, but {reason}", error)
    if isinstance(error, HTTPException | ValueError):
        return Fault("alien", reason, error)
    return Fault("lost" if is_connected else "unreached", reason, error)


@dataclass(frozen=True)
class Asked:
    """What was tried."""

    endpoint: Endpoint
    name: str  # of the model
    version: str  # empty: whichever the server chooses
    timeout: float  # seconds
    times: int


def explained(fault: Fault, asked: Asked) -> PipelineError:
    """The error that tells a user what was tried, and how to mend it."""
    reason, where = fault.reason, asked.endpoint
    tried = f"{reason}, tried {asked.times} times" if asked.times > 1 else reason
    if fault.kind in _EXPLAINED:
        other = f"{_other(where)}; {_CLIENTS}" if where.is_secure else _other(where)
        words = {"where": where, "tried": tried, "asked": asked, "other": other}
        return ServerError(_EXPLAINED[fault.kind].format(**words))
    if fault.kind == "slow":
        return SlowError(f"no answer from {where} in {asked.timeout:g} s: {_LONGER}")
    if fault.kind == "insecure":
        return ServerError(f"no secure connection to {where} ({reason}): {_secured(where, reason)}")
    if fault.kind == "unknown":
        return PipelineError(_unknown(asked))
    if fault.kind == "restricted":
        return PipelineError(
            f"{where} refuses: {reason}; that is restricted to those who hold its key: ask whoever "
            "runs it, and give the key in `headers`, with 'pipeline query' as --header NAME=KEY"
        )
    if fault.kind == "large":
        return PipelineError(
            f"{where} refuses: {reason}; the request is too large: ask about fewer images at once"
        )
    return PipelineError(f"{where} refuses: {reason}")


_EXPLAINED: dict[Kind, str] = {
    "unreached": f"no answer from {{where}} ({{tried}}): {_START}",
    "lost": "no answer from {where} ({tried}): it closed the connection. It died ('pipeline "
    f"serve status' tells), or that port is for another protocol: {_PORTS}; {{other}}",
    "unnamed": "no answer from {where}: its host's name has no address ({tried}): check its "
    "spelling, or give the address itself",
    "busy": "{where} has too much to do ({tried}): ask again later, or less at once",
    "unloaded": "{where} has unloaded {asked.name} ({tried}): it is stopping, or starting anew",
    "died": "the model's process at {where} died ({tried}): 'pipeline serve stop', then "
    "'pipeline serve' starts it again",
    "alien": f"{{where}} does not answer as Triton does ({{tried}}): {_PORTS}",
}


def _unknown(asked: Asked) -> str:
    if asked.version:
        return (
            f"{asked.endpoint} serves no version {asked.version} of a model {asked.name!r}: ask "
            "without a version for the one that is served"
        )
    return (
        f"{asked.endpoint} serves no model {asked.name!r}: ask for another name (on the command "
        "line: --name), or again in a moment if it has just started; 'pipeline serve status' lists "
        "what our server serves"
    )


def _secured(where: Endpoint, reason: str) -> str:
    """How to mend a secure connection that did not come about."""
    said = reason.lower().replace("_", " ")
    if "hostname" in said or "mismatch" in said or "not valid for" in said:
        return "its certificate is for another host: ask it by a name that stands in there"
    if "verify failed" in said or "self-signed" in said or "peer name" in said:
        return "give the certificate of the CA that signed the server's own (--ca)"
    if "wrong version" in said or "record layer" in said or "unexpected eof" in said:
        return _other(where)
    return f"give the CA that signed the server's certificate (--ca); {_CLIENTS}; {_other(where)}"


def _other(where: Endpoint) -> str:
    """The way to ask with TLS where there was none, and without where there was."""
    if where.is_secure:
        plain = f"{where.protocol[:-1]}://{where.address}"
        return f"where it speaks without TLS, write {plain}"
    return f"where it speaks TLS, write {where.protocol}s://{where.address}"


def _error_of(body: bytes) -> str:
    """What a server says is wrong, as Triton says it; empty where it does not."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    said = answer.get("error") if isinstance(answer, dict) else None
    return _short(said) if isinstance(said, str) else ""


def _short(text: str) -> str:
    """The text in one line, and not too much of it."""
    line = escape(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."

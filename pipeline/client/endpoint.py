"""Where a server listens, and the certificates that a secure connection to it needs.

What both clients need of gRPC.
"""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from pipeline.core.errors import PipelineError

# Triton's own, but for https: Triton has no TLS over HTTP, so that is a proxy before it.
_PORTS = {"http": 8000, "grpc": 8001, "https": 443, "grpcs": 8001}
_WRITE = "write http://HOST:8000 or grpc://HOST:8001, with TLS https://HOST or grpcs://HOST:8001"


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and for which protocol."""

    protocol: str  # http, https, grpc or grpcs
    address: str  # host:port

    @property
    def host(self) -> str:
        """The host, an IPv6 address without its brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def is_grpc(self) -> bool:
        return self.protocol.startswith("grpc")

    @property
    def is_secure(self) -> bool:
        return self.protocol.endswith("s")

    def __str__(self) -> str:
        return f"{self.protocol}://{self.address}"


def endpoint(url: str) -> Endpoint:
    """The endpoint that `url` names: http, https, grpc or grpcs://HOST:PORT."""
    if not url.isprintable() or " " in url:
        raise PipelineError(f"{url!r} has a blank or a control character in it: {_WRITE}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PipelineError(f"{url!r} has no valid port or host: {error}") from error
    if "@" in parts.netloc or parts.query or parts.fragment:  # not repeated: it may be a password
        raise PipelineError(
            "the URL of a server has no user, password, query or fragment; a key goes into "
            f"`headers`: {_WRITE}"
        )
    if parts.scheme not in _PORTS or not parts.hostname or parts.path not in ("", "/"):
        raise PipelineError(f"{url!r} is no server: {_WRITE}")
    if port == 0:
        raise PipelineError(f"{url!r} has no valid port, since none listens on 0: {_WRITE}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Endpoint(parts.scheme, f"{host}:{port or _PORTS[parts.scheme]}")


@dataclass(frozen=True)
class Certificates:
    """Files in PEM for https:// and grpcs://.

    Without `ca` a server is trusted whose certificate the usual authorities have signed.
    """

    ca: Path | str | None = None  # who signed the server's certificate
    certificate: Path | str | None = None  # the client's own, for a server that asks for one
    key: Path | str | None = None  # that belongs to it

    def context(self) -> ssl.SSLContext:
        """What Python needs for a secure connection; PipelineError names a file that is wrong."""
        if (self.certificate is None) != (self.key is None):
            raise PipelineError("a client's certificate and its key go together: give both")
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:  # ssl.SSLError is one
            raise PipelineError(
                f"{self.ca} cannot be read as a CA's certificate ({error.strerror or error}): "
                "give a PEM file"
            ) from error
        if self.certificate is None:
            return context
        try:
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            raise PipelineError(
                f"{self.certificate} and {self.key} are no certificate and its key ({error}): give "
                "two PEM files that belong together, the key without a password"
            ) from error
        return context

    def contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """CA, key and certificate as gRPC takes them, once they are known to be sound."""
        self.context()
        ca, key, certificate = (
            Path(path).read_bytes() if path else None
            for path in (self.ca, self.key, self.certificate)
        )
        return ca, key, certificate


def check(target: Endpoint, certificates: Certificates, headers: Mapping[str, str]) -> None:
    """Raise PipelineError for certificates or headers that the endpoint has no use for."""
    for name, value in headers.items():
        if not _is_header(name, value) or (target.is_grpc and name.lower().endswith("-bin")):
            raise PipelineError(
                f"{name!r} is no header for {target.protocol}, or what it says is none: use "
                "letters, digits, '-', '_' and '.' in its name (gRPC: no '-bin' at its end), and "
                "printable ASCII"
            )
    if not target.is_secure and certificates != Certificates():
        raise PipelineError(
            f"{target} is not secure, so certificates mean nothing there: write "
            f"{target.protocol}s://{target.address}"
        )


def _is_header(name: object, value: object) -> bool:
    """Whether gRPC takes it, which is stricter than HTTP."""
    if not isinstance(name, str) or not isinstance(value, str):
        return False
    return bool(re.fullmatch(r"[\w.-]+", name, re.ASCII) and re.fullmatch(r"[ -~]*", value))


OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that comes back is noticed soon: gRPC by itself waits for up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Clients do not share a connection, nor the pause after one has failed.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),  # as over HTTP: a server is asked directly
    ("grpc.enable_retries", 0),  # ours are inside the deadline, and counted
]


def credentials(target: Endpoint, certificates: Certificates) -> grpc.ChannelCredentials | None:
    """What a secure channel needs; None for a plain one."""
    if not target.is_secure:
        return None
    return grpc.ssl_channel_credentials(*certificates.contents())

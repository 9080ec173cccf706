"""Where a server listens, and the certificates that a secure connection to it needs."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import PipelineError

# Triton's own, but for https: Triton has no TLS over HTTP, so that is a proxy before it.
_PORTS = {"http": 8000, "grpc": 8001, "https": 443, "grpcs": 8001}


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
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PipelineError(f"{url!r} has no valid port or host: {error}") from error
    if parts.scheme not in _PORTS or not parts.hostname or parts.path not in ("", "/"):
        raise PipelineError(
            f"{url!r} is no server: write http://HOST:8000 or grpc://HOST:8001, with TLS "
            "https://HOST or grpcs://HOST:8001"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Endpoint(parts.scheme, f"{host}:{port or _PORTS[parts.scheme]}")


@dataclass(frozen=True)
class Certificates:
    """Files in PEM for https:// and grpcs://.

    Without `ca` a server is trusted whose certificate the usual authorities have signed.
    """

    ca: Path | None = None  # who signed the server's certificate
    certificate: Path | None = None  # the client's own, for a server that asks for one
    key: Path | None = None  # that belongs to it

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
            path.read_bytes() if path else None for path in (self.ca, self.key, self.certificate)
        )
        return ca, key, certificate


def check(target: Endpoint, certificates: Certificates) -> None:
    """Raise PipelineError for certificates that the endpoint has no use for."""
    if not target.is_secure and certificates != Certificates():
        raise PipelineError(
            f"{target} is not secure, so certificates mean nothing there: write "
            f"{target.protocol}s://{target.address}"
        )

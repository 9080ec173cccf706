"""A server's address, and the certificates of a secure connection."""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.core.errors import PipelineError

# Triton's default ports, except https: Triton's HTTP has no TLS, so a proxy in front provides it.
_PORTS = {"http": 8000, "grpc": 8001, "https": 443, "grpcs": 8001}
_WRITE = "write http://HOST:8000 or grpc://HOST:8001, with TLS https://HOST or grpcs://HOST:8001"


@dataclass(frozen=True)
class Endpoint:
    """The protocol and the address of a server."""

    protocol: str  # http, https, grpc or grpcs; file for an ONNX file in this process
    address: str  # host:port, or the path of the file

    @property
    def host(self) -> str:
        """The host; an IPv6 address is without brackets."""
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
    """Parse `url`: http, https, grpc or grpcs://HOST:PORT; raise PipelineError if not valid."""
    if not url.isprintable() or " " in url:
        raise PipelineError(f"{url!r} has a blank or a control character in it: {_WRITE}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise PipelineError(f"{url!r} has no valid port or host: {error}") from error
    if "@" in parts.netloc or parts.query or parts.fragment:  # not shown: may be a password
        raise PipelineError(
            f"a server's URL has no user, password, query or fragment (keys: `headers`): {_WRITE}"
        )
    if parts.scheme not in _PORTS or not parts.hostname or parts.path not in ("", "/"):
        raise PipelineError(f"{url!r} is not the URL of a server: {_WRITE}")
    if port == 0:
        raise PipelineError(f"{url!r} has no valid port, since none listens on 0: {_WRITE}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Endpoint(parts.scheme, f"{host}:{port or _PORTS[parts.scheme]}")


@dataclass(frozen=True)
class Certificates:
    """PEM files for https:// and grpcs://.

    Without `ca`, a server's certificate must be signed by one of the default authorities.
    """

    ca: Path | str | None = None  # the authority that signed the server's certificate
    certificate: Path | str | None = None  # the client's own, for a server that asks for one
    key: Path | str | None = None  # the private key of `certificate`

    def context(self) -> ssl.SSLContext:
        """Return Python's TLS context; raise PipelineError, which names it, for an invalid file."""
        if (self.certificate is None) != (self.key is None):
            raise PipelineError(
                "a client certificate needs its key, and a key its certificate: give both"
            )
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:  # ssl.SSLError is one
            raise PipelineError(
                f"{self.ca} is not a CA certificate ({error.strerror or error}): give a PEM file"
            ) from error
        if self.certificate is None:
            return context
        try:
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            raise PipelineError(
                f"{self.certificate} and {self.key} are not a certificate and its key ({error}): "
                "give two matching PEM files, the key without a password"
            ) from error
        return context


@dataclass(frozen=True)
class RemoteModel:
    """A model at a server, and what a connection needs.

    Raises PipelineError for a version, headers or certificates that the endpoint cannot use.
    """

    endpoint: Endpoint
    name: str
    version: str = ""  # empty: the one that the server chooses
    headers: Mapping[str, str] = field(default_factory=dict)
    certificates: Certificates = field(default_factory=Certificates)

    def __post_init__(self) -> None:
        if self.version and not self.version.isdecimal():
            raise PipelineError(
                f"the version must be a whole number or left out, got {self.version!r}"
            )
        is_grpc, protocol = self.endpoint.is_grpc, self.endpoint.protocol
        for name, value in self.headers.items():
            # gRPC's rules, which are stricter than HTTP's.
            is_text = isinstance(name, str) and isinstance(value, str)
            if not (
                is_text
                and re.fullmatch(r"[\w.-]+", name, re.ASCII)
                and re.fullmatch(r"[ -~]*", value)
                and not (is_grpc and name.lower().endswith("-bin"))
            ):
                raise PipelineError(
                    f"header {name!r} is not valid for {protocol}: use letters, digits, '-', '_' "
                    "and '.' in its name (for gRPC no '-bin' at its end), printable ASCII as value"
                )
        if self.endpoint.is_secure:
            self.certificates.context()  # raises PipelineError for an invalid file
        elif self.certificates != Certificates():
            raise PipelineError(
                f"{self.endpoint} is without TLS and uses no certificates: write "
                f"{protocol}s://{self.endpoint.address}"
            )

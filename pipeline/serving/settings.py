"""Settings of a server. Imports nothing slow, because the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import SettingError
from pipeline.core.settings import POSITIVE, Limits, require_valid, setting

_PORT = {"limits": Limits(1, 65535), "unit": "PORT"}
_PROFILE = "Config to serve by, such as latency: config.PROFILE.pbtxt.  [default: config.pbtxt]"
_START = "Time to wait until the server is ready."
RUNTIMES = ("auto", "path", "wheel", "docker")


@dataclass(frozen=True)
class ServeConfig:
    """Where a tritonserver listens, how it runs, and how long it may take to start and to stop."""

    http_port: int = setting(8000, "Port for HTTP.", **_PORT)
    grpc_port: int = setting(8001, "Port for gRPC.", **_PORT)
    metrics_port: int = setting(8002, "Port for Prometheus metrics.", **_PORT)
    host: str = "127.0.0.1"
    runtime: str = setting("auto", "Where to find tritonserver.", choices=RUNTIMES)
    profile: str = setting("", _PROFILE, unit="PROFILE")
    start_seconds: float = setting(60.0, _START, limits=POSITIVE, unit="SECONDS")
    stop_seconds: float = 10.0  # to answer accepted requests, and to end
    canary_seconds: float = 1.0  # between two requests of the canary
    failed_starts: int = 5  # in a row, after which the supervisor gives up

    def __post_init__(self) -> None:
        require_valid(self)
        ports = tuple(self.ports.values())
        if len(set(ports)) < len(ports):
            raise SettingError(f"three different ports are needed, got {ports}")

    @property
    def ports(self) -> dict[str, int]:
        """The port of each of Triton's services, by name."""
        return {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}

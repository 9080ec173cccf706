"""Settings of a server. Imports nothing slow, because the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import PipelineError, require_choice
from pipeline.core.settings import setting

RUNTIMES = ("auto", "path", "wheel", "docker")


@dataclass(frozen=True)
class ServeConfig:
    """Where a tritonserver listens, how it runs, and how long it may take to start and to stop."""

    http_port: int = setting(8000, "Port for HTTP.")
    grpc_port: int = setting(8001, "Port for gRPC.")
    metrics_port: int = setting(8002, "Port for Prometheus metrics.")
    host: str = "127.0.0.1"
    runtime: str = setting("auto", "Where to find tritonserver.", choices=RUNTIMES)
    profile: str = setting("", "Triton config profile, such as latency.  [default: config.pbtxt]")
    start_seconds: float = setting(60.0, "Seconds to wait until the server is ready.")
    stop_seconds: float = 10.0  # to answer accepted requests, and to end
    canary_seconds: float = 1.0  # between two requests of the canary
    failed_starts: int = 5  # in a row, after which the supervisor gives up

    def __post_init__(self) -> None:
        require_choice("runtime", self.runtime, RUNTIMES)
        ports = tuple(self.ports.values())
        if len(set(ports)) < len(ports) or not all(0 < port < 65536 for port in ports):
            raise PipelineError(f"three different ports from 1 to 65535 are needed, got {ports}")

    @property
    def ports(self) -> dict[str, int]:
        """The port of each of Triton's services, by name."""
        return {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}

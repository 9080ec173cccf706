"""Settings of a server. Imports nothing slow, because the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import PipelineError, require_choice


@dataclass(frozen=True)
class ServeConfig:
    """Where a tritonserver listens, how it runs, and how long it may take to start and to stop."""

    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    host: str = "127.0.0.1"
    runtime: str = "auto"  # auto, path, wheel or docker
    profile: str = ""  # name of one of configs/*.pbtxt; empty: config.pbtxt
    start_seconds: float = 60.0
    stop_seconds: float = 10.0  # to answer accepted requests, and to end
    canary_seconds: float = 1.0  # between two requests of the canary
    failed_starts: int = 5  # in a row, after which the supervisor gives up

    def __post_init__(self) -> None:
        require_choice("runtime", self.runtime, ("auto", "path", "wheel", "docker"))
        ports = (self.http_port, self.grpc_port, self.metrics_port)
        if len(set(ports)) < len(ports) or not all(0 < port < 65536 for port in ports):
            raise PipelineError(f"three different ports from 1 to 65535 are needed, got {ports}")

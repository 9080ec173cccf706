"""Settings of the gateway. Imports nothing heavy: the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import PipelineError


@dataclass(frozen=True)
class GatewayConfig:
    """How much the gateway takes on, and from whom."""

    host: str = "127.0.0.1"
    port: int = 8080
    allow_hosts: tuple[str, ...] = ()  # further names by which it may be asked
    timeout: float = 10.0  # seconds for a whole request, its upload included
    requests: int = 64  # under way at once, of one client half; one more is refused with 503
    decoders: int = 2  # threads

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise PipelineError(f"the timeout must be above 0 seconds, got {self.timeout}")
        if self.requests < 1 or self.decoders < 1:
            raise PipelineError("requests and decoders must be at least 1")

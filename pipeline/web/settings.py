"""Settings of the gateway. Imports nothing heavy: the command line reads them."""

from dataclasses import dataclass, field

from pipeline.core.errors import PipelineError

_NAME = {
    "help": "Another name of this machine that browsers may use.",
    "option": "allow-host",
    "metavar": "NAME",
}


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway's settings: where it listens, which host names it accepts, and its limits."""

    host: str = field(default="127.0.0.1", metadata={"help": "Where to listen."})
    port: int = field(default=8080, metadata={"help": "auto or 0: a free port."})
    allow_hosts: tuple[str, ...] = field(default=(), metadata=_NAME)
    # For a whole request, including its upload.
    timeout: float = field(default=10.0, metadata={"help": "Seconds for an answer."})
    # Half of them for one client alone; further requests are refused with 503.
    requests: int = field(default=64, metadata={"help": "Requests in progress, at most."})
    decoders: int = 2  # threads

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise PipelineError(f"the timeout must be above 0 seconds, got {self.timeout}")
        if self.requests < 1 or self.decoders < 1:
            raise PipelineError("requests and decoders must be at least 1")

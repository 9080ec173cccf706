"""Settings of the gateway. Imports nothing heavy: the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import PipelineError
from pipeline.core.settings import setting

_HOSTS = "Another host name that browsers may use for this machine; repeatable."


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway's settings: where it listens, which host names it accepts, and its limits."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8080, "Port to listen on; auto or 0 is a free one.")
    allow_hosts: tuple[str, ...] = setting((), _HOSTS, option="allow-host", metavar="NAME")
    timeout: float = setting(10.0, "Seconds for a whole request, its upload included.")
    # Half of them for one client alone; further requests are refused with 503.
    requests: int = setting(64, "Maximum number of concurrent requests.")
    decoders: int = 2  # threads

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise PipelineError(f"the timeout must be above 0 seconds, got {self.timeout}")
        if self.requests < 1 or self.decoders < 1:
            raise PipelineError(
                f"requests and decoders must be at least 1, got {self.requests} and {self.decoders}"
            )

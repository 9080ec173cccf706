"""Settings of the gateway. Imports nothing heavy: the command line reads them."""

from dataclasses import dataclass, field

from pipeline.core.settings import COUNT, POSITIVE, Limits, require_valid, setting

_HOSTS = "Another host name that browsers may use for this machine; repeatable."
_COLLECT = "Folder to store corrected pictures in, as a data set; without it, none is stored."


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway's settings: where it listens, which host names it accepts, and its limits."""

    host: str = setting("127.0.0.1", "Address to listen on.", unit="HOST")
    port: int = setting(
        8080, "Port to listen on; auto or 0 is a free one.", limits=Limits(0, 65535), unit="PORT"
    )
    allow_hosts: tuple[str, ...] = setting((), _HOSTS, option="allow-host", unit="NAME")
    timeout: float = setting(
        10.0, "Time for a whole request, its upload included.", limits=POSITIVE, unit="SECONDS"
    )
    collect: str = setting("", _COLLECT, unit="DIR")
    # Half of them for one client alone; further requests are refused with 503.
    requests: int = setting(64, "Concurrent requests, at most.", limits=COUNT, unit="REQUESTS")
    decoders: int = field(default=2, metadata={"limits": COUNT})  # threads

    def __post_init__(self) -> None:
        require_valid(self)

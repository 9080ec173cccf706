"""Settings of packaging. Imports only fast modules, because the command line reads them."""

from dataclasses import dataclass

from pipeline.core.settings import COUNT, Limits, require_valid, setting

_PROFILE = "  [default: each profile's]"
_DELAY = f"Time to wait for more images of a batch.{_PROFILE}"
_INTRA = f"Threads of a copy in an operator.{_PROFILE}"
_INTER = f"Operators of a copy in parallel.{_PROFILE}"
_CORES = "CPU cores of the serving machine.  [default: this one's]"


@dataclass(frozen=True)
class PackageConfig:
    """How Triton runs the packaged model; each profile derives what is None (see profiles.py)."""

    max_batch_size: int = setting(64, "Images in a batch, at most.", limits=COUNT, unit="IMAGES")
    max_queue_delay_us: int | None = setting(None, _DELAY, limits=Limits(0), unit="MICROSECONDS")
    instances: int | None = setting(
        None, f"Copies of the model that run concurrently.{_PROFILE}", limits=COUNT, unit="COPIES"
    )
    intra_op_threads: int | None = setting(None, _INTRA, limits=COUNT, unit="THREADS")
    inter_op_threads: int | None = setting(None, _INTER, limits=COUNT, unit="OPERATORS")
    cores: int | None = setting(None, _CORES, limits=COUNT, unit="CORES")

    def __post_init__(self) -> None:
        require_valid(self)

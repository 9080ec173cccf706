"""Settings of packaging. Imports only fast modules, because the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import PipelineError


@dataclass(frozen=True)
class PackageConfig:
    """How Triton runs the packaged model; each profile derives what is None (see profiles.py)."""

    max_batch_size: int = 64
    max_queue_delay_us: int | None = None  # how long a request may wait for others to share a batch
    instances: int | None = None
    intra_op_threads: int | None = None
    inter_op_threads: int | None = None
    cores: int | None = None  # of the machine that will serve; None: those of this machine

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "max_queue_delay_us" else 1
            if value is not None and value < least:
                raise PipelineError(f"{name} must be at least {least}, got {value}")

"""Settings of packaging. Imports only fast modules, because the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import PipelineError
from pipeline.core.settings import setting

PROFILE = "[default: each profile's]"


@dataclass(frozen=True)
class PackageConfig:
    """How Triton runs the packaged model; each profile derives what is None (see profiles.py)."""

    max_batch_size: int = setting(64, "Maximum number of images in a batch.")
    max_queue_delay_us: int | None = setting(None, f"Microseconds to wait for a batch.  {PROFILE}")
    instances: int | None = setting(None, f"Copies of the model that run concurrently.  {PROFILE}")
    intra_op_threads: int | None = setting(None, f"Threads of a copy in an operator.  {PROFILE}")
    inter_op_threads: int | None = setting(None, f"Operators of a copy in parallel.  {PROFILE}")
    cores: int | None = setting(None, "CPU cores of the serving machine.  [default: this one's]")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "max_queue_delay_us" else 1
            if value is not None and value < least:
                raise PipelineError(f"{name} must be at least {least}, got {value}")

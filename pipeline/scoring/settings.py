"""Settings of offline scoring. Imports nothing heavy: the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import PipelineError, require_choice
from pipeline.core.settings import setting

PROVIDERS = ("cpu", "cuda", "tensorrt")


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of offline classification."""

    top: int = setting(3, "Number of classes in an answer.")
    provider: str = setting("cpu", "Device on which ONNX Runtime must run.", choices=PROVIDERS)
    workers: int | None = setting(None, "Worker processes.  [default: one per core or GPU]")
    address: str | None = setting(None, "Ray cluster.  [default: a local Ray for this job]")
    rows: int = setting(8192, "Images per output file, and the most that a killed worker loses.")
    batch_size: int = 64  # images in one call of ONNX Runtime; more exceed a core's cache

    def __post_init__(self) -> None:
        require_choice("provider", self.provider, PROVIDERS)
        for name in ("top", "rows", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PipelineError(f"{name} must be at least 1, got {value}")

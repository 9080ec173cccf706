"""Settings of offline scoring. Imports nothing heavy: the command line reads them."""

from dataclasses import dataclass

from pipeline.core.errors import PipelineError, require_choice


@dataclass(frozen=True)
class ScoreConfig:
    """How many images are classified offline, and how."""

    top: int = 3
    rows: int = 8192  # of the source that one file of the result answers
    batch_size: int = 64  # images that ONNX Runtime gets at once; more fall out of a core's cache
    provider: str = "cpu"  # cpu, cuda or tensorrt
    workers: int | None = None  # None: one for each core, or for each GPU
    address: str | None = None  # of a Ray cluster; None: a Ray of one's own on this machine

    def __post_init__(self) -> None:
        require_choice("provider", self.provider, ("cpu", "cuda", "tensorrt"))
        for name in ("top", "rows", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PipelineError(f"{name} must be at least 1, got {value}")

"""Settings of offline scoring. Imports nothing heavy: the command line reads them."""

from dataclasses import dataclass, field

from pipeline.core.errors import PipelineError, require_choice

PROVIDERS = ("cpu", "cuda", "tensorrt")
_PROVIDER = {"help": "Where ONNX Runtime has to run every node.", "choices": PROVIDERS}
_WORKERS = {"help": "[default: one for each core or GPU]"}
_ADDRESS = {"help": "A Ray cluster.  [default: a Ray of its own on this machine]"}
_ROWS = {"help": "Images in each file of answers, which is what a kill can cost a worker."}


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of offline classification."""

    top: int = field(default=3, metadata={"help": ""})
    provider: str = field(default="cpu", metadata=_PROVIDER)
    workers: int | None = field(default=None, metadata=_WORKERS)
    address: str | None = field(default=None, metadata=_ADDRESS)
    rows: int = field(default=8192, metadata=_ROWS)
    batch_size: int = 64  # images in one call of ONNX Runtime; more exceed a core's cache

    def __post_init__(self) -> None:
        require_choice("provider", self.provider, PROVIDERS)
        for name in ("top", "rows", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PipelineError(f"{name} must be at least 1, got {value}")

"""Settings of offline scoring. Imports nothing heavy: the command line reads them."""

from dataclasses import dataclass

from pipeline.core.settings import COUNT, require_valid, setting

PROVIDERS = ("cpu", "cuda", "tensorrt")
_WORKERS = "Worker processes.  [default: one per core or GPU]"
_ROWS = "Images per output file, and the most that a killed worker loses."
_ADDRESS = "Ray cluster.  [default: a local Ray for this job]"


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of offline classification."""

    top: int = setting(3, "Number of classes in an answer.", limits=COUNT, unit="CLASSES")
    provider: str = setting("cpu", "Device on which ONNX Runtime must run.", choices=PROVIDERS)
    workers: int | None = setting(None, _WORKERS, limits=COUNT, unit="PROCESSES")
    address: str | None = setting(None, _ADDRESS, unit="HOST:PORT")
    rows: int = setting(8192, _ROWS, limits=COUNT, unit="IMAGES")
    batch_size: int = 64  # images in one call of ONNX Runtime; more exceed a core's cache

    def __post_init__(self) -> None:
        require_valid(self)

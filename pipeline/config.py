"""Settings of every stage, and the model's signature. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Any

from pipeline.errors import PipelineError

MNIST_CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape (without the batch) of a tensor that crosses the model's border."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} [batch, {', '.join(map(str, self.shape))}])"

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "TensorSpec":
        """The tensor that a manifest describes."""
        return cls(record["name"], record["dtype"], tuple(record["shape"]))


# The signature. 0 is paper, 255 is ink; scaling and normalizing happen inside the model.
IMAGES = TensorSpec("images", "uint8", (1, 28, 28))


def log_probabilities(classes: int) -> TensorSpec:
    """The output: natural logarithms of probabilities, one for each class."""
    return TensorSpec("log_probabilities", "float32", (classes,))


def pictures_of(dataset: str) -> str:
    """How pictures become a model's images: `digit` for MNIST, `whole` for any other data set.

    A digit is cleaned, cropped and centred as MNIST was made. A whole picture keeps its gray
    levels and what stands where: one of 28 x 28 pixels is taken as it is.
    """
    return "digit" if dataset == "mnist" else "whole"


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise PipelineError unless the setting `name` is one of its choices."""
    if value not in choices:
        raise PipelineError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Criterion:
    """When an exported file says what its module says. Set before anything is measured."""

    batch_sizes: tuple[int, ...] = (1, 2, 3, 7, 64, 65, 256)  # of all rows
    largest_batch: int = 256  # every size up to it is tried on one batch; `package` allows no more
    threads: tuple[int, ...] = (1, 2)
    # The least error that a row is granted: 8 units in the last place of float32, of the row's
    # largest output. Twice that, or twice eager PyTorch's own error, is the row's bound.
    floor: float = 2**-20
    ratio: float = 8.0  # of the largest error to eager PyTorch's, at most
    # Eager PyTorch's largest error, as a share of the images' median margin. Sound networks are
    # near a millionth; above this one, float32 does not compute the network.
    unstable: float = 1e-3
    ties: int = 5  # images whose class may change in float32, each within its bound of a tie
    # What accuracy a variant may lose against the reference, as a fraction.
    lost_accuracy: tuple[tuple[str, float], ...] = (("fp16", 0.0002), ("int8", 0.001))


@dataclass(frozen=True)
class ExportConfig:
    """The ONNX dialect: what every Triton since 23.09 loads."""

    opset: int = 18
    ir_version: int = 9


@dataclass(frozen=True)
class PackageConfig:
    """How Triton runs the packaged model. What is None each profile derives: see profiles.py."""

    max_batch_size: int = 64
    max_queue_delay_us: int | None = None  # how long a request may wait for company
    instances: int | None = None
    intra_op_threads: int | None = None
    inter_op_threads: int | None = None
    cores: int | None = None  # of the machine that will serve; None: as many as this one has

    def __post_init__(self) -> None:
        counts = ("max_batch_size", "instances", "intra_op_threads", "inter_op_threads", "cores")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PipelineError(f"{name} must be at least 1, got {value}")
        if self.max_queue_delay_us is not None and self.max_queue_delay_us < 0:
            raise PipelineError(f"max_queue_delay_us is negative: {self.max_queue_delay_us}")


@dataclass(frozen=True)
class ServeConfig:
    """Where a tritonserver listens, and how long it may take to start and to stop."""

    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    host: str = "127.0.0.1"
    runtime: str = "auto"  # auto, path, wheel or docker
    profile: str = ""  # which of configs/*.pbtxt; empty: config.pbtxt
    start_seconds: float = 60.0
    stop_seconds: float = 10.0  # to answer what was accepted, and to end
    canary_seconds: float = 1.0  # between two questions whose answers are known
    failed_starts: int = 5  # in a row, after which it is not started again

    def __post_init__(self) -> None:
        require_choice("runtime", self.runtime, ("auto", "path", "wheel", "docker"))
        ports = (self.http_port, self.grpc_port, self.metrics_port)
        if len(set(ports)) < len(ports) or not all(0 < port < 65536 for port in ports):
            raise PipelineError(f"three different ports from 1 to 65535 are needed, got {ports}")


@dataclass(frozen=True)
class GatewayConfig:
    """How much the gateway takes on, and from whom."""

    host: str = "127.0.0.1"
    port: int = 8080
    allow_hosts: tuple[str, ...] = ()  # further names by which it may be asked
    timeout: float = 10.0  # seconds for a whole request, its upload included
    requests: int = 64  # under way at once, of one client half; one more is refused with 503
    decoders: int = 2  # threads

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise PipelineError(f"the timeout must be above 0 seconds, got {self.timeout}")
        if self.requests < 1 or self.decoders < 1:
            raise PipelineError("requests and decoders must be at least 1")


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

"""Settings of every stage, and the model's signature. Imports nothing heavy."""

from dataclasses import asdict, dataclass, replace
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


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PipelineError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


LAYERS = {"cnn": 4, "classic": 2, "record": 2, "net": 1}  # how many channels each network takes


@dataclass(frozen=True)
class Recipe:
    """How to train: the network and everything that shapes its weights but seed and data."""

    network: str = "cnn"  # cnn, classic, record or net: see model.py
    channels: tuple[int, ...] = (16, 24, 32, 48)  # of each convolution, or hidden layer (net)
    padded: bool = False  # whether the cnn's convolutions see the image's border as its middle
    epochs: float = 1.0  # passes over the training split; the last may be partial
    batch_size: int = 128
    optimizer: str = "adamw"  # adamw, adadelta or sgd
    lr: float = 0.015  # the peak of the schedule
    beta1: float = 0.9  # of adamw: how much of the mean gradient a step keeps
    beta2: float = 0.99  # and of the mean squared gradient
    schedule: str = "one-cycle"  # one-cycle, or decay: by gamma after each epoch
    warm_up: float = 0.25  # of the steps, in which one-cycle climbs to its peak
    gamma: float = 0.7
    weight_decay: float = 0.02
    label_smoothing: float = 0.0  # 0 to 1
    dropout: float = 0.0  # of the cnn, after its second convolution and before its classifier
    norm_momentum: float = 0.2  # of batch normalization; a short run needs more
    average: float = 0.0  # decay of the averaged weights, kept from half-way on; 0 for none
    mirror: float = 0.0  # how probably an image is mirrored, left to right
    rotate: float = 0.0  # radians; this and the next four: how far an image is distorted at most
    stretch: float = 0.0  # in each direction, as a logarithm
    shear: float = 0.0  # as a tangent
    shift: float = 0.0  # of half the image's side
    elastic: float = 0.0  # of half the image's side
    fade: float = 0.0  # of the steps, the last ones, over which the distortion fades
    stroke: float = 0.0  # how much strokes are thickened or thinned; 1 is a pixel on each side
    outliers: float = 0.0  # things that are no digits in each batch, as a part of its digits

    def __post_init__(self) -> None:
        _choice("network", self.network, tuple(LAYERS))
        _choice("optimizer", self.optimizer, ("adamw", "adadelta", "sgd"))
        _choice("schedule", self.schedule, ("one-cycle", "decay"))
        layers = LAYERS[self.network]
        if len(self.channels) != layers or min(self.channels) < 1:
            raise PipelineError(
                f"channels must be {layers} numbers of at least 1 for {self.network}, "
                f"got {','.join(map(str, self.channels))}"
            )
        if not 0 < self.epochs <= 1000:
            raise PipelineError(f"epochs must be above 0 and at most 1000, got {self.epochs}")
        if not 1 <= self.batch_size <= 10_000:
            raise PipelineError(f"batch-size must be 1 to 10000, got {self.batch_size}")
        if not self.lr > 0:
            raise PipelineError(f"lr must be above 0, got {self.lr}")
        for name in (
            "label_smoothing",
            "average",
            "warm_up",
            "beta1",
            "beta2",
            "dropout",
            "fade",
            "stroke",
            "outliers",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise PipelineError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.mirror <= 1:
            raise PipelineError(f"mirror must be 0 to 1, got {self.mirror}")
        for name in ("rotate", "stretch", "shear", "shift", "elastic"):
            if not 0 <= getattr(self, name) <= 2:
                raise PipelineError(f"{name} must be 0 to 2, got {getattr(self, name)}")

    @property
    def distorts(self) -> bool:
        """Whether training sees each image distorted, another way every time."""
        return any(
            (
                self.mirror,
                self.rotate,
                self.stretch,
                self.shear,
                self.shift,
                self.elastic,
                self.stroke,
            )
        )


RECIPES = {
    "quick": Recipe(epochs=0.7, batch_size=192, lr=0.022, label_smoothing=0.1),
    "standard": Recipe(
        channels=(16, 32, 72, 128),
        epochs=9,
        lr=0.012,
        warm_up=0.15,
        weight_decay=0.05,
        label_smoothing=0.05,
        norm_momentum=0.1,
        average=0.995,
        rotate=0.2,
        stretch=0.12,
        shear=0.2,
        shift=0.07,
        elastic=0.06,
        outliers=0.25,
    ),
    # Minutes, for a little more: `make best`.
    "best": Recipe(
        channels=(24, 48, 96, 160),
        epochs=20,
        lr=0.012,
        warm_up=0.15,
        weight_decay=0.05,
        label_smoothing=0.05,
        norm_momentum=0.1,
        average=0.998,
        rotate=0.2,
        stretch=0.12,
        shear=0.2,
        shift=0.07,
        elastic=0.08,
    ),
    # The classic MNIST example: two convolutions, dropout, Adadelta. The yardstick.
    "baseline": Recipe(
        network="classic",
        channels=(32, 64),
        epochs=14,
        batch_size=64,
        optimizer="adadelta",
        lr=1.0,
        schedule="decay",
        weight_decay=0.0,
    ),
    # The recipe that reached 99 % in 0.76 s on a GPU: https://github.com/tuomaso/train_mnist_fast
    "record": Recipe(
        network="record",
        channels=(24, 32),
        batch_size=256,
        lr=0.01,
        beta1=0.7,
        beta2=0.9,
        warm_up=0.3,
        weight_decay=0.0,
    ),
    # The learner's note that this project grew out of: 784-128-10, plain SGD.
    "note": Recipe(
        network="net",
        channels=(128,),
        epochs=5,
        batch_size=64,
        optimizer="sgd",
        lr=0.1,
        schedule="decay",
        gamma=1.0,
        weight_decay=0.0,
    ),
}
DEFAULT_RECIPE = "standard"
# What another kind of pictures wants of a recipe that distorts its images. Clothes are not written:
# they neither lean nor bend, but they may be mirrored, and take a wider network longer to tell.
FOR_DATASET: dict[str, dict[str, Any]] = {
    "fashion-mnist": {
        "channels": (24, 48, 96, 128),
        "epochs": 16.0,
        "mirror": 0.5,
        "rotate": 0.04,
        "stretch": 0.05,
        "shear": 0.04,
        "elastic": 0.0,
    }
}


@dataclass(frozen=True)
class TrainConfig:
    """One training run: a recipe, and what else decides its weights bit for bit."""

    recipe: str = DEFAULT_RECIPE
    settings: Recipe = RECIPES[DEFAULT_RECIPE]
    dataset: str = "mnist"
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda; device.py decides
    compiled: bool = False  # by torch.compile, which pays on a GPU in a long run

    def __post_init__(self) -> None:
        _choice("device", self.device, ("auto", "cpu", "cuda"))
        if self.settings.outliers and self.dataset != "mnist":
            raise PipelineError(
                f"outliers are things that are no digits, and {self.dataset} is trained without: "
                f"leave --outliers out, got {self.settings.outliers}"
            )
        if not 0 <= self.seed < 2**31:
            raise PipelineError(f"seed must be 0 to 2147483647, got {self.seed}")

    def record(self) -> dict[str, Any]:
        """This run as JSON would have it."""
        record = asdict(self)
        record["settings"]["channels"] = list(self.settings.channels)
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "TrainConfig":
        """The run that `record` describes; KeyError or TypeError if it describes none."""
        names = ("recipe", "dataset", "seed", "device", "compiled")
        fields = {name: record[name] for name in names}
        settings = dict(record["settings"])
        settings["channels"] = tuple(settings["channels"])
        return cls(settings=Recipe(**settings), **fields)


def recipe(name: str, dataset: str = "mnist", **changes: Any) -> Recipe:
    """The recipe called `name` for a data set, with some fields changed; None changes nothing."""
    _choice("recipe", name, tuple(RECIPES))
    of_dataset = FOR_DATASET.get(dataset, {}) if RECIPES[name].distorts else {}
    if dataset != "mnist":  # what is none of other classes, nobody knows
        of_dataset = {**of_dataset, "outliers": 0.0}
    given = {key: value for key, value in changes.items() if value is not None}
    return replace(RECIPES[name], **{**of_dataset, **given})


PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Criterion:
    """When an exported file says what its module says. Set before anything is measured."""

    batch_sizes: tuple[int, ...] = (1, 2, 3, 7, 64, 65, 256)  # 65: one above the packaged largest
    threads: tuple[int, ...] = (1, 2)
    # The least error that a row is granted: 8 units in the last place of float32, of the row's
    # largest output. Twice that, or twice eager PyTorch's own error, is the row's bound.
    floor: float = 2**-20
    ratio: float = 8.0  # of the largest error to eager PyTorch's, at most
    # What accuracy a variant may lose against eager float32, as a fraction.
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
        _choice("runtime", self.runtime, ("auto", "path", "wheel", "docker"))
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
    requests: int = 64  # that may be under way at once; one more is refused with 503
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
        _choice("provider", self.provider, ("cpu", "cuda", "tensorrt"))
        for name in ("top", "rows", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PipelineError(f"{name} must be at least 1, got {value}")

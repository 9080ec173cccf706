"""Recipes for the training of each network. Imports nothing heavy."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import SettingError, require_choice
from pipeline.core.paths import FOLDER
from pipeline.core.settings import POSITIVE, Limits, require_valid, setting
from pipeline.data.catalog import DEFAULT_DATASET

LAYERS = {
    "cnn": 4,
    "classic": 2,
    "record": 2,
    "net": 1,
    "strip": 5,
}  # how many channels each network takes
_OPTIMIZERS, _SCHEDULES = ("adamw", "adadelta", "sgd"), ("one-cycle", "decay")
# Limits and units of the fields.
_EPOCHS = {"limits": Limits(0, 1000, min_open=True), "unit": "EPOCHS"}
_IMAGES = {"limits": Limits(1, 10_000), "unit": "IMAGES"}
_RATE = {"limits": POSITIVE, "unit": "RATE"}
_SHARE = {"limits": Limits(0, 1, max_open=True), "unit": "FRACTION"}
_UP_TO_1 = {"limits": Limits(0, 1), "unit": "FRACTION"}
_PIXELS = {**_SHARE, "unit": "PIXELS"}
_DISTORTION = Limits(0, 2)
_SIDE = {"limits": _DISTORTION, "unit": "FRACTION"}


@dataclass(frozen=True)
class Recipe:
    """How to train: the network and everything that decides its weights but seed and data."""

    network: str = setting("cnn", "Network (see networks.py).", choices=tuple(LAYERS))
    channels: tuple[int, ...] = setting((16, 24, 32, 48), "Channels of each layer.", unit="N,N,...")
    padded: bool = setting(False, "cnn: pad, to see the image's border like its middle.")
    epochs: float = setting(1.0, "Passes over the training split, such as 0.5.", **_EPOCHS)
    batch_size: int = setting(128, "Images in each step.", **_IMAGES)
    optimizer: str = setting("adamw", "Optimizer.", choices=_OPTIMIZERS)
    lr: float = setting(0.015, "Learning rate at the peak of the schedule.", **_RATE)
    beta1: float = setting(0.9, "adamw: decay rate of the mean gradient.", **_SHARE)
    beta2: float = setting(0.99, "adamw: decay rate of the mean squared gradient.", **_SHARE)
    schedule: str = setting("one-cycle", "Schedule of the learning rate.", choices=_SCHEDULES)
    warm_up: float = setting(0.25, "one-cycle: steps in which the rate rises.", **_SHARE)
    gamma: float = setting(0.7, "decay: factor of the learning rate after each epoch.", **_UP_TO_1)
    weight_decay: float = setting(0.02, "Weight decay, times the learning rate.", **_SIDE)
    label_smoothing: float = setting(0.0, "Probability taken from the true class.", **_SHARE)
    dropout: float = setting(0.0, "cnn: dropped after convolution 2 and at the end.", **_SHARE)
    norm_momentum: float = setting(0.2, "Momentum of batch norm; more for short runs.", **_UP_TO_1)
    average: float = setting(0.0, "Decay per step of weights averaged from half-way.", **_SHARE)
    mirror: float = setting(0.0, "Probability that an image is mirrored sideways.", **_UP_TO_1)
    rotate: float = setting(0.0, "Largest rotation.", limits=_DISTORTION, unit="RADIANS")
    stretch: float = setting(0.0, "Largest stretch.", limits=_DISTORTION, unit="LOGARITHM")
    shear: float = setting(0.0, "Largest shear.", limits=_DISTORTION, unit="TANGENT")
    shift: float = setting(0.0, "Largest shift, as a part of half the image's side.", **_SIDE)
    elastic: float = setting(0.0, "Largest elastic shift, as a part of half the side.", **_SIDE)
    fade: float = setting(0.0, "Last steps, over which the distortion fades.", **_SHARE)
    stroke: float = setting(0.0, "Largest thickening or thinning on each side.", **_PIXELS)
    outliers: float = setting(0.0, "Images of no class, as a part of the others.", **_SHARE)

    def __post_init__(self) -> None:
        require_valid(self)
        layers = LAYERS[self.network]
        if len(self.channels) != layers or min(self.channels) < 1:
            needed, got = f"{layers} numbers of at least 1", ",".join(map(str, self.channels))
            raise SettingError(f"channels must be {needed} for {self.network}, got {got}")

    @property
    def distorts(self) -> bool:
        """Whether training distorts each image, differently every time."""
        moves = (self.rotate, self.stretch, self.shear, self.shift, self.elastic)
        return any((self.mirror, *moves, self.stroke))


_STANDARD = Recipe(
    channels=(16, 16, 64, 128),
    epochs=7,
    lr=0.02,
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
    fade=0.25,
    outliers=0.35,
)
_BEST: dict[str, Any] = {"channels": (24, 48, 96, 160), "epochs": 20, "lr": 0.012, "average": 0.998}
RECIPES = {
    "quick": Recipe(epochs=0.7, batch_size=192, lr=0.022, label_smoothing=0.1),
    "standard": _STANDARD,
    # Takes minutes, for a little more accuracy: `make best`.
    "best": replace(_STANDARD, **_BEST, elastic=0.08, fade=0.0, outliers=0.0),
    # The classic MNIST example: two convolutions, dropout, Adadelta. The baseline.
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
    # Reads numbers: trained on strips that are made of single digits.
    "number": Recipe(
        network="strip",
        channels=(16, 32, 64, 112, 128),
        epochs=4.5,
        batch_size=64,
        lr=0.006,
        warm_up=0.1,
        weight_decay=0.02,
        norm_momentum=0.1,
        average=0.998,
        rotate=0.1,
        stretch=0.08,
        shear=0.1,
        elastic=0.04,
        stroke=0.4,
        fade=0.25,
        outliers=0.24,
    ),
}
RECIPES["number-quick"] = replace(RECIPES["number"], epochs=1.75)
DEFAULT_RECIPE = "standard"
STRIP_DATASET = "numbers"  # the only data set for a network over strips, and for no other network
_DEVICE = "Device to train on; auto is CUDA if it is available."
# Changes for other data sets to the recipes that distort images. Clothes are not handwriting: they
# neither slant nor bend, but may be mirrored, and need a wider network and a longer training.
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
    """Settings of one training run: a recipe, and what else decides its weights bit for bit."""

    recipe: str = DEFAULT_RECIPE
    settings: Recipe = RECIPES[DEFAULT_RECIPE]
    dataset: str = "mnist"
    seed: int = setting(0, "Seed of all random numbers.", limits=Limits(0, 2**31 - 1))
    device: str = setting("auto", _DEVICE, choices=("auto", "cpu", "cuda"))  # device.py decides
    compiled: bool = setting(False, "Use torch.compile: faster for long runs on a GPU.")
    init: str = setting("", "Finished run whose weights to start from: fine-tuning.", unit="RUN")
    init_sha256: str = ""  # of its weights

    def __post_init__(self) -> None:
        require_valid(self)
        if (self.settings.network == "strip") != (self.dataset == STRIP_DATASET):
            fix = f"use --recipe number with --dataset {STRIP_DATASET}, and no other"
            raise SettingError(f"recipe {self.recipe} does not train on {self.dataset}: {fix}")
        if self.settings.outliers and not _has_outliers(self.dataset):
            raise SettingError(f"{self.dataset} is trained without outliers: leave out --outliers")

    @classmethod
    def of(cls, name: str, dataset: str = "", seed: int = 0, **changes: Any) -> "TrainConfig":
        """Return the config for the recipe called `name`, with some of its fields changed."""
        dataset = dataset or default_dataset(name)
        return cls(name, make_recipe(name, dataset, **changes), dataset, seed)

    def record(self) -> dict[str, Any]:
        """Return this config as JSON-ready values."""
        record = {key: value for key, value in asdict(self).items() if value != ""}
        settings = record["settings"]
        # 7 is written as 7.0, as it is read: the files of weights have this record.
        settings |= {f.name: float(settings[f.name]) for f in fields(Recipe) if f.type is float}
        settings["channels"] = list(self.settings.channels)
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "TrainConfig":
        """Return the config that `record` describes; raise ValueError if it is not valid."""
        import msgspec  # slow to import, and --help has no use for it

        return msgspec.convert(record, cls)


def _has_outliers(dataset: str) -> bool:
    """Return whether there are outliers for the classes of the data set."""
    return dataset in ("mnist", STRIP_DATASET) or FOLDER in dataset


def default_dataset(recipe: str) -> str:
    """Return the data set that the recipe trains on unless another one is named."""
    return STRIP_DATASET if RECIPES[recipe].network == "strip" else DEFAULT_DATASET


def make_recipe(name: str, dataset: str = "mnist", **changes: Any) -> Recipe:
    """Return the recipe called `name` for a data set, with some fields changed.

    A change to None is ignored. Raises PipelineError when there is no such recipe.
    """
    require_choice("recipe", name, tuple(RECIPES))
    defaults = FOR_DATASET.get(dataset, {}) if RECIPES[name].distorts else {}
    if not _has_outliers(dataset):
        defaults = {**defaults, "outliers": 0.0}
    given = {key: value for key, value in changes.items() if value is not None}
    return replace(RECIPES[name], **{**defaults, **given})


FINE_EPOCHS, FINE_RATE = 2.0, 0.25  # fine-tuning: epochs at most, part of the learning rate


def tune_recipe(start: Recipe, dataset: str, **changes: Any) -> Recipe:
    """Return the recipe to fine-tune a network that was trained by the recipe `start`.

    It has a quarter of its learning rate, at most 2 epochs, and some fields changed; a change to
    None is ignored. Raises PipelineError if the network would be another one.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    lr, epochs = FINE_RATE * start.lr, min(FINE_EPOCHS, start.epochs)
    outliers = start.outliers if _has_outliers(dataset) else 0.0
    tuned = replace(start, **{"lr": lr, "epochs": epochs, "outliers": outliers, **given})
    for field in ("network", "channels", "padded"):
        wanted, trained = getattr(tuned, field), getattr(start, field)
        if wanted != trained:
            wrong = f"--init starts from a network with {field} {trained}, not {wanted}"
            raise SettingError(f"{wrong}: leave out --{field}, or train without --init")
    return tuned


MIN_STEPS = 400  # steps of a training on few pictures


def choose_epochs(recipe: Recipe, dataset: str, folder: Path) -> float:
    """Return the recipe's epochs, or more for a small folder of pictures: at least 400 steps."""
    if not dataset.startswith(FOLDER):
        return recipe.epochs
    from pipeline.data.splits import find_dataset  # loads numpy, which --help has no use for

    pictures = find_dataset(dataset, folder)
    images = pictures.files[1].size - 8 - pictures.validation  # an IDX header has 8 bytes
    steps = images // min(recipe.batch_size, images)  # in an epoch
    return max(recipe.epochs, float(math.ceil(MIN_STEPS / steps)))

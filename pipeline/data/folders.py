"""Import of a folder of pictures, with a subfolder for each class, as a data set in the cache.

The SHA-256 of a picture decides its split: adding a picture leaves the others in their splits, and
copies of one picture never end up in two splits.
"""

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.files import locked, read_json, sha256
from pipeline.core.paths import FOLDER, JOINED
from pipeline.core.signature import IMAGES, MNIST_CLASSES, is_label, pictures_of
from pipeline.core.text import Lines
from pipeline.data.catalog import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS
from pipeline.data.splits import RECORD, Report, is_intact, record_dataset
from pipeline.images.read import LARGE, MAX_FILE_BYTES, prepare_picture

# Shape letters: N images.

_SUFFIXES = "png jpg jpeg webp bmp gif tif tiff ppm pgm pbm pnm"
SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
TEST_SHARE = VALIDATION_SHARE = 0.15  # of a class's pictures; the others are for training
MAX_CLASSES = 256  # a label is one byte
SHOWN = 10  # problems that a message lists at most
SPLITS = ("train", "validation", "test")


# The index of a picture's class, and the name of its file.
Picture = tuple[int, str]


def _require_none(folder: Path, problems: Iterable[str], *fixes: str) -> None:
    """Raise PipelineError with the first problems of the folder, and their number, if any."""
    if problems := list(problems):
        shown = [f"  {problem}" for problem in problems[:SHOWN]]
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        title = f"{folder} is not a data set yet. Fix this and fetch again:"
        rule = "It must have a folder of pictures for each class; nothing was written"
        raise PipelineError(Lines(title, *shown, *more, *fixes, rule))


def import_folder(
    dataset: str,
    cache: Path,
    report: Report = lambda line: None,
    update: Report = lambda line: None,
    skip_unreadable: bool = False,
) -> Path:
    """Import the pictures of the data set `folder:PATH` into `cache` as four IDX files; return it.

    For `mnist+folder:PATH`, the classes are MNIST's, and the folder may lack some of them. Writes
    nothing when these pictures were imported before. Raises PipelineError that lists the
    problems of the folder; with `skip_unreadable`, pictures that cannot be read, or show nothing,
    are reported and left out. Progress goes to `update`, steps go to `report`.
    """
    folder = Path(dataset.partition(FOLDER)[2])
    classes, pictures = _list_pictures(dataset, report)
    names = [f"{classes[label]}/{name}" for label, name in pictures]
    labels = np.array([label for label, _ in pictures], np.uint8)
    digests, unreadable = _hash_pictures(folder, names, labels, update)
    state = hashlib.sha256(repr((classes, pictures)).encode() + b"".join(digests)).hexdigest()
    if _is_cached(dataset, cache, state, report):
        report(f"{folder} is unchanged: {cache} has its pictures")
        return cache
    images = _prepare_images(dataset, folder, names, unreadable, update)
    if unreadable:
        if not skip_unreadable:
            fix = "Or leave these pictures out with 'pipeline data fetch --skip-unreadable'"
            _require_none(folder, unreadable.values(), fix)
        report(Lines(f"skipped {len(unreadable)} pictures of {folder}:", *unreadable.values()))
    used = [place for place in range(len(names)) if place not in unreadable]
    images, labels, digests = images[used], labels[used], [digests[place] for place in used]
    parts = _assign_splits(dataset, classes, labels, digests)
    order = np.argsort(parts, kind="stable")  # train, validation, test
    images, labels = images[order], labels[order]
    counts = [int(np.sum(parts == part)) for part in range(len(SPLITS))]
    end = counts[0] + counts[1]
    arrays = {TRAIN_IMAGES: images[:end], TRAIN_LABELS: labels[:end]}
    arrays |= {TEST_IMAGES: images[end:], TEST_LABELS: labels[end:]}
    details = {
        "pictures_sha256": state,
        "counts": dict(zip(SPLITS, counts, strict=True)),
        "split": "by the SHA-256 of each picture, in each class about 70/15/15",
        "skipped": [names[place] for place in sorted(unreadable)],
    }
    with locked(cache / ".lock"):
        record_dataset(cache, dataset, classes, arrays, counts[1], details)
    sizes = ", ".join(f"{count:,} {name}" for name, count in zip(SPLITS, counts, strict=True))
    report(f"imported {len(used):,} pictures of {len(classes)} classes from {folder}: {sizes}")
    return cache


def _is_cached(dataset: str, cache: Path, state: str, report: Report) -> bool:
    """Return whether the cache holds these pictures; raise PipelineError if another folder's."""
    if not (cache / RECORD).exists():
        return False
    record = read_json(cache / RECORD, f"remove {cache / RECORD} and fetch again")
    if (source := record.get("source")) != dataset:
        fix = f"rename one of the two folders, or remove {cache}"
        raise PipelineError(f"{cache} holds {source}, a folder of the same name: {fix}")
    if record.get("pictures_sha256") != state:
        report(f"the pictures changed since they were imported into {cache}: importing them again")
        return False
    return is_intact(dataset, cache, report)


def _list_pictures(dataset: str, report: Report) -> tuple[tuple[str, ...], list[Picture]]:
    """Return the sorted classes of a folder, and its pictures sorted by class and file name.

    The classes are MNIST's if the folder is joined with it: another name there is a mistake, since
    training on MNIST shows letters and signs as images of no class. Raises PipelineError that lists
    the problems of the folder.
    """
    folder, is_joined = Path(dataset.partition(FOLDER)[2]), dataset.startswith(JOINED)
    if not folder.is_dir():
        fix = "name a folder that has a folder of pictures for each class"
        raise PipelineError(f"{folder} is not a folder: {fix}")
    problems: list[str] = []
    ignored: list[str] = []
    pictures: list[Picture] = []
    entries = _list_visible(folder)
    names = tuple(path.name for path in entries if path.is_dir())
    classes = MNIST_CLASSES if is_joined else names
    for path in entries:
        if not path.is_dir() and path.suffix.lower() in SUFFIXES:
            problems.append(f"{path.name} is in no folder of a class: move it into one")
        elif not path.is_dir():
            ignored.append(path.name)
    if not (least := 2 - is_joined) <= len(names) <= MAX_CLASSES:
        shown = f"there are {len(names)} ({', '.join(names[:SHOWN])})"
        problems.append(f"{least} to {MAX_CLASSES} folders of classes are needed, {shown}")
    for name in names:
        if name not in classes:
            fix = "rename the folder, or train on it alone (--dataset folder:PATH)"
            problems.append(f"{name!r} is not one of MNIST's classes, 0 to 9: {fix}")
            continue
        if not is_label(name):
            problems.append(f"{name!r} has characters that no label can have: rename the folder")
        before = len(pictures)
        for path in _list_visible(folder / name):
            if path.is_dir():
                problems.append(f"{name}/{path.name} is a folder in a class: move its pictures up")
            elif path.suffix.lower() in SUFFIXES:
                pictures.append((classes.index(name), path.name))
            else:
                ignored.append(f"{name}/{path.name}")
        if len(pictures) == before:
            problems.append(f"{name} has no picture ({', '.join(sorted(SUFFIXES))})")
    if ignored:
        shown = ", ".join(ignored[:SHOWN]) + (", ..." if len(ignored) > SHOWN else "")
        report(f"ignored {len(ignored)} files that are not pictures by their names: {shown}")
    _require_none(folder, problems)
    return classes, pictures


def _list_visible(folder: Path) -> list[Path]:
    """Return the entries of a folder that are not hidden, sorted by name."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _hash_pictures(
    folder: Path, names: list[str], labels: np.ndarray, update: Report
) -> tuple[list[bytes], dict[int, str]]:
    """Return the SHA-256 of each picture's bytes, and why some, by their place, cannot be read.

    Raises PipelineError for a picture in two classes.
    """
    problems: list[str] = []
    unreadable: dict[int, str] = {}
    first: dict[bytes, int] = {}
    digests = []
    clock = time.monotonic()
    for place, name in enumerate(names):
        try:
            is_large = (folder / name).stat().st_size > MAX_FILE_BYTES
            digest = b"" if is_large else bytes.fromhex(sha256(folder / name))
        except OSError as error:
            is_large, digest = False, b""
            unreadable[place] = f"{name} cannot be read ({error.strerror})"
        if is_large:
            unreadable[place] = LARGE.format(name=folder / name, allowed=MAX_FILE_BYTES)
        digests.append(digest)
        if not digest:
            continue
        other = first.setdefault(digest, place)
        if labels[other] != labels[place]:
            both = f"{names[other]} and {name}"
            problems.append(f"{both} are the same picture in two classes: remove one")
        update(f"reading {folder}: {_format_progress(place, len(names), clock)}")
    _require_none(folder, problems)
    return digests, unreadable


def _format_progress(done: int, count: int, clock: float) -> str:
    left = (time.monotonic() - clock) / (done + 1) * (count - done - 1)
    return f"{done + 1:,} of {count:,} pictures, {left:.0f} s left"


def _assign_splits(
    dataset: str, classes: tuple[str, ...], labels: np.ndarray, digests: list[bytes]
) -> np.ndarray:
    """Return the index of each picture's split in SPLITS, uint8 (N,).

    A digest is a number, uniform between 0 and 2^256: in each class the lowest are for test, the
    next for validation, at least one for each split. Raises PipelineError for classes with fewer
    than 3 different pictures; if the folder is joined with MNIST, these are all for training.
    """
    problems: list[str] = []
    parts: dict[bytes, int] = {}
    for label, name in enumerate(classes):
        distinct = sorted({digests[place] for place in np.flatnonzero(labels == label)})
        if len(distinct) < len(SPLITS):
            if not dataset.startswith(JOINED):
                problems.append(f"{name} needs 3 different pictures, it has {len(distinct)}")
            parts |= dict.fromkeys(distinct, 0)
            continue
        chances = [int.from_bytes(digest[:8], "big") / 2**64 for digest in distinct]
        tests = sum(chance < TEST_SHARE for chance in chances)
        tests = min(max(1, tests), len(distinct) - 2)
        held_out = sum(chance < TEST_SHARE + VALIDATION_SHARE for chance in chances)
        held_out = min(max(tests + 1, held_out), len(distinct) - 1)
        for place, digest in enumerate(distinct):
            parts[digest] = 2 if place < tests else 1 if place < held_out else 0
    _require_none(Path(dataset.partition(FOLDER)[2]), problems)
    return np.array([parts[digest] for digest in digests], np.uint8)


def _prepare_images(
    dataset: str, folder: Path, names: list[str], unreadable: dict[int, str], update: Report
) -> np.ndarray:
    """Prepare the pictures as a client does, uint8 (N, 28, 28).

    Those that cannot be read are 0, and the reason is added to `unreadable`.
    """
    images = np.zeros((len(names), *IMAGES.shape[1:]), np.uint8)
    clock = time.monotonic()
    for place, name in enumerate(names):
        try:
            prepared = prepare_picture(folder / name, pictures=pictures_of(dataset))
            images[place] = prepared.image[0]
        except PipelineError as error:
            unreadable[place] = str(error)
        update(f"importing {folder}: {_format_progress(place, len(names), clock)}")
    return images

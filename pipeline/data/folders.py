"""Import of a folder of pictures, with a subfolder for each class, as a data set in the cache.

The SHA-256 of a picture decides its split: adding a picture leaves the others in their splits, and
copies of one picture never end up in two splits.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.files import locked, read_json, sha256
from pipeline.core.paths import FOLDER
from pipeline.core.signature import IMAGES, is_label, pictures_of
from pipeline.core.text import Lines
from pipeline.data.catalog import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS
from pipeline.data.splits import RECORD, record_dataset, verify
from pipeline.images.read import LARGE, MAX_FILE_BYTES, prepare_picture

# Shape letters: N images.

_SUFFIXES = "png jpg jpeg webp bmp gif tif tiff ppm pgm pbm pnm"
SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
TEST_SHARE = VALIDATION_SHARE = 0.15  # of a class's pictures; the others are for training
MAX_CLASSES = 256  # a label is one byte
SHOWN = 10  # problems that a message lists at most
SPLITS = ("train", "validation", "test")

Report = Callable[[str], None]


@dataclass
class _Problems:
    """The problems of a folder: the first few of them, and their count."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, problem: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.shown.append(problem)

    def require_none(self, folder: Path) -> None:
        if not self.count:
            return
        more = [f"and {self.count - SHOWN} more"] if self.count > SHOWN else []
        raise PipelineError(
            Lines(
                f"{folder} is no data set yet, fix this and fetch again:",
                *(f"  {problem}" for problem in (*self.shown, *more)),
                "It must have a folder for each class, with pictures in it; nothing was written",
            )
        )


def import_folder(
    dataset: str,
    cache: Path,
    report: Report = lambda line: None,
    update: Report = lambda line: None,
) -> Path:
    """Import the pictures of the data set `folder:PATH` into `cache` as four IDX files; return it.

    Writes nothing when these pictures were imported before. Raises PipelineError that lists the
    problems of the folder. Progress goes to `update`, steps go to `report`.
    """
    folder = Path(dataset.removeprefix(FOLDER))
    classes, pictures = _listed(folder, report)
    digests = _digests(folder, classes, pictures, update)
    state = hashlib.sha256(repr((classes, pictures)).encode() + b"".join(digests)).hexdigest()
    if _is_cached(dataset, cache, state, report):
        report(f"{folder} is as it was when {cache} was made of it: {len(pictures):,} pictures")
        return cache
    parts = _parts(folder, classes, pictures, digests)
    order = np.argsort(parts, kind="stable")  # train, validation, test
    images = _images(dataset, [pictures[i] for i in order], folder, classes, update)
    labels = np.array([pictures[i][0] for i in order], np.uint8)
    counts = [int(np.sum(parts == part)) for part in range(len(SPLITS))]
    end = counts[0] + counts[1]
    arrays = {TRAIN_IMAGES: images[:end], TRAIN_LABELS: labels[:end]}
    arrays |= {TEST_IMAGES: images[end:], TEST_LABELS: labels[end:]}
    details = {
        "pictures_sha256": state,
        "counts": dict(zip(SPLITS, counts, strict=True)),
        "split": "by the SHA-256 of each picture, in each class about 70/15/15",
    }
    with locked(cache / ".lock"):
        record_dataset(cache, dataset, classes, arrays, counts[1], details)
    said = ", ".join(f"{count:,} {name}" for name, count in zip(SPLITS, counts, strict=True))
    report(f"{len(pictures):,} pictures of {len(classes)} classes from {folder}: {said}")
    return cache


def _is_cached(dataset: str, cache: Path, state: str, report: Report) -> bool:
    """Return whether the cache holds these pictures; raise PipelineError if another folder's."""
    if not (cache / RECORD).exists():
        return False
    record = read_json(cache / RECORD, f"remove {cache / RECORD} and fetch again")
    if record.get("source") != dataset:
        raise PipelineError(
            f"{cache} holds the pictures of {record.get('source')}, which is called alike: rename "
            f"one of the two folders, or remove {cache}"
        )
    if record.get("pictures_sha256") != state:
        report(f"the pictures changed since {cache} was made of them: importing them anew")
        return False
    try:
        verify(dataset, cache)
    except PipelineError as error:
        report(str(error))
        return False
    return True


# The index of a picture's class, and the name of its file.
Picture = tuple[int, str]


def _listed(folder: Path, report: Report) -> tuple[tuple[str, ...], list[Picture]]:
    """Return the sorted classes of a folder, and its pictures sorted by class and file name.

    Raises PipelineError that lists the problems of the folder.
    """
    if not folder.is_dir():
        raise PipelineError(
            f"no folder {folder}: give the folder that has a folder of pictures for each class"
        )
    problems = _Problems()
    left_out: list[str] = []
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    classes = tuple(path.name for path in visible if path.is_dir())
    for path in visible:
        if not path.is_dir() and path.suffix.lower() in SUFFIXES:
            problems.add(f"{path.name} lies beside the classes: move it into its class's folder")
        elif not path.is_dir():
            left_out.append(path.name)
    if not 2 <= len(classes) <= MAX_CLASSES:
        found = f"there are {len(classes)} ({', '.join(classes[:SHOWN])})" if classes else "none"
        problems.add(f"2 to {MAX_CLASSES} folders of classes are needed, {found}")
    pictures: list[Picture] = []
    for label, name in enumerate(classes):
        if not is_label(name):
            problems.add(f"{name!r} has characters that no label can have: rename the folder")
        names = _names(folder / name, problems, left_out)
        if not names:
            problems.add(f"{name} has no picture ({', '.join(sorted(SUFFIXES))})")
        pictures += [(label, file) for file in names]
    if left_out:
        shown = ", ".join(left_out[:SHOWN]) + (", ..." if len(left_out) > SHOWN else "")
        report(f"left out, no pictures by their names: {len(left_out)} files ({shown})")
    problems.require_none(folder)
    return classes, pictures


def _names(folder: Path, problems: _Problems, left_out: list[str]) -> list[str]:
    """Return the sorted names of the pictures of a class."""
    names = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            problems.add(
                f"{folder.name}/{path.name} is a folder in a class: move its pictures up, or it out"
            )
        elif path.suffix.lower() in SUFFIXES:
            names.append(path.name)
        else:
            left_out.append(f"{folder.name}/{path.name}")
    return sorted(names)


def _digests(
    folder: Path, classes: tuple[str, ...], pictures: list[Picture], update: Report
) -> list[bytes]:
    """Return the SHA-256 of each picture's bytes; raise PipelineError for one in two classes."""
    problems = _Problems()
    first: dict[bytes, Picture] = {}
    digests = []
    clock = time.monotonic()
    for done, (label, name) in enumerate(pictures):
        path = folder / classes[label] / name
        try:
            large = path.stat().st_size > MAX_FILE_BYTES
            digest = b"" if large else bytes.fromhex(sha256(path))
        except OSError as error:
            problems.add(f"{classes[label]}/{name} cannot be read ({error.strerror})")
            continue
        if large:
            problems.add(LARGE.format(name=path, allowed=MAX_FILE_BYTES))
            continue
        digests.append(digest)
        other, other_name = first.setdefault(digest, (label, name))
        if other != label:
            problems.add(
                f"{classes[other]}/{other_name} and {classes[label]}/{name} are the same picture "
                "in two classes: remove one"
            )
        update(f"reading {folder}: {_progress(done, len(pictures), clock)}")
    problems.require_none(folder)
    return digests


def _progress(done: int, count: int, clock: float) -> str:
    left = (time.monotonic() - clock) / (done + 1) * (count - done - 1)
    return f"{done + 1:,} of {count:,} pictures, {left:.0f} s left"


def _parts(
    folder: Path, classes: tuple[str, ...], pictures: list[Picture], digests: list[bytes]
) -> np.ndarray:
    """Return the index of each picture's split in SPLITS, uint8 (N,).

    Each class has at least one picture in each split. Raises PipelineError for classes with fewer
    than 3 different pictures.
    """
    problems = _Problems()
    of_class: list[set[bytes]] = [set() for _ in classes]
    for (label, _), digest in zip(pictures, digests, strict=True):
        of_class[label].add(digest)
    part: dict[bytes, int] = {}
    counts = Counter(label for label, _ in pictures)
    for label, distinct in enumerate(of_class):
        if len(distinct) < len(SPLITS):
            copies = counts[label] - len(distinct)
            problems.add(
                f"{classes[label]} has {len(distinct)} different picture"
                f"{'s' * (len(distinct) != 1)}{f' and {copies} copies' if copies else ''}: "
                "3 are the least, one to train, one to validate, one to test"
            )
        else:
            part |= _split(sorted(distinct))
    problems.require_none(folder)
    return np.array([part[digest] for digest in digests], np.uint8)


def _split(digests: list[bytes]) -> dict[bytes, int]:
    """Return the index of the split of each sorted digest.

    A digest is a number, uniform between 0 and 2^256: the lowest are for test, the next for
    validation.
    """
    chance = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
    tests = sum(value < TEST_SHARE for value in chance)
    tests = min(max(1, tests), len(digests) - 2)
    held = sum(value < TEST_SHARE + VALIDATION_SHARE for value in chance)
    held = min(max(tests + 1, held), len(digests) - 1)
    return {
        digest: 2 if place < tests else 1 if place < held else 0
        for place, digest in enumerate(digests)
    }


def _images(
    dataset: str, pictures: list[Picture], folder: Path, classes: tuple[str, ...], update: Report
) -> np.ndarray:
    """Prepare the pictures as a client does, uint8 (N, 28, 28).

    Raises PipelineError that lists the pictures that cannot be read.
    """
    problems = _Problems()
    images = np.zeros((len(pictures), *IMAGES.shape[1:]), np.uint8)
    clock = time.monotonic()
    for place, (label, name) in enumerate(pictures):
        path = folder / classes[label] / name
        try:
            images[place] = prepare_picture(path, pictures=pictures_of(dataset))[0]
        except PipelineError as error:
            problems.add(str(error))
            continue
        update(f"importing {folder}: {_progress(place, len(pictures), clock)}")
    problems.require_none(folder)
    return images

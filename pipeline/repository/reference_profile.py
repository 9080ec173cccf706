"""The reference profile: counts of a model's answers to the validation split, to detect drift."""

# Shape letters: N images, K classes.

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.core.evaluate import read_answers
from pipeline.core.files import SCHEMA, read_record
from pipeline.core.signature import TEXT_LENGTH

REMAKE = "run 'pipeline validate', then 'pipeline package'"
# Most answers are nearly certain: above 0.98 the bins are of equal width in log(1 - probability).
CONFIDENCE_EDGES = tuple(
    round(edge, 7)
    for edge in (*np.arange(0, 0.98, 0.01), *(1 - 10 ** np.arange(-1.7, -6.05, -0.1)), 1.0)
)
LENGTHS = tuple(f"{count} digits" for count in range(TEXT_LENGTH + 1))  # of strings
INK_EDGES = tuple(round(edge, 3) for edge in np.arange(0, 1.0005, 0.005))


@dataclass(frozen=True)
class ReferenceProfile:
    """Counts of a model's answers to normal images, with which later answers are compared."""

    name: str
    precision: str
    sha256: str  # of the model's file
    images_from: str  # the split, or another source of the images
    images: int
    classes: tuple[str, ...]  # or lengths of strings
    class_counts: tuple[int, ...]  # of the answers, not of the labels
    confidence_edges: tuple[float, ...]  # of the bins; a bin includes its lower edge
    confidence_counts: tuple[int, ...]
    ink_edges: tuple[float, ...]
    ink_counts: tuple[int, ...] | None  # None if the model's images are not uint8 pixels
    min_probability: float | None  # 0 to 1; an answer below it is not sure
    unsure: int | None

    def group_of(self, label: str) -> str:
        """Return the group that an answer is counted in: its class, or a string's length."""
        if self.classes != LENGTHS:
            return label
        return LENGTHS[min(len(label), len(LENGTHS) - 1)]

    def __post_init__(self) -> None:
        """Raise ValueError unless the counts match the bins, the classes and the images."""
        for counts, wanted in (
            (self.class_counts, len(self.classes)),
            (self.confidence_counts, len(self.confidence_edges) - 1),
            (self.ink_counts, len(self.ink_edges) - 1),
        ):
            if counts is not None and (len(counts), sum(counts)) != (wanted, self.images):
                raise ValueError(f"{len(counts)} counts of {sum(counts)} images")
        if self.images < 1:
            raise ValueError("it counts no images")


def build_profile(
    outputs: np.ndarray,
    images: np.ndarray,
    kind: str,
    *,
    name: str,
    precision: str,
    sha256: str,
    images_from: str,
    classes: tuple[str, ...],
    min_probability: float | None,
) -> ReferenceProfile:
    """Return the reference profile of outputs (N, ...), of the given kind, for images (N, ...)."""
    confidence, ink = confidence_of(outputs, kind), ink_of(images)
    names, answers = group_answers(outputs, classes)
    return ReferenceProfile(
        name=name,
        precision=precision,
        sha256=sha256,
        images_from=images_from,
        images=len(images),
        classes=names,
        class_counts=tuple(map(int, np.bincount(answers, minlength=len(names)))),
        confidence_edges=CONFIDENCE_EDGES,
        confidence_counts=count_bins(confidence, CONFIDENCE_EDGES),
        ink_edges=INK_EDGES,
        ink_counts=None if ink is None else count_bins(ink, INK_EDGES),
        min_probability=min_probability,
        unsure=None if min_probability is None else int((confidence < min_probability).sum()),
    )


def group_answers(
    outputs: np.ndarray, classes: tuple[str, ...]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the groups that answers are counted in, and that of each row (N, ...), int64 (N,).

    A group is a class, or a length of a string.
    """
    answers, _ = read_answers(outputs)
    if answers.dtype.kind != "U":
        return classes, answers
    return LENGTHS, np.minimum(np.char.str_len(answers), len(LENGTHS) - 1)


def confidence_of(outputs: np.ndarray, kind: str) -> np.ndarray:
    """Return the probability (0 to 1) of the answer to each row (N, ...), float64 (N,)."""
    if outputs.ndim == 3:
        return np.asarray(np.exp(read_answers(outputs)[1]))
    values = outputs.astype(np.float64)
    largest: np.ndarray = values.max(axis=1)
    if kind == "logits":
        largest = -np.log(np.exp(values - largest[:, np.newaxis]).sum(axis=1))
    return largest if kind == "probabilities" else np.exp(largest)


def ink_of(images: np.ndarray) -> np.ndarray | None:
    """Return the ink mass (0 to 1) of each image: its mean pixel over 255, float64 (N,).

    Returns None for images that are not uint8, because their scale is unknown.
    """
    if images.dtype != np.uint8:
        return None
    return np.asarray(images.reshape(len(images), -1).mean(axis=1) / 255)


def count_bins(values: np.ndarray, edges: tuple[float, ...]) -> tuple[int, ...]:
    """Count the values (N,) in each bin; values outside the edges go to the outermost bins."""
    inside = np.clip(values, edges[0], edges[-1])
    return tuple(map(int, np.histogram(inside, edges)[0]))


def pack_profile(profile: ReferenceProfile) -> bytes:
    """Return the profile as the bytes of a JSON file."""
    text = json.dumps({"schema": SCHEMA, **asdict(profile)}, allow_nan=False)
    return (text + "\n").encode()


def read_profile(path: Path) -> ReferenceProfile:
    """Read a profile; raise PipelineError if it is missing, CorruptError if it is not valid."""
    return read_record(path, ReferenceProfile, REMAKE)

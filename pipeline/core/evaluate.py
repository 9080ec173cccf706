"""How good a predictor is, and how far two lie apart. Needs numpy only."""

# Shape letters: N images, K classes.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.core.errors import CheckFailedError

REFUSED = 0.0075  # of the validation images, where the threshold of being sure is fitted
# uint8 (B, 1, 28, 28) -> float32 (B, K): PyTorch, ONNX Runtime and a Triton client are all one.
Predictor = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metrics:
    """What a predictor scored against labels."""

    images: int
    accuracy: float  # fraction of images, 0 to 1
    loss: float  # mean negative log-likelihood, in nats


class Judgement(NamedTuple):
    """How answers to images lie against a reference's, one entry an image."""

    errors: np.ndarray  # float64 (N,): the largest difference of any output; infinite: not finite
    bounds: np.ndarray  # float64 (N,): how large it may be
    classes: np.ndarray  # int64 (N,): the likeliest class of the answer
    expected: np.ndarray  # int64 (N,): that of the reference

    @property
    def is_beyond(self) -> np.ndarray:
        """Whether each answer lies beyond its bound, bool (N,)."""
        return np.asarray(self.errors > self.bounds)

    @property
    def is_changed(self) -> np.ndarray:
        """Whether each answer is of another class than the reference's, bool (N,)."""
        return np.asarray(self.classes != self.expected)

    @property
    def ratios(self) -> np.ndarray:
        """The share of its bound that each error takes, float64 (N,): 1 at most where it passes."""
        return np.asarray(self.errors / self.bounds)

    def problems(self, images: Sequence[int] | np.ndarray) -> list[str]:
        """Say what is wrong with the answers to `images` (N,), which their bounds tell; or nothing.

        No class may change, and no answer may lie beyond its bound.
        """
        changed, beyond = int(self.is_changed.sum()), int(self.is_beyond.sum())
        problems = [f"{changed} of {len(images)} answers are of another class"] if changed else []
        if beyond:
            worst = int(self.ratios.argmax())
            problems.append(
                f"{beyond} of {len(images)} answers are too far off: image {images[worst]} differs "
                f"by {self.errors[worst]:.3g}, {self.bounds[worst]:.3g} is allowed"
            )
        return problems


@dataclass(frozen=True)
class Bin:
    """The images about which a predictor was about equally sure."""

    images: int
    confidence: float  # mean probability of the likeliest class, 0 to 1
    accuracy: float  # fraction of images, 0 to 1


@dataclass(frozen=True)
class ClassScore:
    """How well one class is told from the others; None where there is nothing to count."""

    support: int  # images of the class
    precision: float | None  # of those said to be of it, the fraction that are
    recall: float | None  # of those that are of it, the fraction said to be
    f1: float | None  # harmonic mean of the two


def predict(predictor: Predictor, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Log-probabilities (N, K) of `images` (N, ...), asked for in batches of `batch_size`."""
    starts = range(0, len(images), batch_size)
    return np.concatenate([predictor(images[start : start + batch_size]) for start in starts])


def score(outputs: np.ndarray, labels: np.ndarray) -> Metrics:
    """Metrics of log-probabilities (N, K) against labels (N,)."""
    correct = outputs.argmax(axis=1) == labels
    likelihood = outputs[np.arange(len(labels)), labels]
    return Metrics(len(labels), float(correct.mean()), float(-likelihood.mean(dtype=np.float64)))


def evaluate(
    predictor: Predictor, images: np.ndarray, labels: np.ndarray, batch_size: int = 256
) -> Metrics:
    """Metrics of `predictor` on images (N, ...) with labels (N,)."""
    return score(predict(predictor, images, batch_size), labels)


def tempered(outputs: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities (N, K) as the same network gives them at another temperature.

    Guo et al. 2017, arXiv:1706.04599.
    """
    scaled: np.ndarray = outputs.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return scaled


def fit_temperature(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The temperature, 1/4 to 4, at which log-probabilities (N, K) fit labels (N,) best.

    Least negative log-likelihood, found by golden section on its logarithm.
    """
    low, high = np.log(0.25), np.log(4.0)
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(40):
        first, second = high - golden * (high - low), low + golden * (high - low)
        losses = [score(tempered(outputs, np.exp(at)), labels).loss for at in (first, second)]
        low, high = (low, second) if losses[0] < losses[1] else (first, high)
    return float(np.exp((low + high) / 2))


def fit_min_probability(outputs: np.ndarray, share: float = REFUSED) -> float:
    """The probability that the likeliest class of all but a `share` of rows (N, K) reaches.

    Rounded down, so that whoever is at it is not below it.
    """
    likeliest = np.sort(np.exp(outputs.max(axis=1).astype(np.float64)))
    return math.floor(float(likeliest[int(share * len(likeliest))]) * 1e6) / 1e6


def is_refused(outputs: np.ndarray, min_probability: float) -> np.ndarray:
    """Whether the likeliest class of each row (N, K) is less probable than that, bool (N,)."""
    below: np.ndarray = np.exp(outputs.max(axis=1)) < min_probability
    return below


def calibration_error(outputs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of log-probabilities (N, K): 0 when confidence is accuracy.

    Images are binned by the probability of their likeliest class (Naeini et al. 2015).
    """
    filled = reliability(outputs, labels, bins)
    return sum(abs(b.accuracy - b.confidence) * b.images for b in filled) / len(labels)


def reliability(outputs: np.ndarray, labels: np.ndarray, bins: int = 15) -> tuple[Bin, ...]:
    """How sure log-probabilities (N, K) are and how often right, in bins of equal width.

    Bins without images are left out.
    """
    confidence = np.exp(outputs.max(axis=1))
    correct = outputs.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    members = [bin_of == index for index in range(bins)]
    return tuple(
        Bin(int(here.sum()), float(confidence[here].mean()), float(correct[here].mean()))
        for here in members
        if here.any()
    )


def confusion(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many images of each class (row) were said to be of each class (column), int64 (K, K)."""
    classes = outputs.shape[1]
    cells = labels * classes + outputs.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def class_scores(counts: np.ndarray) -> tuple[ClassScore, ...]:
    """What each class scored, from a confusion matrix (K, K)."""
    return tuple(
        ClassScore(
            support=int(counts[index].sum()),
            precision=_ratio(counts[index, index], counts[:, index].sum()),
            recall=_ratio(counts[index, index], counts[index].sum()),
            f1=_ratio(2 * counts[index, index], counts[index].sum() + counts[:, index].sum()),
        )
        for index in range(len(counts))
    )


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def worst_mistakes(outputs: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Indices (at most `count`,) of the wrong answers, that with the least probable truth first."""
    likelihood = outputs[np.arange(len(labels)), labels]  # (N,)
    wrong = np.flatnonzero(outputs.argmax(axis=1) != labels)
    return wrong[np.argsort(likelihood[wrong], kind="stable")][:count]


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Where the true fraction lies with 95 % confidence, when `correct` of `images` are right.

    Wilson 1927: sound near 0 and 1 as well, where our accuracies are.
    """
    z = 1.959964  # of a normal distribution, two-sided 95 %
    share = correct / images
    centre = share + z * z / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    whole = 1 + z * z / images
    return max(0.0, (centre - half) / whole), min(1.0, (centre + half) / whole)


def margins(outputs: np.ndarray) -> np.ndarray:
    """How far the likeliest class of each row (N, K) is ahead of the next, float64 (N,)."""
    second, first = np.partition(outputs.astype(np.float64), -2, axis=1)[:, -2:].T
    ahead: np.ndarray = first - second
    return ahead


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> float:
    """How probable so uneven a split is, if two predictors were equally often right; 0 to 1.

    From whether each was right on each image, bool (N,). Exact and two-sided (McNemar 1947).
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    changes, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(changes, count) for count in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**changes))


def judge(
    reference: np.ndarray,
    outputs: np.ndarray,
    bounds: np.ndarray | float = np.inf,
    dtype: type[np.generic] = np.floating,
) -> Judgement:
    """Judge log-probabilities (N, K) against a reference's, each row by its bound (N,).

    Raises CheckFailedError when they are of another shape or not of the type `dtype`.
    """
    if outputs.shape != reference.shape or not np.issubdtype(outputs.dtype, dtype):
        raise CheckFailedError(
            f"answers {outputs.dtype} {outputs.shape} instead of {dtype.__name__} {reference.shape}"
        )
    apart = np.abs(reference.astype(np.float64) - outputs.astype(np.float64))  # (N, K)
    apart[~np.isfinite(apart)] = np.inf
    return Judgement(
        errors=apart.max(axis=1),
        bounds=np.broadcast_to(bounds, len(apart)),
        classes=outputs.argmax(axis=1),
        expected=reference.argmax(axis=1),
    )

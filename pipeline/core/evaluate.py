"""Metrics of a predictor, and the comparison of two. Needs numpy only.

A model answers a class for each image, or a string: its outputs are (N, K) or (N, T, K + 1), and
its labels int64 (N,) or str (N,).
"""

# Shape letters: N images, K classes, T steps of a string. (N, ...) are outputs of either kind.

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.core import strings
from pipeline.core.errors import CheckFailedError

REFUSED = 0.0075  # share of the validation images below the fitted minimum probability
FEWEST = math.ceil(1 / REFUSED)  # images: among fewer there is not one below it
ENOUGH = 1000  # images: fewer draw what is fitted towards a cautious value, see below
EVEN = 0.5  # the cautious minimum probability: a lower answer is more likely wrong than right
HIGHEST = 0.95  # no minimum probability is above it, however certain the model is
COLDEST, HOTTEST = 0.25, 4.0  # limits of the temperature
SPREAD = 0.5  # standard deviation of the temperature's logarithm before any image is seen
# uint8 (B, 1, 28, 28) -> float32 (B, K), or uint8 (B, 1, 28, 280) -> float32 (B, T, K + 1): eager
# PyTorch, ONNX Runtime or a Triton client.
Predictor = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metrics:
    """The scores of a predictor against labels."""

    images: int
    accuracy: float  # fraction of images, 0 to 1
    loss: float  # mean negative log-likelihood, in nats


@dataclass(frozen=True)
class Judgement:
    """The comparison of answers with a reference's, one entry per image."""

    errors: np.ndarray  # float64 (N,): largest difference of any output; inf if one is not finite
    bounds: np.ndarray  # float64 (N,): largest allowed error
    outputs: np.ndarray  # (N, ...)
    reference: np.ndarray  # (N, ...): the reference's outputs

    @cached_property
    def answers(self) -> np.ndarray:
        """The answers (N,): see `read_answers`."""
        return read_answers(self.outputs)[0]

    @cached_property
    def expected(self) -> np.ndarray:
        """The reference's answers (N,)."""
        return read_answers(self.reference)[0]

    @property
    def is_beyond(self) -> np.ndarray:
        """Whether each error exceeds its bound, bool (N,)."""
        return np.asarray(self.errors > self.bounds)

    @property
    def is_changed(self) -> np.ndarray:
        """Whether each answer is a flip: it is not the reference's, bool (N,)."""
        return np.asarray(self.answers != self.expected)

    @property
    def ratios(self) -> np.ndarray:
        """Each error divided by its bound, float64 (N,): at most 1 if the answer passes."""
        return np.asarray(self.errors / self.bounds)

    def problems(self, images: Sequence[int] | np.ndarray) -> list[str]:
        """Return what is wrong with the answers, one sentence per problem; empty if nothing.

        `images` (N,) are the images' numbers. No class may change, and no error may exceed its
        bound.
        """
        changed, beyond = int(self.is_changed.sum()), int(self.is_beyond.sum())
        problems = [f"{changed} of {len(images)} answers have another class"] if changed else []
        if beyond:
            worst = int(self.ratios.argmax())
            problems.append(
                f"{beyond} of {len(images)} answers exceed their bounds: image {images[worst]} "
                f"differs by {self.errors[worst]:.3g}, its bound is {self.bounds[worst]:.3g}"
            )
        return problems


@dataclass(frozen=True)
class Bin:
    """A confidence bin: images whose likeliest class is about equally probable."""

    images: int
    confidence: float  # mean probability of the likeliest class, 0 to 1
    accuracy: float  # fraction of images, 0 to 1


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class; None if there is nothing to count."""

    support: int  # images of the class
    precision: float | None  # fraction of the images predicted as this class that are of it
    recall: float | None  # fraction of the images of this class that are predicted as it
    f1: float | None  # harmonic mean of precision and recall


def predict(predictor: Predictor, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Return the outputs (N, ...) for `images` (N, ...), in batches of `batch_size`."""
    starts = range(0, len(images), batch_size)
    return np.concatenate([predictor(images[start : start + batch_size]) for start in starts])


def read_answers(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the answer to each image and its log-probability, (N,) and float64 (N,).

    It is the likeliest class, int64, of log-probabilities (N, K), or the likeliest string of
    (N, T, K + 1).
    """
    if outputs.ndim == 3:
        return strings.find_best(outputs)
    return outputs.argmax(axis=1), outputs.max(axis=1).astype(np.float64)


def log_likelihood(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the log-probability of each label (N,), by log-probabilities (N, ...)."""
    if outputs.ndim == 3:
        return strings.sum_alignments(outputs, labels)
    return np.asarray(outputs[np.arange(len(labels)), labels])


def score(outputs: np.ndarray, labels: np.ndarray) -> Metrics:
    """Return the metrics of log-probabilities (N, ...) against labels (N,)."""
    correct, likelihood = read_answers(outputs)[0] == labels, log_likelihood(outputs, labels)
    return Metrics(len(labels), float(correct.mean()), float(-likelihood.mean(dtype=np.float64)))


def hash_scores(scores: np.ndarray) -> str:
    """Return the SHA-256 of an exact model's scores (N, K), as int32 in order, little-endian."""
    return hashlib.sha256(scores.astype("<i4").tobytes()).hexdigest()


def find_unequal(expected: np.ndarray, scores: np.ndarray) -> str:
    """Return which rows of scores (N, K) are not the expected ones; empty if all are equal."""
    if scores.shape != expected.shape:
        return f"the scores have shape {list(scores.shape)}, not {list(expected.shape)}"
    rows = np.flatnonzero((scores != expected).any(axis=1))
    if not len(rows):
        return ""
    return f"{len(rows):,} of {len(scores):,} are not equal, the first is image {rows[0]}"


def evaluate(
    predictor: Predictor, images: np.ndarray, labels: np.ndarray, batch_size: int = 256
) -> Metrics:
    """Return the metrics of `predictor` on images (N, ...) with labels (N,)."""
    return score(predict(predictor, images, batch_size), labels)


def apply_temperature(outputs: np.ndarray, temperature: float) -> np.ndarray:
    """Return the log-probabilities (N, ...) that the same network gives at another temperature.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    scaled: np.ndarray = outputs.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    return scaled


def fit_temperature(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature, 1/4 to 4, at which log-probabilities (N, ...) best fit labels (N,).

    Minimizes the negative log-likelihood by a golden-section search on the temperature's logarithm.
    Fewer than ENOUGH images are drawn towards 1 by a normal prior: a few images, all correct, fit
    the lowest temperature best, at which every answer is certain.
    """
    pull = max(0.0, 1 / len(labels) - 1 / ENOUGH) / (2 * SPREAD**2)
    low, high = np.log(COLDEST), np.log(HOTTEST)
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(40):
        first, second = high - golden * (high - low), low + golden * (high - low)
        logs = np.array([first, second])
        scaled = [apply_temperature(outputs, t) for t in np.exp(logs)]
        fits = [-log_likelihood(each, labels).mean(dtype=np.float64) for each in scaled]
        cooler, hotter = fits + pull * logs**2
        low, high = (low, second) if cooler < hotter else (first, high)
    return float(np.exp((low + high) / 2))


def fit_min_probability(outputs: np.ndarray, share: float = REFUSED) -> float | None:
    """Return the probability that the answer reaches in all but a `share` of rows (N, ...).

    Returns None where `share` is less than one row. Below ENOUGH rows it is drawn towards EVEN, in
    proportion to those missing. It is at most HIGHEST, and rounded down, so that a row with exactly
    this probability is not below it.
    """
    count = len(outputs)
    if share * count < 1:
        return None
    likeliest = np.sort(np.exp(read_answers(outputs)[1]))
    weight = min(1.0, count / ENOUGH)
    threshold = weight * float(likeliest[int(share * count)]) + (1 - weight) * EVEN
    return math.floor(min(threshold, HIGHEST) * 1e6) / 1e6


def is_refused(outputs: np.ndarray, min_probability: float) -> np.ndarray:
    """Return whether each row's (N, ...) answer is below `min_probability`, bool (N,)."""
    return np.asarray(np.exp(read_answers(outputs)[1]) < min_probability)


def calibration_error(outputs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error of log-probabilities (N, ...).

    It is 0 if confidence equals accuracy. Images are binned by the probability of their answer
    (Naeini et al. 2015).
    """
    gaps = (abs(b.accuracy - b.confidence) * b.images for b in reliability(outputs, labels, bins))
    return sum(gaps) / len(labels)


def reliability(
    outputs: np.ndarray, labels: np.ndarray, bins: int = 15, fewest: int = 1
) -> tuple[Bin, ...]:
    """Return the confidence and accuracy of log-probabilities (N, ...), in bins of equal width.

    A bin of fewer than `fewest` images is merged with the next one below it, the lowest with the
    next above; bins without images are omitted.
    """
    answers, logs = read_answers(outputs)
    confidence, correct = np.exp(logs), answers == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    groups = [np.zeros(len(labels), bool)]  # images of each bin, the highest first
    for index in reversed(range(bins)):
        if groups[-1].sum() >= fewest:
            groups.append(bin_of == index)
        else:
            groups[-1] |= bin_of == index
    if len(groups) > 1 and groups[-1].sum() < fewest:
        lowest = groups.pop()
        groups[-1] |= lowest
    return tuple(
        Bin(int(rows.sum()), float(confidence[rows].mean()), float(correct[rows].mean()))
        for rows in reversed(groups)
    )


def confusion(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count the images of each class (row) predicted as each class (column), int64 (K, K)."""
    classes = outputs.shape[1]
    cells = labels * classes + outputs.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def class_scores(counts: np.ndarray) -> tuple[ClassScore, ...]:
    """Return each class's scores from a confusion matrix (K, K)."""
    correct, support, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return tuple(
        ClassScore(int(s), _ratio(c, p), _ratio(c, s), _ratio(2 * c, s + p))
        for c, s, p in zip(correct, support, predicted, strict=True)
    )


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def worst_mistakes(outputs: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` indices of wrong answers, the least probable label first."""
    likelihood = log_likelihood(outputs, labels)
    wrong = np.flatnonzero(read_answers(outputs)[0] != labels)
    return wrong[np.argsort(likelihood[wrong], kind="stable")][:count]


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the accuracy if `correct` of `images` are correct.

    Wilson 1927: also reliable near 0 and 1, where our accuracies are.
    """
    z = 1.959964  # quantile of the normal distribution, two-sided 95 %
    share = correct / images
    centre = share + z * z / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    whole = 1 + z * z / images
    return max(0.0, (centre - half) / whole), min(1.0, (centre + half) / whole)


def margins(outputs: np.ndarray) -> np.ndarray:
    """Return each row's margin: its highest minus its second output (N, K), float64 (N,).

    Of strings (N, T, K + 1) see `strings.find_margins`.
    """
    if outputs.ndim == 3:
        return strings.find_margins(outputs)
    second, first = np.partition(outputs.astype(np.float64), -2, axis=1)[:, -2:].T
    return np.asarray(first - second)


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> float:
    """Return the p-value, 0 to 1, of the hypothesis that two predictors are equally accurate.

    The arguments, bool (N,), say on which images each was correct. Exact and two-sided (McNemar
    1947).
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
    """Compare log-probabilities (N, ...) with a reference's, each row against its bound (N,).

    Raises CheckFailedError if their shape is not the reference's or their type is not `dtype`.
    """
    if outputs.shape != reference.shape or not np.issubdtype(outputs.dtype, dtype):
        expected = f"{dtype.__name__} {reference.shape}"
        raise CheckFailedError(f"answers are {outputs.dtype} {outputs.shape}, not {expected}")
    apart = np.abs(reference.astype(np.float64) - outputs.astype(np.float64))
    apart[~np.isfinite(apart)] = np.inf
    return Judgement(
        errors=apart.reshape(len(apart), -1).max(axis=1),
        bounds=np.broadcast_to(bounds, len(apart)),
        outputs=outputs,
        reference=reference,
    )

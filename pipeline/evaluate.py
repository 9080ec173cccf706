"""How good a predictor is, and how far two lie apart. Needs numpy only."""

# Shape letters: N images, K classes.

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# uint8 (B, 1, 28, 28) -> float32 (B, K): PyTorch, ONNX Runtime and a Triton client are all one.
Predictor = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metrics:
    """What a predictor scored against labels."""

    images: int
    accuracy: float  # fraction of images, 0 to 1
    loss: float  # mean negative log-likelihood, in nats


@dataclass(frozen=True)
class Difference:
    """How far two predictors' outputs lie apart on the same images."""

    images: int
    max_abs_diff: float  # over all outputs; infinite where one is not finite
    differing: int  # images whose most likely class differs
    worst: int  # index of the image with the largest difference


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


def calibration_error(outputs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of log-probabilities (N, K): 0 when confidence is accuracy.

    Images are binned by the probability of their likeliest class (Naeini et al. 2015).
    """
    confidence = np.exp(outputs.max(axis=1))
    correct = outputs.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        np.abs(correct[bin_of == index].sum() - confidence[bin_of == index].sum())
        for index in range(bins)
    ]
    return float(sum(gaps) / len(labels))


def difference(reference: np.ndarray, candidate: np.ndarray) -> Difference:
    """How far two arrays of log-probabilities (N, K) lie apart.

    Raises ValueError when their shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {candidate.shape}")
    apart = np.abs(reference.astype(np.float64) - candidate.astype(np.float64))  # (N, K)
    apart[~np.isfinite(apart)] = np.inf
    rows = apart.max(axis=1)  # (N,)
    differing = int((reference.argmax(axis=1) != candidate.argmax(axis=1)).sum())
    worst = int(rows.argmax())
    return Difference(len(rows), float(rows[worst]), differing, worst)

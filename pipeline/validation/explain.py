"""Why a file does not say what its module says, in words: each cause is tried and recognized."""

# Shape letters: B batch, K classes.

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor
from pipeline.repository.golden import row_errors

IMAGES = 64  # that are tried
# A cause is recognized when its reversal takes away all but this share of the usual difference.
REMAINS = 0.02
MOVED = 0.01  # of it, by which a row may differ between a batch of its own and a larger one
Change = Callable[[np.ndarray], np.ndarray]


def _negative(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return 255 - images
    turned: np.ndarray = images.max() + images.min() - images
    return turned


def _log_softmax(outputs: np.ndarray) -> np.ndarray:
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    normalized: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized


# What would be right if the file did this to its images, or left this out of its answers.
PICTURES: dict[str, Change] = {
    "the ink is inverted: it answers rightly for negatives": _negative,
    "images are transposed: it answers rightly when rows and columns change places": (
        lambda images: images.swapaxes(-1, -2)
    ),
    "images are mirrored from left to right": lambda images: images[..., ::-1],
    "images are upside down": lambda images: images[..., ::-1, :],
    "the colour channels are in reverse order": lambda images: images[:, ::-1],
}


def _softmax(outputs: np.ndarray) -> np.ndarray:
    chances: np.ndarray = np.exp(_log_softmax(outputs))
    return chances


# What would make its answers the expected ones.
ANSWERS: dict[str, Change] = {
    "the final log-softmax is missing": _log_softmax,
    "the final softmax is missing": _softmax,
    "it answers probabilities, not their logarithms": (
        lambda outputs: np.log(np.maximum(outputs, 1e-300))
    ),
    "it answers logarithms, not probabilities": lambda outputs: np.exp(np.minimum(outputs, 700)),
}
# What would make the expected answers its own.
ADDED: dict[str, Change] = {
    "a softmax was added at its end": _softmax,
    "a log-softmax was added at its end": _log_softmax,
}


def diagnose(
    candidate: Predictor, images: np.ndarray, expected: np.ndarray, classes: Sequence[str]
) -> list[str]:
    """The causes that explain why answers to images (B, ...) are not as expected (B, K).

    None when no cause that is known here explains it.
    """
    images = images[:IMAGES]
    expected = expected[: len(images)]
    together = _ask(candidate, images, expected)
    if together is None:
        return []
    usual = _apart(expected, together)
    one_by_one = [_ask(candidate, images[row : row + 1], expected[:1]) for row in range(8)]
    alone = [answer for answer in one_by_one if answer is not None]
    if len(alone) == len(one_by_one) and _moved(np.concatenate(alone), together[:8], usual):
        return [
            "a row's answer depends on its batch or place: a reshape mixes rows, or something "
            "normalizes over the batch; keep the batch axis first and apart"
        ]
    left = {}
    for what, change in PICTURES.items() if images.ndim == 4 else ():
        answer = _ask(candidate, np.ascontiguousarray(change(images)), expected)
        left[what] = np.inf if answer is None else _apart(expected, answer)
    outputs = together.astype(np.float64)
    left |= {what: _apart(expected, change(outputs)) for what, change in ANSWERS.items()}
    added = {what: _apart(change(expected), outputs) for what, change in ADDED.items()}
    for causes in (left, added):
        best = min(causes, key=lambda what: causes[what])
        if causes[best] < REMAINS * usual:
            return [best]
    return _swapped(outputs, expected, classes, usual)


def _apart(expected: np.ndarray, outputs: np.ndarray) -> float:
    """The median of the rows' largest differences."""
    return float(np.median(row_errors(expected, outputs)))


def _ask(candidate: Predictor, images: np.ndarray, like: np.ndarray) -> np.ndarray | None:
    """The answers, if they are of the right shape and finite."""
    try:
        outputs = candidate(images)
    except CheckFailedError:
        return None
    is_whole = outputs.shape == (len(images), like.shape[1]) and np.isfinite(outputs).all()
    return outputs if is_whole else None


def _moved(alone: np.ndarray, together: np.ndarray, usual: float) -> bool:
    return float(row_errors(alone, together).max()) > MOVED * usual


def _swapped(
    outputs: np.ndarray, expected: np.ndarray, classes: Sequence[str], usual: float
) -> list[str]:
    """Which classes changed places, if that explains it."""
    apart = np.abs(expected[:, :, np.newaxis] - outputs[:, np.newaxis]).mean(axis=0)  # (K, K)
    order = apart.argmin(axis=1)  # where each class's answer stands
    moved = [index for index in range(len(order)) if order[index] != index]
    if (
        len(set(order)) < len(order)
        or not moved
        or _apart(expected, outputs[:, order]) >= REMAINS * usual
    ):
        return []
    named = ", ".join(f"{classes[order[index]]} for {classes[index]}" for index in moved[:6])
    return [f"labels are swapped: it says {named}"]

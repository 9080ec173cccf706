"""Images that no data set has: what a proof asks beside them, and what a graph has to refuse."""

# Shape letters: N images.

import numpy as np

from pipeline.core.errors import CheckFailedError
from pipeline.core.evaluate import Predictor


def probe_images(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images (20, ...) that no data set has, within the range of `images` (N, ...).

    Blank, full, one single pixel, a checkerboard, and 16 of noise.
    """
    shape, low, high = images.shape[1:], images.min(), images.max()
    if images.dtype == np.uint8:
        low, high = np.uint8(0), np.uint8(255)
    blank, full = np.full(shape, low, images.dtype), np.full(shape, high, images.dtype)
    pixel = blank.copy()
    pixel[tuple(side // 2 for side in shape)] = high
    squares = np.where(np.indices(shape).sum(axis=0) % 2, full, blank)
    noise = np.random.default_rng(seed).random((16, *shape)) * (float(high) - float(low))
    return np.concatenate(
        [np.stack([blank, full, pixel, squares]), (noise + float(low)).astype(images.dtype)]
    )


def intruders(images: np.ndarray) -> dict[str, np.ndarray]:
    """What a graph that takes `images` (N, ...) has to refuse: another type, rank or size."""
    two = images[:2]
    other = np.float32 if two.dtype != np.float32 else np.float64
    wrong = {f"{other.__name__} instead of {two.dtype}": two.astype(other)}
    wrong["an axis too many"] = two[..., np.newaxis]
    if two.ndim > 1:
        wrong["an axis too few"] = two[:, 0]
        for axis in range(1, two.ndim):
            wrong[f"axis {axis} longer by one"] = np.concatenate(
                [two, two.take([0], axis=axis)], axis=axis
            )
            if two.shape[axis] > 1:
                wrong[f"axis {axis} of length 1"] = two.take([0], axis=axis)
    return wrong


def refusals(candidate: Predictor, images: np.ndarray) -> list[str]:
    """What the graph should have refused and did not, in words."""
    problems = []
    for what, wrong in intruders(images).items():
        try:
            candidate(wrong)
        except CheckFailedError:
            continue
        problems.append(f"the graph takes images with {what}; it has to refuse them")
    return problems

"""Cropping as in MNIST: one digit, 20 pixels high or wide, centred by its mass.

Follows the rules of RULES.md, in integer arithmetic.
"""

# Shape letters: H height, W width.

import numpy as np

from pipeline.core.signature import IMAGES
from pipeline.images.ink import Ink, border_width, slide

DIGIT = 20  # pixels of the longer side of a digit in MNIST
FULL = 16  # at least this many pixels get the highest level
THIN = 26  # in 1/20 of an MNIST pixel: thinner strokes are widened to this width
SMALLEST = 40  # a piece with less than the digit's mass divided by this is a speck
NEAR = 4  # a piece is near if its distance is at most the digit's side divided by this
LIGHTEST = 8  # a piece with less than the digit's mass divided by this begins no other part
SHORTEST = 4  # nor does a piece that is shorter than the digit's side divided by this
MOST = 16  # parts that are listed
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two exclusive


def crop_digit(ink: Ink) -> tuple[np.ndarray, list[Box]]:
    """Crop the digit from a picture's ink: uint8 (28, 28), and the boxes of all parts.

    The digit's box is the first. Returns zeros and no boxes if ruled paper has no digit, or if
    there is only a dot.
    """
    mask = ink.levels >= ink.threshold
    if ink.is_ruled:  # drop what the lines leave where they end, in the picture's frame
        edge = border_width(mask)
        labels, count = label_pieces(mask)
        reaches_in = np.bincount(labels[edge:-edge, edge:-edge].ravel(), minlength=count + 1) > 0
        mask &= reaches_in[labels]
    if not mask.any():
        return np.zeros(IMAGES.shape[1:], np.uint8), []
    kept, boxes = _find_parts(ink.levels, mask, ink.is_full)
    left, top, right, bottom = boxes[0]
    side, shorter = max(bottom - top, right - left), min(bottom - top, right - left)
    edge = 2 * (side // DIGIT + 1)  # margin in pixels: one MNIST pixel and a thick stroke
    box = np.s_[top : bottom + 2 * edge, left : right + 2 * edge]  # padded: zeros outside
    window, levels = _pad(kept, edge)[box], _pad(ink.levels, edge)[box]
    reach = max(1, side // DIGIT)  # width in pixels of the soft edge of a stroke
    levels = levels * _grow(window, reach)
    # A stroke's width is about twice its area divided by its edge: in 1/20 of an MNIST pixel.
    edges = int((window[1:] != window[:-1]).sum() + (window[:, 1:] != window[:, :-1]).sum())
    is_round = 4 * side <= 5 * shorter and 10 * edges <= 22 * (side + shorter)  # without a hole
    if is_round and 4 * int(window.sum()) >= 3 * side * shorter:  # a dot, not a digit
        return np.zeros(IMAGES.shape[1:], np.uint8), []
    width = 2 * int(window.sum()) * DIGIT * 20 // (edges * side)
    # A hairline is widened so that it survives the scaling.
    grown = min(max(0, (THIN - width) * side // (2 * DIGIT * 20)), side // DIGIT)
    levels = _grow(levels, grown) if grown else levels
    side += 2 * grown
    height, width = bottom - top + 2 * grown, right - left + 2 * grown
    return _centre(_scale(levels, edge - grown, height, width, side)), boxes


def _grow(levels: np.ndarray, by: int) -> np.ndarray:
    """Return the highest level within `by` pixels of each pixel in both directions (H, W)."""
    return slide(_pad(levels, by), 2 * by + 1, np.maximum)


def _pad(levels: np.ndarray, by: int) -> np.ndarray:
    """Add `by` zeros on each side of levels (H, W); np.pad takes ten times as long."""
    wide = np.zeros([length + 2 * by for length in levels.shape], levels.dtype)
    wide[by:-by, by:-by] = levels
    return wide


def _find_parts(ink: np.ndarray, mask: np.ndarray, is_full: bool) -> tuple[np.ndarray, list[Box]]:
    """Return the digit's mask (H, W), and the boxes of the parts of the mask, the digit's first.

    The digit is the heaviest piece with pieces near it that are not specks. Other pieces are parts
    as well, each with those near it, if they are not much lighter or smaller than the digit.
    """
    labels, count = label_pieces(mask)
    where, places = labels[mask] - 1, np.nonzero(mask)[::-1]
    mass = np.bincount(where, ink[mask], count).astype(np.int64)
    # Of each piece: left and top, then right and bottom, exclusive (2, count).
    first, last = np.full((2, count), max(mask.shape)), np.zeros((2, count), np.int64)
    for axis in (0, 1):
        np.minimum.at(first[axis], where, places[axis])
        np.maximum.at(last[axis], where, places[axis] + 1)
    at_border = ((first == 0) | (last == [[side] for side in mask.shape[::-1]])).any(axis=0)
    if is_full:  # what reaches the border is the digit
        at_border[:] = False
    inside = np.where(at_border, 0, mass)
    main = int(inside.argmax()) if inside.max() * 8 >= mass.max() else int(mass.argmax())
    free = ~at_border | at_border[main]
    boxes = list[Box]()
    while True:
        chosen = _join_pieces(main, free & (mass * SMALLEST >= mass[main]), first, last)
        free &= ~chosen
        box = (*first[:, chosen].min(axis=1).tolist(), *last[:, chosen].max(axis=1).tolist())
        if not boxes:
            digit = np.asarray(np.concatenate([[False], chosen])[labels])
            side, least = max(box[2] - box[0], box[3] - box[1]), mass[chosen].sum()
            free &= (mass * LIGHTEST >= least) & ((last - first).max(axis=0) * SHORTEST >= side)
        boxes.append(box)
        if not free.any() or len(boxes) == MOST:
            return digit, boxes
        main = int(np.where(free, mass, 0).argmax())


def _join_pieces(
    main: int, possible: np.ndarray, first: np.ndarray, last: np.ndarray
) -> np.ndarray:
    """Return which of the possible pieces (count,) make one part with the piece `main`."""
    chosen: np.ndarray = np.arange(len(possible)) == main
    while True:
        start, end = first[:, chosen].min(axis=1)[:, None], last[:, chosen].max(axis=1)[:, None]
        gap = np.maximum(first - end, start - last).max(axis=0)
        width, height = np.maximum(last, end) - np.minimum(first, start)  # of both together
        lower = np.minimum(last - first, end - start)[1]
        is_next = (width > height) & (4 * lower >= 3 * height)  # another digit, next to this one
        near = (int((end - start).max()) - 1) // NEAR
        more = possible & ~chosen & (gap <= near) & ~is_next
        if not more.any():
            return chosen
        chosen |= more


def label_pieces(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the labels (H, W) of the connected pieces of a mask, from 1, and their count.

    Pixels that touch at a corner are connected. Each run of pixels in a row is merged with the
    runs that it touches in the row above. Pieces are numbered in the order of their first runs.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 1), np.int8)
    padded[:, :-1] = mask
    steps = np.diff(padded.ravel(), prepend=np.int8(0))
    # Positions in rows of length W + 1.
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    count = len(starts)
    # A run touches those runs above that end after it begins and begin before it ends.
    first = np.searchsorted(ends, starts - (width + 1))
    last = np.searchsorted(starts, ends - (width + 1), side="right")
    touching = np.maximum(last - first, 0)
    lower = np.repeat(np.arange(count), touching)
    upper = np.arange(touching.sum()) - np.repeat(np.cumsum(touching) - touching, touching)
    upper += np.repeat(first, touching)
    roots = np.arange(count)  # for each run, the first run that it is merged with
    before = np.full(count, -1)
    while (roots != before).any():
        least = np.minimum(roots[lower], roots[upper])
        before = roots.copy()
        np.minimum.at(roots, roots[lower], least)
        np.minimum.at(roots, roots[upper], least)
        roots = roots[roots]
    names, numbers = np.unique(roots, return_inverse=True)
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.repeat(numbers + 1, ends - starts)
    return labels, len(names)


def _scale(levels: np.ndarray, start: int, height: int, width: int, side: int) -> np.ndarray:
    """Scale the digit, which begins at `start` on both axes, by 20 / `side`, with a margin of 1."""
    if DIGIT - 2 <= side <= DIGIT + 1:  # it already has MNIST's size
        end = start + 1
        return levels[start - 1 : end + height, start - 1 : end + width].astype(np.float64)
    rows = _compute_weights(levels.shape[0], start, height, side)
    columns = _compute_weights(levels.shape[1], start, width, side)
    # Floats are exact for integers below 2^53; / 4096 keeps the sums that follow below that.
    scaled = np.maximum(rows @ levels.astype(np.float64) @ columns.T, 0)
    return np.asarray(scaled if side > DIGIT else np.floor(scaled / 4096))


def _compute_weights(length: int, start: int, extent: int, side: int) -> np.ndarray:
    """Return the weight of each pixel in each scaled pixel, (scaled, length)."""
    steps = np.arange(-(-extent * DIGIT // side) + 2)[:, np.newaxis] - 1
    if side > DIGIT:  # the covered length, in 1/20 of a pixel
        begin, pixel = start * DIGIT + side * steps, DIGIT * np.arange(length)
        covered = np.minimum(begin + side, pixel + DIGIT) - np.maximum(begin, pixel)
        return np.asarray(np.maximum(covered, 0), np.float64)
    # Catmull-Rom cubic, times 2 * 40^3, of the distance in 1/40 of a pixel.
    t = np.abs(2 * start * DIGIT + side * (2 * steps + 1) - 40 * np.arange(length) - 20)
    near = 3 * t**3 - 200 * t**2 + 128000
    far = -(t**3) + 200 * t**2 - 12800 * t + 256000
    return np.where(t <= 40, near, np.where(t < 80, far, 0)).astype(np.float64)


def _centre(levels: np.ndarray) -> np.ndarray:
    """Place the digit's levels (H, W) in uint8 (28, 28), its centre of mass in the middle.

    This is MNIST's placement. At least 16 pixels are 255.
    """
    ordered = np.sort(levels.ravel())
    full = int(ordered[-min(FULL, len(ordered))]) or int(ordered[-1])
    whole = levels.astype(np.int64)
    digit = np.asarray(np.minimum((whole * 510 + full) // (2 * full), 255), np.uint8)
    canvas = np.zeros([side + 2 for side in IMAGES.shape[1:]], np.uint8)  # (30, 30)
    place = []
    for axis, side in enumerate(canvas.shape):
        mass = digit.sum(axis=1 - axis, dtype=np.int64)
        total, moment = int(mass.sum()), int((mass * np.arange(len(mass))).sum())
        # Every MNIST digit has its centre of mass in [13.5, 14.5).
        start = -(-((side - 1) * total - 2 * moment) // (2 * total))
        start = min(max(start, 0), side - len(mass))  # inside, even if the digit is lopsided
        place.append(slice(start, start + len(mass)))
    canvas[tuple(place)] = digit
    return canvas[1:-1, 1:-1]  # only faint margins can be cut off

"""Detection of ink in a picture: polarity, paper, noise and ruled lines, by the rules of RULES.md.

Integer arithmetic only, so that an implementation in another language gets the same levels.

The lines of ruled and squared paper are found in the ink levels and erased.
"""

# Shape letters: H height, W width, S slopes, C columns of strips. Gray levels go from 0 to 255.

from collections.abc import Callable

import numpy as np

THUMBNAIL = 160  # longest side in pixels of the thumbnail from which the paper is estimated
STROKE = 4  # ink wider than the thumbnail's longer side divided by this counts as paper
NOISE = 2  # standard deviations of the paper's levels that are subtracted
MIN_DISTANCE = 5  # standard deviations above the paper: the lowest level of ink
FAINT = 5  # on flat paper ink begins at its highest level divided by this
MAX_NOISE = 3  # a picture with a higher standard deviation is smoothed
SMOOTHINGS = 3  # passes of smoothing at most
MIN_CONTRAST = 16  # gray levels between paper and ink; with less, the paper is blank
OF_LINES = 2  # on ruled paper ink has at least the lines' level divided by this
STRIP = 16  # width of a strip in pixels; a line is searched in each strip
FEWEST_STRIPS = 8  # a picture with fewer strips is not searched for lines
FEWEST_LINES = 3  # paper with at least this many parallel lines is ruled
SURE, POSSIBLE = 7, 5  # strips of ten in which a line is found; a digit hides some
STEEPEST = 14  # on each half a line rises by at most the picture's width divided by this
HIT = 4096  # score of a strip that a line crosses; more than the number of columns
RIDGE = 5  # at least this many levels between a line and the pixels next to it


def reduce_levels(levels: np.ndarray, factor: int) -> np.ndarray:
    """Reduce levels (H, W): each square of `factor` x `factor` pixels becomes its rounded mean."""
    if factor == 1:
        return levels.astype(np.int32)
    height, width = levels.shape
    starts = np.arange(0, height, factor), np.arange(0, width, factor)
    sums = np.add.reduceat(levels, starts[0], axis=0, dtype=np.int32)
    sums = np.add.reduceat(sums, starts[1], axis=1)
    rows, columns = np.diff(starts[0], append=height), np.diff(starts[1], append=width)
    count = rows[:, np.newaxis] * columns
    return np.asarray((sums + count // 2) // count, np.int32)


def border_levels(levels: np.ndarray) -> np.ndarray:
    """Return the levels along the picture's border (n,), which is most likely paper."""
    edge = border_width(levels)
    is_border = np.ones(levels.shape, bool)
    is_border[edge:-edge, edge:-edge] = False
    return levels[is_border]


def border_width(levels: np.ndarray) -> int:
    """Return the width in pixels of the frame of a picture (H, W)."""
    side: int = min(levels.shape)
    return max(1, side // 14)


def lower_median(levels: np.ndarray) -> int:
    """Return the lower median of levels 0 to 255: the first that half of them do not exceed."""
    below = np.cumsum(np.bincount(levels.ravel()))
    return int(np.searchsorted(below, (below[-1] + 1) // 2))


def find_ink(gray: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """Return ink levels (H, W), the threshold of ink, and whether the paper is ruled.

    An ink level is a pixel's distance from the paper; from the threshold on it is ink. The
    threshold is 0 if there is no ink.
    """
    border = border_levels(gray)
    paper = lower_median(border)
    if int((border == paper).sum()) * 3 >= 2 * len(border):  # drawn on a screen, or prepared
        apart = gray - paper if _sum_cubes(gray - paper) > 0 else paper - gray
        raised, line = erase_lines(np.maximum(apart, 0), 0)
        highest = int(raised.max())
        threshold = max(highest // FAINT + 1, line // OF_LINES)
        return raised, threshold if highest >= max(MIN_CONTRAST, threshold) else 0, line > 0
    raised = _measure_ink(gray)
    for _ in range(SMOOTHINGS):
        if _estimate_noise(raised, lower_median(raised)) <= MAX_NOISE:
            break
        # The mean of the 3 x 3 pixels around each; the border's pixels are repeated outside.
        wide = np.pad(raised, 1, mode="edge")
        rows = wide[:-2] + wide[1:-1] + wide[2:]
        raised = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4) // 9
    level = lower_median(raised)
    noise = _estimate_noise(raised, level)
    raised, line = erase_lines(np.maximum(raised - level, 0), noise)
    distance = max(MIN_CONTRAST // 2, MIN_DISTANCE * noise, line // OF_LINES)
    threshold = max(_find_threshold(raised, distance), distance)
    if raised.max() < max(MIN_CONTRAST, distance):
        return raised, 0, line > 0
    return np.maximum(raised - NOISE * noise, 0), max(threshold - NOISE * noise, 1), line > 0


def _estimate_noise(raised: np.ndarray, level: int) -> int:
    """Estimate the standard deviation of the paper's levels: 3/2 of the median distance."""
    return 3 * lower_median(np.abs(raised - level)) // 2


def _sum_cubes(distance: np.ndarray) -> int:
    """Return the sum of the cubed distances from the paper; it is positive if ink is brighter.

    Ink is rare but far from the paper, so it decides the sign.
    """
    return int((distance.astype(np.int64) ** 3).sum())


def _measure_ink(gray: np.ndarray) -> np.ndarray:
    """Return each pixel's distance (H, W) from uneven paper, in the direction of the ink.

    The direction is brighter or darker than the paper; a pixel in the other direction gets 0.
    """
    factor = -(-max(gray.shape) // THUMBNAIL)
    small = reduce_levels(gray, factor)
    # The mean (H, W) of the square around each pixel; its side is half the longer side.
    half = max(1, max(small.shape) // 4)
    sums, counts = small.astype(np.int64), np.ones(small.shape, np.int64)
    for axis, length in enumerate(small.shape):
        first = np.maximum(np.arange(length) - half, 0)
        last = np.minimum(np.arange(length) + half + 1, length)
        counts *= (last - first).reshape((-1, 1) if axis == 0 else (1, -1))
        summed = np.cumsum(np.insert(sums, 0, 0, axis=axis), axis=axis)
        sums = np.take(summed, last, axis=axis) - np.take(summed, first, axis=axis)
    if _sum_cubes(small - (sums + counts // 2) // counts) > 0:
        bright = _enlarge(_estimate_paper(small), factor, gray.shape)
        return np.asarray(np.maximum(gray - bright, 0))
    paper = np.maximum(255 - _enlarge(_estimate_paper(255 - small), factor, gray.shape), 1)
    # Paper and ink reflect a share of the light, which stays the same in a shadow.
    return np.asarray((np.maximum(paper - gray, 0) * 255 + paper // 2) // paper)


def _estimate_paper(small: np.ndarray) -> np.ndarray:
    """Return the paper's level under each pixel (H, W), for ink that is brighter than paper.

    It is a morphological opening by a square: the minimum over each square, then the maximum of
    those. A stroke is narrower than the square, so it does not change the result.
    """
    side = max(3, max(small.shape) // STROKE)
    levels = _extrapolate(_extrapolate(small, side - 1).T, side - 1).T
    return slide(slide(levels, side, np.minimum), side, np.maximum)


def _extrapolate(levels: np.ndarray, by: int) -> np.ndarray:
    """Extrapolate levels (H, W) by `by` columns on both sides, reflected at the border's level."""
    last = levels.shape[1] - 1
    steps = np.arange(1, by + 1)
    before = 2 * levels[:, :1] - levels[:, np.minimum(steps[::-1], last)]
    after = 2 * levels[:, last:] - levels[:, np.maximum(last - steps, 0)]
    return np.concatenate([before, levels, after], axis=1)


def slide(
    levels: np.ndarray, side: int, extreme: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the extreme (minimum or maximum) of each `side` x `side` square in levels (H, W)."""
    for _ in (0, 1):
        done = 1
        while done < side:
            step = min(done, side - done)
            levels = extreme(levels[: len(levels) - step], levels[step:])
            done += step
        levels = levels.T
    return levels


def _enlarge(small: np.ndarray, factor: int, shape: tuple[int, ...]) -> np.ndarray:
    """Enlarge a thumbnail to `shape` (H, W) by linear interpolation, rounded to integers.

    `factor` is how many times smaller the thumbnail is.
    """
    if factor == 1:
        return small
    levels = small
    for axis in (0, 1):
        place = 2 * np.arange(shape[axis]) + 1 - factor  # in halves of a picture's pixel
        first = place // (2 * factor)
        part = place - 2 * factor * first
        if axis == 0:
            part = part[:, np.newaxis]
        last = levels.shape[axis] - 1
        low = np.take(levels, np.clip(first, 0, last), axis=axis)
        high = np.take(levels, np.clip(first + 1, 0, last), axis=axis)
        levels = low * (2 * factor - part) + high * part
    whole = 4 * factor * factor
    return np.asarray((levels + whole // 2) // whole)


def _find_threshold(raised: np.ndarray, distance: int) -> int:
    """Return Otsu's threshold of the levels from `distance` on: it separates ink from fainter."""
    counts = np.bincount(raised.ravel(), minlength=256)
    counts[:distance] = 0
    levels = np.flatnonzero(counts)[:-1]
    if not len(levels):
        return 0
    below, mass = np.cumsum(counts), np.cumsum(counts * np.arange(len(counts)))
    count, rest = below[levels], below[-1] - below[levels]
    apart = mass[levels] * rest - (mass[-1] - mass[levels]) * count
    # The squares do not fit into 64-bit integers.
    spread = apart.astype(np.float64) ** 2 / (count * rest).astype(np.float64)
    return int(levels[spread.argmax()]) + 1


def erase_lines(levels: np.ndarray, noise: int) -> tuple[np.ndarray, int]:
    """Erase lines that cross the whole picture (H, W); return the ink levels and the lines' level.

    The lines' level is 0 if there are no lines.
    """
    across, first = _erase_rows(levels, noise)
    upright, second = _erase_rows(across.T, noise)
    return upright.T, max(first, second)


def _erase_rows(levels: np.ndarray, noise: int) -> tuple[np.ndarray, int]:
    height, width = levels.shape
    gap = max(3, max(height, width) // 120)
    if width < STRIP * FEWEST_STRIPS or height < 8 * gap:
        return levels, 0
    lines = _find_lines(levels, max(RIDGE, 2 * noise), gap)
    levels, line = levels.copy(), 0
    for slope, row in lines:
        rows = row + slope * (2 * np.arange(width) + 1 - width) // width
        line = max(line, _erase_line(levels, rows, gap))
    return levels, line


def _find_lines(levels: np.ndarray, ridge: int, gap: int) -> list[tuple[int, int]]:
    """Return slope and middle row of each line, the surest first; empty if few lines are sure.

    The slope is how many rows the line falls from the middle column to the last.
    """
    height, width = levels.shape
    around = np.maximum(levels[: -2 * gap], levels[2 * gap :]) + ridge
    is_ridge = np.pad(levels[gap:-gap] > around, ((gap, gap), (0, 0)))
    wide = np.pad(is_ridge, ((1, 1), (0, 0)))
    is_near = wide[:-2] | is_ridge | wide[2:]
    strips = width // STRIP
    exact, count = (
        mask[:, : strips * STRIP].reshape(height, strips, STRIP).sum(axis=2)
        for mask in (is_ridge, is_near)
    )
    steepest = width // STEEPEST
    hits = np.int32(HIT) * (2 * count >= STRIP) + exact.astype(np.int32)  # (H, C)
    hits = np.pad(hits, ((steepest, steepest), (0, 0)))  # (H + margin, C)
    slopes = np.arange(-steepest, steepest + 1)
    shifts = slopes[:, np.newaxis] * (2 * np.arange(strips) + 1 - strips) // strips  # (S, C)
    scores = np.zeros((len(slopes), height), np.int32)
    rows = np.arange(steepest, steepest + height)
    for strip in range(strips):
        scores += hits[:, strip][rows + shifts[:, strip, np.newaxis]]
    # Take the highest score for each line; return no lines if too few are sure.
    lines: list[tuple[int, int]] = []
    sure = 0
    while True:
        slope, row = map(int, np.unravel_index(int(scores.argmax()), scores.shape))
        score = 10 * (scores[slope, row] // HIT)
        if score < POSSIBLE * strips:
            return lines if sure >= FEWEST_LINES else []
        sure += int(score >= SURE * strips)
        lines.append((slope - steepest, row))
        scores[:, max(row - 2 * gap, 0) : row + 2 * gap + 1] = 0


def _erase_line(levels: np.ndarray, rows: np.ndarray, gap: int) -> int:
    """Erase a line, keep ink that crosses it, return its level; `rows` (W,): its row per column."""
    height, width = levels.shape
    band = rows + np.arange(1 - gap, gap)[:, np.newaxis]  # (2 gap - 1, W)
    columns = np.arange(width)
    is_inside = (band >= 0) & (band < height)
    place = np.clip(band, 0, height - 1)
    inside = np.where(is_inside, levels[place, columns], 0)
    line = int(np.sort(inside.max(axis=0))[(width - 1) // 2])
    above, below = (
        np.where((row >= 0) & (row < height), levels[np.clip(row, 0, height - 1), columns], 0)
        for row in (rows - gap, rows + gap)
    )
    across = np.minimum(_spread_levels(above), _spread_levels(below))
    kept = np.where(inside > 2 * line, inside, np.minimum(inside, across))
    levels[place[is_inside], np.broadcast_to(columns, band.shape)[is_inside]] = kept[is_inside]
    return line


def _spread_levels(levels: np.ndarray) -> np.ndarray:
    """Return the highest of each level and its two neighbours (W,)."""
    wide = np.pad(levels, 1, mode="edge")
    return np.asarray(np.maximum(levels, np.maximum(wide[:-2], wide[2:])))

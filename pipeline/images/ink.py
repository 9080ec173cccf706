"""Detection of ink in a picture: polarity, paper, noise and ruled lines, by the rules of RULES.md.

Integer arithmetic only, so that an implementation in another language gets the same levels.

The lines of ruled and squared paper are found in the ink levels and erased.
"""

# Shape letters: H height, W width, S slopes, C columns of strips. Gray levels go from 0 to 255.

from collections.abc import Callable
from dataclasses import dataclass

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
APART = 7  # tenths of all variance between ink and paper where ink may fill the picture
FULLEST = 8  # ink fills a picture if it covers at least this fraction of it, one eighth
MOST_RUNS = 16  # in which the ink of a digit crosses the border
LONGEST = 4  # ink covers at most this fraction of the border in one run, a quarter; shadows more
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


@dataclass(frozen=True)
class Ink:
    """The ink in a picture: pixels whose distance from the paper is at least the threshold."""

    levels: np.ndarray  # (H, W), distances from the paper
    threshold: int  # 0 if there is no ink
    is_ruled: bool  # the paper has lines
    is_full: bool  # ink fills the picture, as where it is cut to the digit


def find_ink(gray: np.ndarray) -> Ink:
    """Find the ink in gray levels (H, W)."""
    factor = -(-max(gray.shape) // THUMBNAIL)
    small = reduce_levels(gray, factor)
    is_paper, full_threshold, is_bright = _find_full_ink(small)
    is_full = full_threshold > 0
    border = border_levels(gray)
    middle = lower_median(border)
    if int((border == middle).sum()) * 3 >= 2 * len(border):  # drawn on a screen, or prepared
        apart = gray - middle if _sum_cubes(gray - middle) > 0 else middle - gray
        raised, line = erase_lines(np.maximum(apart, 0), 0)
        highest = int(raised.max())
        threshold = max(highest // FAINT + 1, line // OF_LINES)
        is_blank = highest < max(MIN_CONTRAST, threshold)
        return Ink(raised, 0 if is_blank else threshold, line > 0, is_full)
    if is_full:  # the paper is what is left of it around each pixel
        paper = _enlarge(_average(small, is_paper), factor, gray.shape)
        is_paper = (gray < full_threshold) == is_bright
    else:
        everywhere = np.ones(small.shape, bool)
        is_bright = _sum_cubes(small - _average(small, everywhere)) > 0
        paper = _estimate_paper(small if is_bright else 255 - small)
        paper = _enlarge(paper, factor, gray.shape)
        paper = paper if is_bright else 255 - paper
        is_paper = np.ones(gray.shape, bool)
    raised = _measure_ink(gray, paper, is_bright)
    for _ in range(SMOOTHINGS):
        if _estimate_noise(raised[is_paper])[1] <= MAX_NOISE:
            break
        # The mean of the 3 x 3 pixels around each; the border's pixels are repeated outside.
        wide = np.pad(raised, 1, mode="edge")
        rows = wide[:-2] + wide[1:-1] + wide[2:]
        raised = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4) // 9
    level, noise = _estimate_noise(raised[is_paper])
    raised, line = erase_lines(np.maximum(raised - level, 0), noise)
    distance = max(MIN_CONTRAST // 2, MIN_DISTANCE * noise, line // OF_LINES)
    # Where ink fills the picture, blurred ink is no fainter noise.
    otsu = 2 * _find_threshold(raised, 0) // 3 if is_full else _find_threshold(raised, distance)
    threshold = max(otsu, distance)
    if raised.max() < max(MIN_CONTRAST, distance):
        return Ink(raised, 0, line > 0, is_full)
    levels = np.maximum(raised - NOISE * noise, 0)
    return Ink(levels, max(threshold - NOISE * noise, 1), line > 0, is_full)


def _estimate_noise(raised: np.ndarray) -> tuple[int, int]:
    """Return the paper's median level and its standard deviation: 3/2 of the median distance."""
    level = lower_median(raised)
    return level, 3 * lower_median(np.abs(raised - level)) // 2


def _sum_cubes(distance: np.ndarray) -> int:
    """Return the sum of the cubed distances from the paper; it is positive if ink is brighter.

    Ink is rare but far from the paper, so it decides the sign.
    """
    return int((distance.astype(np.int64) ** 3).sum())


def _measure_ink(gray: np.ndarray, paper: np.ndarray, is_bright: bool) -> np.ndarray:
    """Return each pixel's distance (H, W) from the paper's levels (H, W), brighter or darker.

    A pixel in the other direction gets 0.
    """
    if is_bright:
        return np.asarray(np.maximum(gray - paper, 0))
    paper = np.maximum(paper, 1)
    # Paper and ink reflect a share of the light, which stays the same in a shadow.
    return np.asarray((np.maximum(paper - gray, 0) * 255 + paper // 2) // paper)


def _find_full_ink(small: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """Return the mask of paper (H, W), the threshold between both, and whether ink is brighter.

    The threshold is 0 unless ink fills the picture, as where it is cut to the digit. Then ink and
    paper are two narrow ranges of levels, and ink crosses the border in short runs, whereas uneven
    paper has levels of one wide range, or, in a shadow, one long run of the border.
    """
    threshold, edge = _find_threshold(small, 0), border_width(small)
    is_ink = small >= threshold
    on_border, corners = border_levels(is_ink), [slice(edge), slice(-edge, None)]
    in_corners = np.concatenate([is_ink[y, x].ravel() for y in corners for x in corners])
    corner, border = in_corners.size, on_border.size
    is_bright = int(on_border.sum()) * corner + int(in_corners.sum()) * border < corner * border
    is_ink = is_ink == is_bright
    # A quotient of sums of squares: of the means of ink and paper by that of all levels.
    ink, n, total = int(is_ink.sum()), small.size, int(small.sum())
    apart = abs(int(small[is_ink].sum()) * (n - ink) - int(small[~is_ink].sum()) * ink)
    spread = n * int((small.astype(np.int64) ** 2).sum()) - total * total
    around = np.concatenate([is_ink[0], is_ink[1:, -1], is_ink[-1, -2::-1], is_ink[-2:0:-1, 0]])
    between = np.flatnonzero(~around)
    if not len(between):
        return ~is_ink, 0, is_bright
    runs = np.diff(between, append=between[0] + len(around)) - 1  # of ink, in pixels
    longest = int(runs.max())
    is_full = (
        min(small.shape) > 1
        and apart >= MIN_CONTRAST * ink * (n - ink)
        and 10.0 * apart * apart >= APART * ink * (n - ink) * float(spread)
        and longest * LONGEST <= len(around)
        and int((runs > 0).sum()) <= MOST_RUNS  # noise has more
        and (longest > 0 or ink * FULLEST >= n)
    )
    return ~is_ink, threshold if is_full else 0, is_bright


def _average(levels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the mean of the masked levels (H, W) in the square around each pixel.

    The square's side is half the longer side; where it has none of them it is the mean of all.
    """
    half = max(1, max(levels.shape) // 4)
    sums, counts = np.where(mask, levels, 0).astype(np.int64), mask.astype(np.int64)
    total, count = sums.sum(), counts.sum()
    for axis, length in enumerate(levels.shape):
        first = np.maximum(np.arange(length) - half, 0)
        last = np.minimum(np.arange(length) + half + 1, length)
        sums, counts = (
            np.take(summed, last, axis=axis) - np.take(summed, first, axis=axis)
            for summed in (
                np.cumsum(np.insert(around, 0, 0, axis=axis), axis=axis)
                for around in (sums, counts)
            )
        )
    sums[counts == 0], counts[counts == 0] = total, count
    return np.asarray((sums + counts // 2) // counts)


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

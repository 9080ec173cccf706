"""What in a picture is ink: polarity, paper, noise and ruled lines, by the rules of RULES.md.

Whole numbers only, so that another language gets the very same levels.

The lines of ruled and squared paper, found and taken out of ink levels, in whole numbers.
"""

# Shape letters: H height, W width, S slopes, C columns of strips. Gray levels go from 0 to 255.

from collections.abc import Callable

import numpy as np

THUMBNAIL = 160  # pixels at most on a side of what the paper is estimated from
STROKE = 4  # the thumbnail's longer side by this: ink wider than that is taken for paper
NOISE = 2  # deviations of the paper's levels that are taken off
MIN_DISTANCE = 5  # deviations above the paper at which ink may begin
FAINT = 5  # on flat paper ink begins at its highest level by this
MAX_NOISE = 3  # a picture with more is smoothed
SMOOTHINGS = 3  # times at most
MIN_CONTRAST = 16  # gray levels between paper and ink; below, the paper is blank
OF_LINES = 2  # on ruled paper the ink has at least the lines' level by this
STRIP = 16  # pixels that a strip is wide; a line is looked for in each
FEWEST_STRIPS = 8  # a narrower picture is not searched
FEWEST_LINES = 3  # paper is ruled from so many parallel lines on
SURE, POSSIBLE = 7, 5  # of ten strips that a line crosses; a digit hides some
STEEPEST = 14  # a line rises by at most the picture's width by this on each half
HIT = 4096  # what a strip counts that a line crosses; more than there are columns
RIDGE = 5  # levels that a line stands out from what is beside it, at least


def reduced(levels: np.ndarray, factor: int) -> np.ndarray:
    """Levels (H, W) with `factor` pixels made one in each direction: their mean, rounded."""
    if factor == 1:
        return levels.astype(np.int32)
    starts = [np.arange(0, length, factor) for length in levels.shape]
    sums = np.add.reduceat(levels, starts[0], axis=0, dtype=np.int32)
    sums = np.add.reduceat(sums, starts[1], axis=1)
    rows, columns = (
        np.minimum(factor, length - start)
        for start, length in zip(starts, levels.shape, strict=True)
    )
    count = rows[:, np.newaxis] * columns
    return np.asarray((sums + count // 2) // count, np.int32)


def frame(levels: np.ndarray) -> np.ndarray:
    """The levels along the picture's border (n,), where paper is to be expected."""
    height, width = levels.shape
    edge = edge_of(levels)
    if 2 * edge >= min(height, width):
        return levels.ravel()
    sides = levels[edge : height - edge]
    parts = (levels[:edge], levels[height - edge :], sides[:, :edge], sides[:, width - edge :])
    return np.concatenate([part.ravel() for part in parts])


def edge_of(levels: np.ndarray) -> int:
    """How many pixels of the border, on each side of a picture (H, W), are its frame."""
    height, width = levels.shape
    side: int = min(height, width)
    return max(1, side // 14)


def middle(levels: np.ndarray) -> int:
    """The lower median of levels 0 to 255: the first that half of them do not exceed."""
    below = np.cumsum(np.bincount(levels.ravel()))
    return int(np.searchsorted(below, (below[-1] + 1) // 2))


def find_ink(gray: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """How far each pixel (H, W) stands out from the paper, and from which level on it is ink.

    That level is 0 where there is no ink at all. Last, whether the paper is ruled.
    """
    border = frame(gray)
    paper = middle(border)
    if int((border == paper).sum()) * 3 >= 2 * len(border):  # drawn on a screen, or prepared
        apart = gray - paper if _cubes(gray - paper) > 0 else paper - gray
        raised, line = without_lines(np.maximum(apart, 0), 0)
        highest = int(raised.max())
        threshold = max(highest // FAINT + 1, line // OF_LINES)
        return raised, threshold if highest >= max(MIN_CONTRAST, threshold) else 0, line > 0
    raised = _raised(gray)
    for _ in range(SMOOTHINGS):
        if _noise(raised, middle(raised)) <= MAX_NOISE:
            break
        # The mean of the 3 x 3 pixels around each, the border's pixels going on outside.
        wide = np.pad(raised, 1, mode="edge")
        rows = wide[:-2] + wide[1:-1] + wide[2:]
        raised = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4) // 9
    level = middle(raised)
    noise = _noise(raised, level)
    raised, line = without_lines(np.maximum(raised - level, 0), noise)
    distance = max(MIN_CONTRAST // 2, MIN_DISTANCE * noise, line // OF_LINES)
    threshold = max(_otsu(raised, distance), distance)
    if raised.max() < max(MIN_CONTRAST, distance):
        return raised, 0, line > 0
    return np.maximum(raised - NOISE * noise, 0), max(threshold - NOISE * noise, 1), line > 0


def _noise(raised: np.ndarray, level: int) -> int:
    """The standard deviation of the paper's levels: 3/2 of the median distance."""
    return 3 * middle(np.abs(raised - level)) // 2


def _cubes(distance: np.ndarray) -> int:
    """The sum of cubes: ink is rare and far from the paper, so its sign is that of the ink."""
    return int((distance.astype(np.int64) ** 3).sum())


def _raised(gray: np.ndarray) -> np.ndarray:
    """The distance of each pixel (H, W) from uneven paper, on the side where the ink is."""
    factor = -(-max(gray.shape) // THUMBNAIL)
    small = reduced(gray, factor)
    # The mean (H, W) of the square around each pixel, a half of the longer side wide.
    half = max(1, max(small.shape) // 4)
    sums, counts = small.astype(np.int64), np.ones(small.shape, np.int64)
    for axis, length in enumerate(small.shape):
        first = np.maximum(np.arange(length) - half, 0)
        last = np.minimum(np.arange(length) + half + 1, length)
        counts *= (last - first).reshape((-1, 1) if axis == 0 else (1, -1))
        summed = np.cumsum(np.insert(sums, 0, 0, axis=axis), axis=axis)
        sums = np.take(summed, last, axis=axis) - np.take(summed, first, axis=axis)
    if _cubes(small - (sums + counts // 2) // counts) > 0:
        bright = _enlarged(_paper(small), factor, gray.shape)
        return np.asarray(np.maximum(gray - bright, 0))
    paper = np.maximum(255 - _enlarged(_paper(255 - small), factor, gray.shape), 1)
    # Of light that falls on it, paper and ink reflect shares: the same in the shadow.
    return np.asarray((np.maximum(paper - gray, 0) * 255 + paper // 2) // paper)


def _paper(small: np.ndarray) -> np.ndarray:
    """The level of the paper under each pixel (H, W), where ink is brighter than paper.

    It is an opening: the level to which a square can rise from below without cutting the surface
    of the levels. A stroke is narrower than the square, so it does not lift it.
    """
    side = max(3, max(small.shape) // STROKE)
    levels = _continued(_continued(small, side - 1).T, side - 1).T
    return slide(slide(levels, side, np.minimum), side, np.maximum)


def _continued(levels: np.ndarray, by: int) -> np.ndarray:
    """Levels (H, W) with `by` more columns on both sides, that go on as the levels rise or fall."""
    last = levels.shape[1] - 1
    steps = np.arange(1, by + 1)
    before = 2 * levels[:, :1] - levels[:, np.minimum(steps[::-1], last)]
    after = 2 * levels[:, last:] - levels[:, np.maximum(last - steps, 0)]
    return np.concatenate([before, levels, after], axis=1)


def slide(
    levels: np.ndarray, side: int, extreme: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """The extreme of each square of `side` pixels that lies within levels (H, W)."""
    for _ in (0, 1):
        done = 1
        found = levels
        while done < side:
            step = min(done, side - done)
            found = extreme(found[: len(found) - step], found[step:])
            done += step
        levels = found.T
    return levels


def _enlarged(small: np.ndarray, factor: int, shape: tuple[int, ...]) -> np.ndarray:
    """The levels (H, W) between those of a thumbnail, linearly, rounded to the nearest."""
    if factor == 1:
        return small
    levels = small
    for axis in (0, 1):
        place = 2 * np.arange(shape[axis]) + 1 - factor  # in halves of a thumbnail's pixel
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


def _otsu(raised: np.ndarray, distance: int) -> int:
    """The level that best parts ink from what is fainter, of the levels above `distance`."""
    counts = np.bincount(raised.ravel(), minlength=256)
    counts[:distance] = 0
    below = np.cumsum(counts)
    mass = np.cumsum(counts * np.arange(len(counts)))
    total, whole = int(below[-1]), int(mass[-1])
    if not total:
        return 0
    best, found = -1.0, 0
    for level in np.flatnonzero(counts)[:-1]:
        count, sum_below = int(below[level]), int(mass[level])
        apart = sum_below * (total - count) - (whole - sum_below) * count
        spread = float(apart) * float(apart) / (float(count) * float(total - count))
        if spread > best:
            best, found = spread, int(level) + 1
    return found


def without_lines(levels: np.ndarray, noise: int) -> tuple[np.ndarray, int]:
    """Ink levels (H, W) without lines that cross the whole picture, and the lines' level or 0."""
    across, first = _without_rows(levels, noise)
    upright, second = _without_rows(across.T, noise)
    return upright.T, max(first, second)


def _without_rows(levels: np.ndarray, noise: int) -> tuple[np.ndarray, int]:
    height, width = levels.shape
    gap = max(3, max(height, width) // 120)
    if width < STRIP * FEWEST_STRIPS or height < 8 * gap:
        return levels, 0
    lines = _lines(levels, max(RIDGE, 2 * noise), gap)
    levels = levels.copy()
    found = [
        _erase(levels, row + slope * (2 * np.arange(width) + 1 - width) // width, gap)
        for slope, row in lines
    ]
    return levels, max(found, default=0)


def _lines(levels: np.ndarray, ridge: int, gap: int) -> list[tuple[int, int]]:
    """Slope and middle row of each line, the surest first."""
    height, width = levels.shape
    beside = np.maximum(levels[: -2 * gap], levels[2 * gap :]) + ridge
    is_ridge = np.zeros(levels.shape, bool)
    is_ridge[gap:-gap] = levels[gap:-gap] > beside
    near = is_ridge.copy()
    near[1:] |= is_ridge[:-1]
    near[:-1] |= is_ridge[1:]
    strips = width // STRIP
    exact, count = (
        found[:, : strips * STRIP].reshape(height, strips, STRIP).sum(axis=2)
        for found in (is_ridge, near)
    )
    steepest = width // STEEPEST
    hits = np.zeros((height + 2 * steepest, strips), np.int32)  # (H + margin, C)
    hits[steepest : steepest + height] = HIT * (2 * count >= STRIP) + exact
    slopes = np.arange(-steepest, steepest + 1)
    shifts = slopes[:, np.newaxis] * (2 * np.arange(strips) + 1 - strips) // strips  # (S, C)
    scores = np.zeros((len(slopes), height), np.int32)
    rows = np.arange(steepest, steepest + height)
    for strip in range(strips):
        scores += hits[:, strip][rows + shifts[:, strip, np.newaxis]]
    # Where the scores are highest, one for each line; none where too few lines are sure.
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


def _erase(levels: np.ndarray, rows: np.ndarray, gap: int) -> int:
    """Take a line out, whose row in each column is given (W,), but what crosses it; its level."""
    height, width = levels.shape
    band = rows + np.arange(1 - gap, gap)[:, np.newaxis]  # (2 gap - 1, W)
    columns = np.arange(width)
    is_inside = (band >= 0) & (band < height)
    place = np.clip(band, 0, height - 1)
    found = np.where(is_inside, levels[place, columns], 0)
    line = int(np.sort(found.max(axis=0))[(width - 1) // 2])
    above, below = (
        np.where((row >= 0) & (row < height), levels[np.clip(row, 0, height - 1), columns], 0)
        for row in (rows - gap, rows + gap)
    )
    across = np.minimum(_spread(above), _spread(below))
    kept = np.where(found > 2 * line, found, np.minimum(found, across))
    levels[place[is_inside], np.broadcast_to(columns, band.shape)[is_inside]] = kept[is_inside]
    return line


def _spread(levels: np.ndarray) -> np.ndarray:
    """The highest of each level and its two neighbours (W,)."""
    spread = levels.copy()
    spread[1:] = np.maximum(spread[1:], levels[:-1])
    spread[:-1] = np.maximum(spread[:-1], levels[1:])
    return spread

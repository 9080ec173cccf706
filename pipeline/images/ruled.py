"""The lines of ruled and squared paper, found and taken out of ink levels, in whole numbers."""

# Shape letters: H height, W width, S slopes, C columns of strips.

import numpy as np

STRIP = 16  # pixels that a strip is wide; a line is looked for in each
FEWEST_STRIPS = 8  # a narrower picture is not searched
FEWEST_LINES = 3  # paper is ruled from so many parallel lines on
SURE, POSSIBLE = 7, 5  # of ten strips that a line crosses; a digit hides some
STEEPEST = 14  # a line rises by at most the picture's width by this on each half
HIT = 4096  # what a strip counts that a line crosses; more than there are columns
RIDGE = 5  # levels that a line stands out from what is beside it, at least


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
    return _peaks(scores, strips, gap, steepest)


def _peaks(scores: np.ndarray, strips: int, gap: int, steepest: int) -> list[tuple[int, int]]:
    """Where scores (S, H) are highest, one for each line; none where too few lines are sure."""
    found: list[tuple[int, int]] = []
    sure = 0
    while True:
        slope, row = np.unravel_index(int(scores.argmax()), scores.shape)
        score = 10 * (scores[slope, row] // HIT)
        if score < POSSIBLE * strips:
            return found if sure >= FEWEST_LINES else []
        sure += int(score >= SURE * strips)
        found.append((int(slope) - steepest, int(row)))
        scores[:, max(int(row) - 2 * gap, 0) : int(row) + 2 * gap + 1] = 0


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

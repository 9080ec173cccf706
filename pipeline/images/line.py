"""A written line, such as a number on a form, as a strip of 28 x 280 pixels.

The ink is found as for a digit. The line is turned upright, scaled so that its digits are 19 pixels
high, or lower down to 16 if it is long, and put into the middle of the strip.
"""

# Shape letters: H height, W width, of the current image.

import math

import numpy as np
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.core.signature import STRIPS
from pipeline.images.crop import SMALLEST, Box, label_pieces
from pipeline.images.ink import Ink, slide

HEIGHT, LOWEST = 19, 16  # pixels of a digit on the strip
MARGIN = 4  # pixels on the left and the right of the line
TALL = 2  # a piece that is higher than the highest divided by this is a digit, or digits
STEEPEST = math.tan(math.radians(15))  # slope of a line
FULL = 16  # at least this many pixels get the highest level
LONG = (
    "{name} shows a line that is {times:.0f} times as long as high: too long to read. Send at most "
    "13 digits, written or cut out next to each other"
)


def crop_line(ink: Ink, name: str) -> tuple[np.ndarray, list[Box]]:
    """Return the strip uint8 (28, 280) of a picture's ink, and the box of the line.

    Returns zeros and no box if there is no ink. Raises PipelineError for a line that is too long.
    """
    strip = np.zeros(STRIPS.shape[1:], np.uint8)
    high, wide = strip.shape
    mask = ink.levels >= ink.threshold
    labels, count = label_pieces(mask)
    mass = np.bincount(labels[mask], ink.levels[mask], count + 1)
    is_kept = mass * SMALLEST >= mass.max()
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    if not ink.is_full and not set(range(1, count + 1)) <= set(border.tolist()):
        is_kept[border] = False  # what reaches the border is of something else
    is_kept[0] = False
    kept = is_kept[labels]
    rows, columns = np.nonzero(kept)
    if not len(rows):
        return strip, []
    angle, digit = _measure_line(labels, is_kept)
    # In the frame of the line: along it and across it.
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    along, across = turn @ np.stack([columns + 0.5, rows + 0.5])
    length = np.ptp(along) + 1
    scale = min(HEIGHT / digit, (wide - 2 * MARGIN) / length, (high - 2) / (np.ptp(across) + 1))
    if scale * digit < min(LOWEST, HEIGHT / 1.001) and scale * length > wide - 2 * MARGIN - 1:
        raise PipelineError(LONG.format(name=name, times=length / digit))
    levels = ink.levels * slide_mask(kept, max(1, digit // HEIGHT))
    middle = turn.T @ [(along.min() + along.max()) / 2, (across.min() + across.max()) / 2]
    factor = max(1, int(1 / scale))  # first reduced, so that no pixel is skipped
    picture = Image.fromarray(np.asarray(levels, np.float32)).reduce(factor)
    # From a pixel of the strip to one of the picture.
    matrix = turn.T / (scale * factor)
    offset = middle / factor - matrix @ [wide / 2, high / 2]
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    how = Image.Resampling.BICUBIC
    values = np.asarray(picture.transform((wide, high), Image.Transform.AFFINE, data, how))
    full = np.sort(values.ravel())[-FULL]
    strip = np.asarray((values * (255 / max(full, 1))).clip(0, 255).round(), np.uint8)
    left, top, right, bottom = (
        int(value) for value in (columns.min(), rows.min(), columns.max(), rows.max())
    )
    return strip, [(left, top, right + 1, bottom + 1)]


def slide_mask(mask: np.ndarray, by: int) -> np.ndarray:
    """Return the mask (H, W) grown by `by` pixels in both directions."""
    return slide(np.pad(mask, by), 2 * by + 1, np.maximum)


def _measure_line(labels: np.ndarray, is_kept: np.ndarray) -> tuple[float, int]:
    """Return the angle of a line in radians, and the height of its digits in pixels.

    `labels` (H, W) are those of its pieces; the tall ones of the kept decide.
    """
    boxes = []
    for label in np.flatnonzero(is_kept):
        rows, columns = np.nonzero(labels == label)
        boxes.append((rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
    top, bottom, left, right = np.array(boxes).T
    heights = bottom - top
    tall = heights * TALL >= heights.max()
    digit = int(np.median(heights[tall]))
    x, y = ((first + last)[tall] / 2 for first, last in ((left, right), (top, bottom)))
    if np.ptp(x) < 2 * digit:  # too short to have a slope
        return 0.0, digit
    slope = np.polyfit(x, y, 1)[0]
    return math.atan(float(np.clip(slope, -STEEPEST, STEEPEST))), digit

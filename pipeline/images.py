"""An image file of any size, as the model takes it: uint8, 28 x 28, made as MNIST was made.

Polarity is found, the paper made even, noise dropped; what is left is cropped to the ink, fitted
into 20 x 20 and centred by its mass. Everything from gray levels on is in `prepare`.
"""

import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.config import IMAGES
from pipeline.errors import PipelineError
from pipeline.files import write_with

# Shape letters: H height, W width, of the image at hand. Gray levels go from 0 to 255.

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # PPM is Pillow's word for PNM
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
WORK_SIDE = 1024  # pixels; a larger image is first reduced to this
DIGIT_SIDE = 20  # pixels that the longer side of a digit has in MNIST
PAPER_SIDE = 64  # pixels of the thumbnail on which the paper is estimated
STROKE = 0.4  # of the image's shorter side: ink wider than this is taken for paper
NOISE = 6.0  # standard deviations of the paper's gray levels that are no ink
FAINT = 0.2  # of the darkest ink: what is fainter does not count for the crop
MIN_CONTRAST = 16.0  # gray levels between paper and ink; below, the paper is blank


def read_image(source: Path | bytes, name: str = "the image") -> np.ndarray:
    """The image in a file as uint8 (1, 28, 28), 0 is paper and 255 is ink; zeros if it is blank.

    `name` is what messages call an image that comes as bytes.
    """
    if isinstance(source, Path):
        name, source = str(source), _read_file(source)
    if len(source) > MAX_FILE_BYTES:
        raise PipelineError(f"{name} is larger than {MAX_FILE_BYTES} bytes: reduce it")
    return prepare(_decode(source, name))


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise PipelineError(f"no image file {path}: check the name")
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PipelineError(f"cannot read {path} ({error.strerror}): check its rights") from error


def _decode(content: bytes, name: str) -> np.ndarray:
    """The gray levels uint8 (H, W) of an image file's content, upright and without alpha."""
    try:
        # Pillow warns of odd metadata and of sizes that are refused here anyway.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image, name)
                return _gray(ImageOps.exif_transpose(image))
    except _DECODING_ERRORS as error:
        raise PipelineError(
            f"{name} cannot be read as an image ({_reason(error)}): "
            "give a whole PNG, JPEG, WebP, BMP, GIF, TIFF or PNM file"
        ) from error


def _check_size(image: Image.Image, name: str) -> None:
    """Refuse too many pixels by the header, before they are decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise PipelineError(
            f"{name} has {image.width} x {image.height} pixels, {MAX_PIXELS} are allowed: reduce it"
        )


# What Pillow raises for content that it cannot decode, found by feeding it damaged files.
_DECODING_ERRORS = (
    OSError,  # UnidentifiedImageError is one
    SyntaxError,
    ValueError,
    EOFError,
    Image.DecompressionBombError,
)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its format is unknown"
    return str(error) or type(error).__name__


def _gray(image: Image.Image) -> np.ndarray:
    """The gray levels uint8 (H, W) of an image in any of Pillow's modes."""
    if image.mode[0] in "IF":  # 16 or 32 bits
        return _stretched(np.nan_to_num(np.asarray(image, np.float64)))
    if not image.has_transparency_data:
        return np.asarray(image.convert("L"))
    levels, alpha = np.asarray(image.convert("RGBA").convert("LA"), np.float64).transpose(2, 0, 1)
    opacity = alpha / 255  # (H, W), 0 to 1
    if opacity.mean() > 0.5:  # the paper is in the picture: what is cut away becomes paper too
        paper = float(np.median(levels[opacity > 0.5]))
    else:
        mean = np.average(levels, weights=opacity + 1e-9)
        paper = 0.0 if mean > 127 else 255.0  # whatever the ink stands out from
    return np.rint(levels * opacity + paper * (1 - opacity)).astype(np.uint8)


def _stretched(levels: np.ndarray) -> np.ndarray:
    """Levels of any range as uint8, lowest 0 and highest 255."""
    low, high = levels.min(), levels.max()
    return np.rint((levels - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)


def prepare(gray: np.ndarray) -> np.ndarray:
    """Gray levels uint8 (H, W) as the model takes them: uint8 (1, 28, 28), zeros without ink."""
    if gray.ndim != 2 or gray.dtype != np.uint8 or gray.size == 0:
        raise ValueError(f"gray levels are uint8 (H, W), got {gray.dtype} {gray.shape}")
    ink = _ink(_reduced(gray))
    darkest = ink.max()
    if darkest < MIN_CONTRAST:
        return np.zeros(IMAGES.shape, np.uint8)
    return _centred(_fitted(ink))[np.newaxis]


def _resized(levels: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    """Levels (H, W) as float32 (height, width)."""
    image = Image.fromarray(levels.astype(np.float32))
    return np.asarray(image.resize((width, height), how))


def _reduced(gray: np.ndarray, side: int = WORK_SIDE) -> np.ndarray:
    """Gray levels float32 (H, W), the longer side at most `side`, by averaging."""
    height, width = gray.shape
    scale = min(1.0, side / max(height, width))
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    return _resized(gray, height, width, Image.Resampling.BOX)


def _frame(levels: np.ndarray) -> np.ndarray:
    """The levels along the image's border (n,), where paper is to be expected."""
    inside = np.zeros(levels.shape, bool)
    width = max(1, min(levels.shape) // 14)
    inside[width:-width, width:-width] = True
    return levels[~inside]


def _ink(gray: np.ndarray) -> np.ndarray:
    """How far each pixel (H, W) stands out from the paper, in gray levels; 0 where it is paper."""
    # Ink is rare and far from the paper; the cube lets the far outweigh uneven paper.
    is_ink_bright = np.mean((gray - np.median(_frame(gray))) ** 3) > 0
    bright = gray if is_ink_bright else 255 - gray
    raised = bright - _paper(bright)
    frame = _frame(raised)
    level = np.median(frame)
    noise = 1.4826 * np.median(np.abs(frame - level))  # a standard deviation, whatever the ink
    return np.maximum(raised - level - NOISE * noise, 0)


def _paper(bright: np.ndarray) -> np.ndarray:
    """The level of the paper under each pixel (H, W), where ink is brighter than paper.

    An opening: the highest of the squares that lie wholly below the image's levels. A stroke is
    narrower than the square, so the square lies on the paper beside it.
    """
    small = _reduced(bright, PAPER_SIDE)
    side = max(3, round(STROKE * max(small.shape)))
    # Odd reflection goes on as the paper rises or falls, so that the margin is no exception.
    padded = np.pad(small, side - 1, mode="reflect", reflect_type="odd")
    opened = _slide(_slide(padded, side, np.min), side, np.max)
    height, width = bright.shape
    return _resized(opened, height, width, Image.Resampling.BILINEAR)


def _slide(levels: np.ndarray, side: int, extreme: Callable[..., np.ndarray]) -> np.ndarray:
    """The extreme of each square of `side` pixels that lies within levels (H, W)."""
    for axis in (0, 1):  # row by row, then column by column, is the same and faster
        levels = extreme(sliding_window_view(levels, side, axis), axis=-1)
    return levels


def _fitted(ink: np.ndarray) -> np.ndarray:
    """The digit in ink (H, W), at most 22 x 22: 20 on its longer side, and its faint margin."""
    rows, columns = np.nonzero(ink > FAINT * ink.max())
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    pixel = max(bottom - top, right - left) / DIGIT_SIDE  # how many of ink's make one of MNIST's
    height = max(1, round((bottom - top) / pixel)) + 2
    width = max(1, round((right - left) / pixel)) + 2
    border = math.ceil(pixel)
    box = np.add((left - pixel, top - pixel, right + pixel, bottom + pixel), border)
    how = Image.Resampling.BOX if pixel > 1 else Image.Resampling.BICUBIC
    padded = Image.fromarray(np.pad(ink, border))
    digit = np.maximum(np.asarray(padded.resize((width, height), how, tuple(box))), 0)
    return digit * (255 / digit.max())


def _centred(digit: np.ndarray) -> np.ndarray:
    """The digit (H, W) as uint8 (28, 28), its centre of mass in the middle as in MNIST."""
    canvas = np.zeros([side + 2 for side in IMAGES.shape[1:]], np.uint8)  # (30, 30)
    place = []
    for axis, side in enumerate(canvas.shape):
        mass = digit.sum(axis=1 - axis)
        centre = np.average(np.arange(len(mass)), weights=mass)
        # Every digit of MNIST has its centre at 13.5 or more and below 14.5.
        start = math.ceil((side - 1) / 2 - centre)
        start = min(max(start, 0), side - len(mass))  # whole, even where it is lopsided
        place.append(slice(start, start + len(mass)))
    canvas[tuple(place)] = np.rint(digit)
    return canvas[1:-1, 1:-1]  # only faint margins can be lost


def write_png(image: np.ndarray, path: Path) -> None:
    """Write an image, uint8 (1, 28, 28), as a grayscale PNG."""
    picture = Image.fromarray(image[0])
    write_with(path, lambda temporary: picture.save(temporary, format="PNG"))

"""Reading of an image file of any size as the model's input: uint8, 28 x 28, as in MNIST.

Polarity is detected, the paper made even and noise removed; the rest is cropped to the ink, fitted
into 20 x 20 and centred by its mass. `prepare` does all of this from gray levels on.
"""

import contextlib
import io
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.core.errors import PipelineError
from pipeline.core.files import write_bytes
from pipeline.core.signature import IMAGES, STRIPS
from pipeline.images.crop import Box as Box
from pipeline.images.crop import crop_digit
from pipeline.images.ink import border_levels, find_ink, lower_median, reduce_levels
from pipeline.images.line import crop_line
from pipeline.images.rule import PictureRule

# Shape letters: H height, W width, of the current image. Gray levels go from 0 to 255.

Picture = Path | bytes | Image.Image | np.ndarray  # a file, its content, or its pixels
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # PPM is Pillow's word for PNM
_CHANNELS = ((), (2,), (3,), (4,))  # array axes after H and W: gray, gray with alpha, RGB, RGBA
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
WORK_SIDE = 640  # pixels; a larger image is first reduced to this
LINE_SIDE = 1280  # likewise, of a picture of a line
# Why a picture is refused: the same message for every input path.
BLANK = (
    "{name} shows no ink, or only a dot: send one dark digit on light paper, or a light one on dark"
)
LARGE = "{name} is larger than {allowed} bytes: reduce it"
TOO_MANY_PIXELS = "{name} has {width} x {height} pixels, {allowed} are allowed: reduce it"
UNREADABLE = "{name} cannot be read as an image ({reason}): use a complete {formats} file"


class BlankError(PipelineError):
    """Error for a picture that shows nothing."""


class Prepared(NamedTuple):
    """A picture as the model takes it, and where its parts are, such as several digits."""

    image: np.ndarray  # uint8 (1, 28, 28), or what a rule makes of it
    # In pixels of the upright picture; the first is in the image. Empty unless it is a `digit`.
    parts: tuple[Box, ...] = ()


def prepare_picture(source: Picture, name: str = "the image", pictures: str = "digit") -> Prepared:
    """Convert a picture in any form to the model's input, and find its parts.

    The input is uint8 (1, 28, 28), or as `pictures` says if it is the text of a PictureRule. Every
    input path (files, clients, the page, scoring, folders of pictures) calls this function, so all
    of them refuse the same pictures with the same messages. Raises PipelineError for a picture
    that cannot be read or is too large, and BlankError for one that shows nothing.
    """
    name = str(source) if isinstance(source, Path) else name
    if "=" in pictures:
        rule, (pixels, _) = PictureRule.parse(pictures), read_gray(source, name, in_color=True)
        if not np.ptp(pixels, axis=(0, 1)).any():
            raise BlankError(BLANK.format(name=name))
        return Prepared(rule.apply(pixels, name))
    gray, shape = read_picture(source, name)
    if pictures == "whole":
        return Prepared(fit(gray, pictures))
    prepared = find_digit(gray, shape) if pictures == "digit" else find_line(gray, shape, name)
    if not prepared.parts:
        raise BlankError(BLANK.format(name=name))
    return prepared


def read_picture(source: Picture, name: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Read a picture as `read_gray` does; raise BlankError if all its levels are equal.

    A picture of one even level shows nothing to any model.
    """
    gray, shape = read_gray(source, name)
    if not np.ptp(gray):
        raise BlankError(BLANK.format(name=name))
    return gray, shape


def read_image(source: Picture, name: str = "the image", pictures: str = "digit") -> np.ndarray:
    """Convert a picture to uint8 (1, 28, 28) by the rules, without a check for blank ones.

    A `digit` has 0 for paper and 255 for ink, zeros if it is blank; a `whole` picture has its
    gray levels. `name` is the name in messages of an image that is given as bytes.
    """
    return fit(read_gray(source, name)[0], pictures)


def read_gray(
    source: Picture, name: str = "the image", in_color: bool = False
) -> tuple[np.ndarray, tuple[int, int]]:
    """Read the gray levels uint8 (H, W) of a picture, upright and without alpha, and its shape.

    A large JPEG is read at 1/2, 1/4 or 1/8 of its shape. With `in_color`, reads red, green and
    blue, uint8 (H, W, 3), at full size and on white where it is transparent; but a picture of 16
    or 32 bits stays gray. Raises PipelineError for a picture that cannot be read or is too large.
    """
    if isinstance(source, Path):
        name, source = str(source), _read_file(source)
    if isinstance(source, bytes) and len(source) > MAX_FILE_BYTES:
        raise PipelineError(LARGE.format(name=name, allowed=MAX_FILE_BYTES))
    try:
        # Pillow warns of odd metadata, and of sizes that are refused here anyway.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(source) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:  # from the header, before decoding
                    sizes = {"width": width, "height": height, "allowed": MAX_PIXELS}
                    raise PipelineError(TOO_MANY_PIXELS.format(name=name, **sizes))
                if in_color and image.mode[0] not in "IF":
                    colors = image.convert("RGBA" if image.has_transparency_data else "RGB")
                    if colors.mode == "RGBA":
                        white = Image.new("RGBA", image.size, "white")
                        colors = Image.alpha_composite(white, colors)
                    pixels = np.asarray(colors)[:, :, :3]
                else:
                    if isinstance(source, bytes):  # a large JPEG is decoded at 1/2, 1/4, ... size
                        image.draft("L", (WORK_SIDE, WORK_SIDE))
                    pixels = _to_gray(image)
                turn = _find_turn(image)
                if turn is None:
                    return pixels, (height, width)
                upright = np.asarray(Image.fromarray(pixels).transpose(turn))
                return upright, (width, height) if turn in _SIDEWAYS else (height, width)
    except _DECODING_ERRORS as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown" if is_unknown else str(error) or type(error).__name__
        formats = "PNG, JPEG, WebP, BMP, GIF, TIFF or PNM"
        raise PipelineError(UNREADABLE.format(name=name, reason=reason, formats=formats)) from error


def _read_file(path: Path) -> bytes:
    if os.path.isdir(path):  # Path.is_dir() raises where a name is too long
        raise PipelineError(f"{path} is a folder: name its files, {path}/*")
    if not os.path.isfile(path):
        raise PipelineError(f"{path} is not a file: check its name and its folder's permissions")
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PipelineError(
            f"cannot read {path} ({error.strerror}): check its permissions"
        ) from error


def _open(
    source: bytes | Image.Image | np.ndarray,
) -> contextlib.AbstractContextManager[Image.Image]:
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    if not isinstance(source, np.ndarray):
        return contextlib.nullcontext(source)  # the caller closes it
    if source.ndim not in (2, 3) or source.shape[2:] not in _CHANNELS or not source.size:
        problem = f"an array of shape {list(source.shape)} is not a picture"
        raise PipelineError(f"{problem}: use gray levels (H, W) or colours (H, W, 3)")
    if source.dtype.kind == "f" and not np.isfinite(source).all():
        raise PipelineError("an array with NaN or infinity is not a picture: check its values")
    return contextlib.nullcontext(Image.fromarray(source))


def _to_gray(image: Image.Image) -> np.ndarray:
    """Return the gray levels uint8 (H, W) of an image in any of Pillow's modes."""
    if image.mode[0] in "IF":  # 16 or 32 bits, of any range
        levels = np.nan_to_num(np.asarray(image, np.float32))
        levels = levels - levels.min()
        levels = levels * (255 / max(levels.max(), 1))
        return np.asarray(np.rint(np.clip(levels, 0, 255)), np.uint8)
    if not image.has_transparency_data:
        return np.asarray(image.convert("L"))
    levels, alpha = np.asarray(image.convert("RGBA").convert("LA"), np.uint16).transpose(2, 0, 1)
    mass = int(alpha.sum(dtype=np.int64))
    if mass == 255 * alpha.size:
        return np.asarray(levels, np.uint8)
    if 2 * mass > 255 * alpha.size:  # mostly opaque: its paper is opaque, too
        paper = np.uint16(lower_median(levels[alpha > 127]))
    else:  # only ink is opaque: the paper is black or white, in contrast to it
        paper = np.uint16(0 if np.vdot(levels.astype(np.int64), alpha) > 127 * mass else 255)
    # At most 255 * 255 + 127, which 16 bits hold.
    return np.asarray((levels * alpha + paper * (255 - alpha) + 127) // 255, np.uint8)


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """Return how a picture is turned upright; ImageOps.exif_transpose fails on damaged EXIF."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except (*_DECODING_ERRORS, struct.error):  # a picture with damaged EXIF is used as it is
        return None


_UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]
# What Pillow raises for content that it cannot decode, determined with damaged files.
_DECODING_ERRORS = (
    OSError,  # includes UnidentifiedImageError
    SyntaxError,
    TypeError,  # from numbers of the wrong kind in a TIFF's tags
    ValueError,
    Image.DecompressionBombError,
)


def fit(gray: np.ndarray, pictures: str) -> np.ndarray:
    """Fit gray levels uint8 (H, W) to uint8 (1, 28, 28), as for the model's training.

    A `digit` is prepared. A `whole` picture is scaled to fit; 28 x 28 stays unchanged, and margins
    of a narrow or low picture get the level of its border.
    """
    if pictures != "whole":
        return prepare(gray)
    side = IMAGES.shape[1]
    scale = side / max(gray.shape)
    height, width = (max(1, round(length * scale)) for length in gray.shape)
    how = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    canvas = np.full(IMAGES.shape, np.uint8(np.median(border_levels(gray))))
    top, left = (side - height) // 2, (side - width) // 2
    resized = Image.fromarray(gray).resize((width, height), how)
    canvas[0, top : top + height, left : left + width] = np.asarray(resized)
    return canvas


def prepare(gray: np.ndarray) -> np.ndarray:
    """Prepare gray levels uint8 (H, W) as the model's input: uint8 (1, 28, 28), zeros if blank."""
    return find_digit(gray, gray.shape).image


def find_digit(gray: np.ndarray, shape: tuple[int, ...]) -> Prepared:
    """Prepare gray levels uint8 (H, W) of a picture of that shape; zeros, no parts if blank."""
    if gray.ndim != 2 or gray.dtype != np.uint8 or gray.size == 0:
        raise ValueError(f"gray levels are uint8 (H, W), got {gray.dtype} {gray.shape}")
    factor = -(-max(gray.shape) // WORK_SIDE)
    ink = find_ink(reduce_levels(gray, factor))
    if not ink.threshold:
        return Prepared(np.zeros(IMAGES.shape, np.uint8))
    image, boxes = crop_digit(ink)
    return Prepared(image[np.newaxis], _scale_boxes(boxes, factor, gray.shape, shape))


def _scale_boxes(
    boxes: list[Box], factor: int, read: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[Box, ...]:
    """Return boxes in the pixels of a picture of that shape, which was read and then reduced."""
    scale, ends = factor * round(max(shape) / max(read)), (*shape[::-1], *shape[::-1])
    parts = [[min(scale * at, end) for at, end in zip(box, ends, strict=True)] for box in boxes]
    return tuple((left, top, right, bottom) for left, top, right, bottom in parts)


def find_line(gray: np.ndarray, shape: tuple[int, ...], name: str) -> Prepared:
    """Prepare gray levels uint8 (H, W) of a picture of a written line; no parts if it is blank.

    Raises PipelineError for a line that is too long.
    """
    factor = -(-max(gray.shape) // LINE_SIDE)
    ink = find_ink(reduce_levels(gray, factor))
    strip, boxes = (
        (np.zeros(STRIPS.shape[1:], np.uint8), []) if not ink.threshold else crop_line(ink, name)
    )
    return Prepared(strip[np.newaxis], _scale_boxes(boxes, factor, gray.shape, shape))


def encode_png(image: np.ndarray) -> bytes:
    """Encode an image, uint8 (1, H, W) or (3, H, W), as the bytes of a PNG."""
    buffer = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def to_picture(image: np.ndarray) -> np.ndarray | None:
    """Convert a model input of any type to a picture uint8 (1 or 3, H, W); None if impossible."""
    if image.ndim == 2:
        image = image[np.newaxis]
    if image.ndim != 3 or len(image) not in (1, 3):
        return None
    if image.dtype == np.uint8:
        return image
    values = image.astype(np.float64) - image.min()
    scaled: np.ndarray = (values * (255 / (values.max() or 1))).astype(np.uint8)
    return scaled


def write_png(image: np.ndarray, path: Path) -> None:
    """Write an image, uint8 (1, 28, 28), as a grayscale PNG."""
    write_bytes(path, encode_png(image))

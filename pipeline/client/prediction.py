"""Conversion of pictures to a model's inputs, and of its outputs to predictions."""

# Shape letters: N images, H height, W width, K classes.

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from pipeline.core import strings
from pipeline.core.errors import PipelineError
from pipeline.images.read import Box, Picture, Prepared, prepare_picture
from pipeline.repository import config_pbtxt

Image = Picture | str  # a string is the path of a file


@dataclass(frozen=True)
class Prediction:
    """The model's prediction for one image."""

    label: str
    probability: float  # of that label, 0 to 1
    top: tuple[tuple[str, float], ...]  # labels with probabilities, the likeliest first
    version: str  # of the model that answered
    sha256: str | None  # of its file, as the server's config states it
    is_sure: bool | None = None  # its probability reaches the model's threshold; None without one
    # Boxes of the digits (or others) in the picture: left, top, right, bottom in its pixels. The
    # answer is for the first. Empty for an array that was sent unchanged, and a whole picture.
    parts: tuple[Box, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return the prediction as a JSON object."""
        record = asdict(self)
        record["sure"] = record.pop("is_sure")
        return record


def to_prediction(
    row: np.ndarray,
    config: config_pbtxt.ModelConfig,
    classes: tuple[str, ...],
    version: str,
    top: int,
) -> Prediction:
    """Return the prediction that a row of outputs stands for, with its `top` best labels.

    The row is (K,), or (T, K + 1) if the model answers strings.
    """
    if row.ndim == 2:
        readings = strings.search(row[np.newaxis])[0][: max(1, top)]
        ranked = tuple((reading.text, reading.probability) for reading in readings)
    else:
        chances = probabilities(row, config_pbtxt.kind(config))
        order = np.argsort(-row)[: max(1, top)]
        # Classes that the config does not name are called by their number.
        names = {index: str(index) for index in range(len(row))} | dict(enumerate(classes))
        ranked = tuple((names[int(index)], float(chances[index])) for index in order)
    threshold = config_pbtxt.min_probability(config)
    is_sure = None if threshold is None else ranked[0][1] >= threshold
    return Prediction(*ranked[0], ranked, version, config_pbtxt.digest(config, version), is_sure)


def probabilities(row: np.ndarray, kind: str) -> np.ndarray:
    """Convert one or more rows of outputs (..., K) of that kind to probabilities (..., K)."""
    values = row.astype(np.float64)
    if kind == "probabilities":
        return values
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    chances: np.ndarray = exponents / exponents.sum(axis=-1, keepdims=True)
    return chances if kind == "logits" else np.exp(values)


def as_list(images: Image | Iterable[Image]) -> list[Image]:
    """Return one picture or many as a list, in which an array is one item."""
    if isinstance(images, str | bytes | Path | np.ndarray) or not isinstance(images, Iterable):
        return [images]
    return list(images)


def split_images(image: Image, config: config_pbtxt.ModelConfig) -> list[Image]:
    """Split an array of images of the model's shape; return anything else as a list of one.

    No picture is prepared yet. Raises PipelineError for a picture if the model takes arrays only,
    and for an array of images that are flat or have no channels.
    """
    shape, pictures = image_shape(config), config_pbtxt.pictures(config)
    if isinstance(image, np.ndarray):
        if fits_shape(image.shape, shape):
            return [image]
        if fits_shape(image.shape[1:], shape):
            return list(image)
        # Bytes (H, W) are a picture if a rule makes floats of it.
        is_picture = "=" in pictures and image.dtype.name != config_pbtxt.type_name(config.input[0])
        if fits_shape((1, *image.shape), shape) and not (is_picture and image.dtype == np.uint8):
            return [image[np.newaxis]]
        if pictures == "arrays":
            return [image]  # as_sent() is true, and fit_input() says what is wrong
        is_flat = image.ndim in (1, 2) and image.shape[-1] == math.prod(shape)
        has_no_channels = image.ndim == 3 and (1, *image.shape[1:]) == shape
        if min(shape) > 0 and (is_flat or has_no_channels):
            fix = f"give array.reshape({', '.join(map(str, (-1, *shape)))})"
            if image.ndim == 2:
                fix += ", or Image.fromarray(array) if it is a picture after all"
            raise PipelineError(
                f"an array of shape {list(image.shape)} holds images, not a picture: {fix}"
            )
    else:
        config_pbtxt.require_pictures(config)
    if not isinstance(image, str | Picture):
        raise PipelineError(
            f"{type(image).__name__} is not a picture: give a path, bytes, a Pillow image or array"
        )
    return [image]


def to_input(image: Image, config: config_pbtxt.ModelConfig) -> Prepared:
    """Convert one of the `split_images` to the model's input; raise PipelineError if unfit."""
    if as_sent(image, config):
        prepared = Prepared(image)
    else:
        picture = Path(image) if isinstance(image, str) else image
        prepared = prepare_picture(picture, pictures=config_pbtxt.pictures(config))
    return prepared._replace(image=fit_input(prepared.image[np.newaxis], config)[0])


def as_sent(image: Image, config: config_pbtxt.ModelConfig) -> TypeGuard[np.ndarray]:
    """Return whether one of the `split_images` is an array that is sent as it is."""
    return isinstance(image, np.ndarray) and (
        config_pbtxt.pictures(config) == "arrays" or fits_shape(image.shape, image_shape(config))
    )


def image_shape(config: config_pbtxt.ModelConfig) -> tuple[int, ...]:
    """Return the shape of one image, in which -1 stands for any size."""
    return tuple(config.input[0].dims)[0 if config.max_batch_size else 1 :]


def fits_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether a shape is the wanted one, in which -1 stands for any size."""
    return len(shape) == len(wanted) and all(
        want in (-1, size) for size, want in zip(shape, wanted, strict=True)
    )


def fit_input(images: np.ndarray, config: config_pbtxt.ModelConfig) -> np.ndarray:
    """Return images (N, ...) in the model's type; raise PipelineError unless it takes their shape.

    Floats, such as NumPy's float64, become the model's floats unless one of them overflows. Whole
    numbers are not converted: whether they are to be scaled is not known.
    """
    tensor = config.input[0]
    wanted, got = list(tensor.dims), list(images.shape[1 if config.max_batch_size else 0 :])
    dtype = config_pbtxt.type_name(tensor)
    if images.dtype.kind == "f" and dtype.startswith("float"):
        with np.errstate(over="ignore"):
            floats = images.astype(dtype)
        if (np.isinf(floats) != np.isinf(images)).any():
            raise PipelineError(f"{config.name} takes {dtype}, and larger values are given: scale")
        images = floats
    if str(images.dtype) != dtype:
        fix = f"images.astype(np.{dtype})"
        if dtype.startswith("float"):
            fix = f"scale them as for its training, such as {fix} / 255"
        if dtype == "uint8":
            is_float = images.dtype.kind == "f" and images.size > 0
            is_share = is_float and 0 <= images.min() <= images.max() <= 1  # pixels as in torch
            scale = "(255 * images).round()" if is_share else "images"
            fix = f"give pixels from 0 for paper to 255 for ink, {scale}.astype(np.uint8)"
        raise PipelineError(f"{config.name} takes {dtype}, not {images.dtype}: {fix}")
    if not fits_shape(tuple(got), tuple(wanted)):
        array = ", ".join(map(str, ["N", *wanted] if config.max_batch_size else wanted))
        also = ", or a picture" if config_pbtxt.pictures(config) != "arrays" else ""
        raise PipelineError(
            f"{config.name} takes images of shape {wanted}, not {got}: give [{array}]{also}"
        )
    return images

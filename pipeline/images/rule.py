"""Rule by which a picture becomes the input of a third-party network.

`pipeline export --picture` states it, the config of the served model carries it as text, and
`read.prepare_picture` follows it for every client.
"""

# Shape letters: C channels, H height, W width.

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.core.errors import PipelineError

CHANNELS = {"gray": 1, "rgb": 3, "bgr": 3}  # by color
KEYS = ("resize", "color", "mean", "std", "shape", "dtype")
MAX_SIDE = 4096  # pixels
MAX_RATIO = 20  # of a picture's longer side to the shorter: its middle would show little of it


@dataclass(frozen=True)
class PictureRule:
    """The size, colours and normalization of a network's input; its text is what `parse` reads.

    Raises PipelineError, with what is wrong, for values that do not fit each other.
    """

    resize: tuple[int, ...]  # pixels: of the shorter side, or (height, width)
    color: str
    mean: tuple[float, ...]  # of pixels from 0 to 1, for all channels or for each
    std: tuple[float, ...]
    shape: tuple[int, ...]  # (C, H, W) of the input
    dtype: str  # of the input: uint8, or a float type

    def __post_init__(self) -> None:
        channels, sides, numbers = self.shape[0], self.shape[1:], (*self.mean, *self.std)
        colors = [color for color, count in CHANNELS.items() if count == channels]
        sizes = self.resize * 2 if len(self.resize) == 1 else self.resize
        counts = {len(self.mean), len(self.std)} - {1, channels}
        is_type = self.dtype == "uint8" or self.dtype.startswith("float")
        problem = ""
        if not is_type or len(sides) != 2 or not colors or not 1 <= min(sides) <= max(sides):
            problem = (
                "a picture becomes uint8 or floats [1 or 3, H, W], but the network takes "
                f"{self.dtype} {list(self.shape)}"
            )
        elif self.color not in colors:
            problem = f"color must be {' or '.join(colors)}, got {self.color!r}"
        elif len(sizes) != 2 or sizes[0] < sides[0] or sizes[1] < sides[1] or max(sizes) > MAX_SIDE:
            least = "x".join(map(str, sides))
            problem = f"resize must be N or HEIGHTxWIDTH, from {least} to {MAX_SIDE} pixels a side"
        elif counts or not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            problem = f"mean and std must be 1 or {channels} numbers (as 0.5:0.4:0.4), std above 0"
        elif self.dtype == "uint8" and numbers != (0, 1):
            problem = "the network takes uint8 and normalizes by itself: leave out mean and std"
        if problem:
            raise PipelineError(problem)

    @classmethod
    def parse(cls, text: str) -> "PictureRule":
        """Return the rule that a text KEY=VALUE,... states; raise PipelineError if it is invalid.

        `shape` and `dtype` must be there. By default, the shorter side becomes the longer of H and
        W, the colour is gray or rgb, the mean 0 and the deviation 1.
        """
        pairs = [entry.strip().partition("=")[::2] for entry in text.split(",")]
        values = {"mean": "0", "std": "1"} | dict(pairs)
        if len(dict(pairs)) < len(pairs) or not values.keys() <= {*KEYS}:
            raise PipelineError(f"give {', '.join(KEYS[:4])} as KEY=VALUE,... and each only once")
        try:
            shape = tuple(map(int, values["shape"].split("x")))
            resize = tuple(map(int, values.get("resize", str(max(shape))).split("x")))
            mean, std = (tuple(map(float, values[key].split(":"))) for key in ("mean", "std"))
            color = values.get("color", "gray" if shape[0] == 1 else "rgb")
            return cls(resize, color, mean, std, shape, values["dtype"])
        except (KeyError, ValueError) as error:
            raise PipelineError(f"the rule {text!r} cannot be read: {error}") from error

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value that a picture can become."""
        if self.dtype == "uint8":
            return 0, 255
        ends = (np.array([[0], [1]]) - self.mean) / self.std
        return float(ends.min()), float(ends.max())

    def apply(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Return the network's input (C, H, W) for an upright picture, (H, W) or (H, W, 3).

        This is torchvision's Resize, CenterCrop, ToTensor and Normalize of a Pillow image. Raises
        PipelineError if the picture called `name` is too long and narrow.
        """
        image = Image.fromarray(pixels).convert("L" if self.color == "gray" else "RGB")
        channels, height, width = self.shape
        if len(self.resize) == 1:
            shorter, longer = sorted(image.size)
            if longer > MAX_RATIO * shorter:
                sides = f"{image.width} x {image.height} pixels"
                raise PipelineError(f"{name} has {sides}, which is too long and narrow: crop it")
            wide, tall = (side * self.resize[0] // shorter for side in image.size)
        else:
            tall, wide = self.resize
        left, top = round((wide - width) / 2), round((tall - height) / 2)
        image = image.resize((wide, tall), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + width, top + height))
        levels = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
        levels = np.ascontiguousarray(levels[::-1] if self.color == "bgr" else levels)
        if self.dtype == "uint8":
            return levels
        mean, std = (np.array(n, np.float32).reshape(-1, 1, 1) for n in (self.mean, self.std))
        return ((levels.astype(np.float32) / np.float32(255) - mean) / std).astype(self.dtype)

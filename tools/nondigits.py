"""Pictures of things that are no digits, made by seed, for a model to be asked about.

Nothing of this is trained on: what training sees is made in another way, by `outliers.py`, which
draws its letters with strokes and knows no font. What is held back no choice of it was made by.
"""

# Shape letters: N images, P points of a pen's path.

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.core.signature import IMAGES
from pipeline.data.splits import load_split
from pipeline.images.read import prepare

EACH = 1000  # images of a kind; of letters as many as there are
SIDE = 140  # pixels of the paper that letters and scribbles are drawn on
POINTS, SWINGS = 300, 8  # of a scribble; how many swings make one
INK_ON_PAPER = (20, 235)  # gray levels
# Written by hand these may be just what a digit is: 1, 0, 5, 2, 6, 9.
LOOKALIKES = frozenset("IlOoSsZzbgq")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SIGNS = "+=?&@#$%*~<>"
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif"),
    *("DejaVuSerif-Bold", "DejaVuSerif-Italic", "cmr10", "cmss10", "cmtt10", "cmti10", "cmb10"),
)
PILLOWS = "Pillow's own"  # font
FONTS_HELD_BACK = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", PILLOWS)


@dataclass(frozen=True)
class Kind:
    """Things of one kind, as a model gets them."""

    name: str
    images: np.ndarray  # uint8 (N, 1, 28, 28)
    is_counted: bool = True  # among what has to be refused; not what may look like a digit


def kinds(clothes: Path, seed: int = 0) -> list[Kind]:
    """Every kind; the clothes of Fashion-MNIST's test split from its cache in `clothes`."""
    rng = np.random.default_rng(seed)
    worn = load_split("fashion-mnist", clothes, "test").images  # first: it may not be there
    (others, similar), (held_back, also) = letters(FONTS), letters(FONTS_HELD_BACK)
    return [
        Kind("clothes (Fashion-MNIST)", worn),
        Kind("clothes, dark on light", 255 - worn),
        Kind(f"letters of {len(FONTS)} fonts", others),
        Kind(f"letters of {len(FONTS_HELD_BACK)} fonts (held back)", held_back),
        Kind("scribbles", _each(scribble, rng)),
        Kind("zigzags (held back)", _each(zigzag, rng)),
        Kind("uniform noise", _each(uniform, rng)),
        Kind("Gaussian noise", _each(gaussian, rng)),
        Kind("blank paper", _each(blank, rng)),
        Kind(
            f"letters that may be digits ({' '.join(sorted(LOOKALIKES, key=str.lower))})",
            np.concatenate([similar, also]),
            is_counted=False,
        ),
        Kind(f"signs ({' '.join(SIGNS)})", signs((*FONTS, *FONTS_HELD_BACK)), is_counted=False),
    ]


def _each(
    make: Callable[[np.random.Generator], np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    return np.stack([make(rng) for _ in range(EACH)])


def letters(fonts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Letters of fonts as pictures of digits are prepared, (N, 1, 28, 28).

    The second are those that may be digits.
    """
    drawn: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for name in fonts:
        font = _font(name)
        for letter in LETTERS:
            drawn[letter in LOOKALIKES].append(prepare(_letter(letter, font)))
    return np.stack(drawn[False]), np.stack(drawn[True])


def signs(fonts: tuple[str, ...]) -> np.ndarray:
    """Signs of fonts as pictures of digits are prepared, (N, 1, 28, 28)."""
    drawn = [_letter(sign, font) for font in map(_font, fonts) for sign in SIGNS]
    return np.stack([prepare(picture) for picture in drawn])


def _font(name: str) -> ImageFont.FreeTypeFont:
    if name != PILLOWS:
        return ImageFont.truetype(_font_folder() / f"{name}.ttf", SIDE // 2)
    font = ImageFont.load_default(SIDE // 2)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _font_folder() -> Path:
    """Where matplotlib, which nothing here needs to import, has its fonts."""
    found = importlib.util.find_spec("matplotlib")
    assert found
    assert found.origin
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


def _letter(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    ink, paper = INK_ON_PAPER
    canvas = Image.new("L", (SIDE, SIDE), paper)
    ImageDraw.Draw(canvas).text((SIDE / 2, SIDE / 2), letter, ink, font, anchor="mm")
    return np.asarray(canvas)


def scribble(rng: np.random.Generator) -> np.ndarray:
    """The path of a pen that swings back and forth and does not stop, uint8 (1, 28, 28)."""
    time = np.linspace(0, rng.uniform(3, 6), POINTS)
    swings = rng.normal(size=(SWINGS, 2, 1)) / np.arange(1, SWINGS + 1)[:, None, None] ** 0.5
    phases = rng.uniform(0, 2 * np.pi, (SWINGS, 2, 1))
    speeds = np.arange(1, SWINGS + 1)[:, None, None] * rng.uniform(0.8, 1.2, (SWINGS, 2, 1))
    path = (swings * np.sin(speeds * time + phases)).sum(axis=0)  # (2, P)
    path -= (path.max(axis=1, keepdims=True) + path.min(axis=1, keepdims=True)) / 2
    return _drawn(path / np.abs(path).max(axis=1, keepdims=True), rng)


def zigzag(rng: np.random.Generator) -> np.ndarray:
    """A pen that crosses something out: back and forth, and along, uint8 (1, 28, 28)."""
    corners = int(rng.integers(6, 15))
    along = np.linspace(-1, 1, corners) * rng.uniform(0.3, 1) + rng.normal(0, 0.15, corners)
    across = np.where(np.arange(corners) % 2, 1, -1) * rng.uniform(0.4, 1, corners)
    turn = rng.uniform(0, np.pi)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    path = turned @ np.stack([along, across])  # (2, P)
    return _drawn(path / np.abs(path).max(), rng)


def _drawn(path: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A path (2, P) from -1 to 1, drawn with some pen, as pictures of digits are prepared."""
    ink, paper = INK_ON_PAPER
    canvas = Image.new("L", (SIDE, SIDE), paper)
    line = [(x, y) for x, y in (path * 0.38 * SIDE + SIDE / 2).T]
    ImageDraw.Draw(canvas).line(line, ink, int(rng.integers(4, 11)), joint="curve")
    return prepare(np.asarray(canvas))


def uniform(rng: np.random.Generator) -> np.ndarray:
    """Noise of every gray level alike, uint8 (1, 28, 28)."""
    return rng.integers(0, 256, IMAGES.shape, np.uint8)


def gaussian(rng: np.random.Generator) -> np.ndarray:
    """Noise about a gray level of its own, as much of it as there is room."""
    level, deviation = rng.uniform(30, 225), rng.uniform(15, 80)
    return rng.normal(level, deviation, IMAGES.shape).clip(0, 255).astype(np.uint8)


def blank(rng: np.random.Generator) -> np.ndarray:
    """Paper of one level, more or less: white is 0, as ink is what the model sees."""
    level, deviation = rng.choice([0.0, rng.uniform(0, 255)]), rng.uniform(0, 4)
    return rng.normal(level, deviation, IMAGES.shape).clip(0, 255).astype(np.uint8)

"""Pictures of things that are not digits, generated from a seed, to test what a model refuses.

They are not used in training: `outliers.py` makes the outliers for training in another way, and
draws letters with strokes, without fonts. The kinds held back had no influence on it.
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

EACH = 1000  # images of a kind, except letters, all of which are used
SIDE = 140  # pixels of the paper that letters and scribbles are drawn on
POINTS, SWINGS = 300, 8  # of a scribble: points of its path, and its sine waves
INK_ON_PAPER = (20, 235)  # gray levels
# Handwritten, these may look the same as a digit: 1, 0, 5, 2, 6, 9.
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
    """Images of one kind of thing, as a model gets them."""

    name: str
    images: np.ndarray  # uint8 (N, 1, 28, 28)
    is_counted: bool = True  # has to be refused; False for lookalikes of digits


def make_kinds(clothes: Path, seed: int = 0) -> list[Kind]:
    """Make the images of every kind; `clothes` is the folder of Fashion-MNIST's cache."""
    rng = np.random.default_rng(seed)
    worn = load_split("fashion-mnist", clothes, "test").images  # first: it may be missing
    (others, similar), (held_back, also) = draw_letters(FONTS), draw_letters(FONTS_HELD_BACK)
    drawn_signs = draw_signs((*FONTS, *FONTS_HELD_BACK))
    alike = " ".join(sorted(LOOKALIKES, key=str.lower))
    return [
        Kind("clothes (Fashion-MNIST)", worn),
        Kind("clothes, dark on light", 255 - worn),
        Kind(f"letters of {len(FONTS)} fonts", others),
        Kind(f"letters of {len(FONTS_HELD_BACK)} fonts (held back)", held_back),
        Kind("scribbles", _repeat(scribble, rng)),
        Kind("zigzags (held back)", _repeat(zigzag, rng)),
        Kind("uniform noise", _repeat(uniform, rng)),
        Kind("Gaussian noise", _repeat(gaussian, rng)),
        Kind("blank paper", _repeat(blank, rng)),
        Kind(f"letters that may be digits ({alike})", np.concatenate([similar, also]), False),
        Kind(f"signs ({' '.join(SIGNS)})", drawn_signs, is_counted=False),
    ]


def _repeat(
    make: Callable[[np.random.Generator], np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    return np.stack([make(rng) for _ in range(EACH)])


def draw_letters(fonts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the letters of fonts, prepared as pictures of digits are, (N, 1, 28, 28).

    The second array has the letters that may be digits.
    """
    images = [(c in LOOKALIKES, _draw(c, font)) for font in map(_load_font, fonts) for c in LETTERS]
    others, similar = ([image for alike, image in images if alike == k] for k in (False, True))
    return np.stack(others), np.stack(similar)


def draw_signs(fonts: tuple[str, ...]) -> np.ndarray:
    """Draw the signs of fonts, prepared as pictures of digits are, (N, 1, 28, 28)."""
    return np.stack([_draw(sign, font) for font in map(_load_font, fonts) for sign in SIGNS])


def _load_font(name: str) -> ImageFont.FreeTypeFont:
    """Load a font of matplotlib's, without importing matplotlib, or Pillow's own."""
    if name == PILLOWS:
        font = ImageFont.load_default(SIDE // 2)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"{name}.ttf", SIDE // 2)


def _draw(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Draw a letter in the middle of the paper, prepared as pictures of digits are."""
    ink, paper = INK_ON_PAPER
    canvas = Image.new("L", (SIDE, SIDE), paper)
    ImageDraw.Draw(canvas).text((SIDE / 2, SIDE / 2), letter, ink, font, anchor="mm")
    return prepare(np.asarray(canvas))


def scribble(rng: np.random.Generator) -> np.ndarray:
    """Draw a scribble, the path of a pen that swings without stopping, uint8 (1, 28, 28)."""
    time = np.linspace(0, rng.uniform(3, 6), POINTS)
    swings = rng.normal(size=(SWINGS, 2, 1)) / np.arange(1, SWINGS + 1)[:, None, None] ** 0.5
    phases = rng.uniform(0, 2 * np.pi, (SWINGS, 2, 1))
    speeds = np.arange(1, SWINGS + 1)[:, None, None] * rng.uniform(0.8, 1.2, (SWINGS, 2, 1))
    path = (swings * np.sin(speeds * time + phases)).sum(axis=0)  # (2, P)
    path -= (path.max(axis=1, keepdims=True) + path.min(axis=1, keepdims=True)) / 2
    return _draw_path(path / np.abs(path).max(axis=1, keepdims=True), rng)


def zigzag(rng: np.random.Generator) -> np.ndarray:
    """Draw a zigzag, as of a pen that crosses something out, uint8 (1, 28, 28)."""
    corners = int(rng.integers(6, 15))
    along = np.linspace(-1, 1, corners) * rng.uniform(0.3, 1) + rng.normal(0, 0.15, corners)
    across = np.where(np.arange(corners) % 2, 1, -1) * rng.uniform(0.4, 1, corners)
    turn = rng.uniform(0, np.pi)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    path = turned @ np.stack([along, across])  # (2, P)
    return _draw_path(path / np.abs(path).max(), rng)


def _draw_path(path: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a path (2, P) from -1 to 1 with a random pen, prepared as pictures of digits are."""
    ink, paper = INK_ON_PAPER
    canvas = Image.new("L", (SIDE, SIDE), paper)
    line = [(x, y) for x, y in (path * 0.38 * SIDE + SIDE / 2).T]
    ImageDraw.Draw(canvas).line(line, ink, int(rng.integers(4, 11)), joint="curve")
    return prepare(np.asarray(canvas))


def uniform(rng: np.random.Generator) -> np.ndarray:
    """Make noise, uniform over all gray levels, uint8 (1, 28, 28)."""
    return rng.integers(0, 256, IMAGES.shape, np.uint8)


def gaussian(rng: np.random.Generator) -> np.ndarray:
    """Make Gaussian noise of random mean and deviation, clipped to uint8 (1, 28, 28)."""
    level, deviation = rng.uniform(30, 225), rng.uniform(15, 80)
    return rng.normal(level, deviation, IMAGES.shape).clip(0, 255).astype(np.uint8)


def blank(rng: np.random.Generator) -> np.ndarray:
    """Make paper of one level with little noise, uint8 (1, 28, 28); white paper is 0."""
    level, deviation = rng.choice([0.0, rng.uniform(0, 255)]), rng.uniform(0, 4)
    return rng.normal(level, deviation, IMAGES.shape).clip(0, 255).astype(np.uint8)

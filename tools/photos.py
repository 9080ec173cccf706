"""Test digits as realistic pictures under seeded conditions, as the contents of files.

Real MNIST digits are drawn large with a pen on paper, lit, and photographed; paper, lines, light
and lenses come from a random generator.
"""

# Shape letters: H height and W width of a picture. Coverage is how much of a pixel is ink, 0 to 1.

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import ExifTags, Image, ImageFilter

Rng = np.random.Generator
Shape = tuple[int, int]  # H, W
Colour = tuple[int, int, int]
BICUBIC, Turn = Image.Resampling.BICUBIC, Image.Transpose
STORED = {3: Turn.ROTATE_180, 6: Turn.ROTATE_90, 8: Turn.ROTATE_270}  # by EXIF orientation


def _smooth(rng: Rng, shape: Shape, cells: int) -> np.ndarray:
    """Make noise (H, W) of standard deviation about 1, with `cells` bumps on the longer side."""
    rows = max(2, round(cells * shape[0] / max(shape)))
    columns = max(2, round(cells * shape[1] / max(shape)))
    coarse = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), BICUBIC))


def _plane(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates y (H, 1) and x (1, W) from -0.5 to 0.5."""
    y = np.linspace(-0.5, 0.5, shape[0], dtype=np.float32)[:, np.newaxis]
    x = np.linspace(-0.5, 0.5, shape[1], dtype=np.float32)[np.newaxis]
    return y, x


def texture(rng: Rng, shape: Shape, strength: float) -> np.ndarray:
    """Make the unevenness (H, W) of paper, at fine to coarse scales."""
    cells = (max(shape) // 2, max(shape) // 8, 12)
    fine, middle, coarse = (_smooth(rng, shape, count) for count in cells)
    return strength * (0.6 * fine + 0.5 * middle + 0.6 * coarse)


def gradient(rng: Rng, shape: Shape) -> np.ndarray:
    """Make light (H, W) from one side, with corners darkened by the lens."""
    y, x = _plane(shape)
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.6)
    across = x * float(np.cos(angle)) + y * float(np.sin(angle))
    lit = (1 - fall * (across + 0.5)) * (1 - rng.uniform(0, 0.4) * (x * x + y * y))
    return np.asarray(lit * rng.uniform(0.75, 1.0))


def shadow(rng: Rng, shape: Shape) -> np.ndarray:
    """Make light (H, W) with the shadow of a hand or phone: a soft edge through the picture."""
    y, x = _plane(shape)
    angle, place = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25)
    bend = rng.uniform(-1, 1)
    across = x * float(np.cos(angle)) + y * float(np.sin(angle)) + bend * (x * x - y * y)
    softness = rng.uniform(0.01, 0.06)
    edge = 1 / (1 + np.exp(-np.clip((across - place) / softness, -30, 30)))
    return np.asarray(gradient(rng, shape) ** 0.5 * (1 - rng.uniform(0.3, 0.6) * edge))


def glare(rng: Rng, shape: Shape) -> np.ndarray:
    """Make light (H, W) with a lamp's bright spot on a shiny board."""
    y, x = _plane(shape)
    at_y, at_x = rng.uniform(-0.5, 0.5, 2)
    spot = np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / rng.uniform(0.01, 0.05))
    return np.asarray(gradient(rng, shape) * (1 + rng.uniform(0.1, 0.4) * spot))


def crumple(rng: Rng, shape: Shape) -> np.ndarray:
    """Make the light (H, W) on folded paper: facets of different brightness."""
    y, x = _plane(shape)
    lit = np.ones(shape, np.float32)
    for _ in range(int(rng.integers(2, 6))):
        angle, place = rng.uniform(0, np.pi), rng.uniform(-0.4, 0.4)
        across = x * float(np.cos(angle)) + y * float(np.sin(angle)) - place
        lit = lit * (1 + rng.uniform(0.03, 0.1) * np.sign(across) * np.exp(-np.abs(across) * 3))
    return lit * gradient(rng, shape) ** 0.6


def rule_lines(rng: Rng, shape: Shape, upright: bool = False) -> np.ndarray:
    """Make the darkness (H, W) of lines across the picture, 0 to 1."""
    y, x = _plane(shape)
    high = max(shape)
    tilt = float(np.tan(np.radians(rng.uniform(-2.5, 2.5))))
    along = (x if upright else y) * (shape[1] if upright else shape[0])
    along = along + tilt * (y if upright else x) * high
    spacing, width = high * rng.uniform(0.06, 0.14), max(1.0, high / 640 * rng.uniform(1, 2.2))
    off = np.abs((along / spacing + rng.random()) % 1 - 0.5) * spacing
    return np.asarray(np.clip(width / 2 + 0.5 - off, 0, 1) * rng.uniform(0.2, 0.5))


def square_lines(rng: Rng, shape: Shape) -> np.ndarray:
    """Make the darkness (H, W) of the lines of squared paper, 0 to 1."""
    seed = rng.integers(2**31)
    both = (rule_lines(np.random.default_rng(seed), shape, upright) for upright in (False, True))
    return np.asarray(np.maximum(*both))


def skew(image: Image.Image, by: float, rng: Rng) -> Image.Image:
    """Distort the picture as by a camera that is not straight above it."""
    width, height = image.size
    corners = np.array(((0, 0), (width, 0), (width, height), (0, height)), np.float64)
    inward = np.array(((1, 1), (-1, 1), (-1, -1), (1, -1))) * (width, height)
    seen = corners + inward * rng.uniform(0, by, (4, 2))
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, seen, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solved = tuple(np.linalg.solve(np.array(rows), np.array(values)))
    return image.transform(image.size, Image.Transform.PERSPECTIVE, solved, BICUBIC)


def turn(image: Image.Image, degrees: float) -> Image.Image:
    """Turn the picture, and crop it so that no corner is empty."""
    width, height = image.size
    sine = abs(np.sin(np.radians(degrees)))
    edge_x, edge_y = round(height * sine / 2) + 1, round(width * sine / 2) + 1
    return image.rotate(degrees, BICUBIC).crop((edge_x, edge_y, width - edge_x, height - edge_y))


def thin(ink: np.ndarray) -> np.ndarray:
    """Return the skeleton of ink, bool (H, W): strokes one pixel wide (Zhang and Suen 1984)."""
    ink = np.pad(ink, 1)
    while True:
        before = ink.sum()
        for first in (True, False):
            p2, p3, p4 = ink[:-2, 1:-1], ink[:-2, 2:], ink[1:-1, 2:]
            p5, p6, p7 = ink[2:, 2:], ink[2:, 1:-1], ink[2:, :-2]
            p8, p9 = ink[1:-1, :-2], ink[:-2, :-2]
            ring = (p2, p3, p4, p5, p6, p7, p8, p9)
            count = np.sum(ring, axis=0)
            steps = np.sum([~a & b for a, b in zip(ring, (*ring[1:], p2), strict=True)], axis=0)
            ends = (p4 & p6 & (p2 | p8)) if first else (p2 & p8 & (p4 | p6))
            gone = ink[1:-1, 1:-1] & (count >= 2) & (count <= 6) & (steps == 1) & ~ends
            ink = ink.copy()
            ink[1:-1, 1:-1] &= ~gone
        if ink.sum() == before:
            return np.asarray(ink[1:-1, 1:-1])


@dataclass(frozen=True)
class Scene:
    """Conditions of a picture: pen, paper, light and camera."""

    shape: Shape = (360, 480)
    share: tuple[float, float] = (0.3, 0.65)  # the digit's height by the picture's shorter side
    pen: str = "own"  # the digit's own stroke, or thick, or hair
    turn: float = 4.0  # largest turn of the digit, in degrees
    paper: Colour = (236, 232, 222)
    ink: Colour = (38, 40, 58)
    opacity: tuple[float, float] = (0.8, 1.0)  # of the ink
    texture: float = 0.01  # of the paper, as a fraction of its level
    lines: Callable[[Rng, Shape], np.ndarray] | None = None  # darkness (H, W), 0 to 1
    lighting: Callable[[Rng, Shape], np.ndarray] | None = None  # factor (H, W)
    perspective: float = 0.0  # largest shift of a corner, as a fraction of each side
    camera: float = 0.0  # largest turn of the picture, in degrees
    blur: tuple[float, float] = (0.0, 0.8)  # radius in pixels
    noise: float = 2.0  # standard deviation in gray levels
    quality: int = 88  # of the JPEG; 0 for a PNG
    orientation: int = 1  # EXIF
    mode: str = "RGB"
    enlarged: int = 1  # enlargement by the camera, in each direction
    margins: tuple[float, ...] = ()  # one is left around the ink, as a fraction of its longer side


def _jitter(colour: Colour, rng: Rng) -> np.ndarray:
    return np.clip(np.add(colour, rng.uniform(-12, 12, 3)), 0, 255).astype(np.float32)


def _to_picture(levels: np.ndarray) -> Image.Image:
    """Convert levels, clipped to 0 to 255, to a picture."""
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def draw_glyph(digit: np.ndarray, side: float, pen: str, rng: Rng) -> np.ndarray:
    """Draw a digit (28, 28) `side` pixels high with sharp edges; return its coverage."""
    length = max(8, round(side * 28 / 20))
    fine = 168 if pen == "hair" else length
    large = Image.fromarray(digit).resize((fine, fine), BICUBIC)
    large = large.filter(ImageFilter.GaussianBlur(fine / 60))
    if pen == "thick":
        width = 2 * max(1, round(side * rng.uniform(0.02, 0.045))) + 1
        large = large.filter(ImageFilter.MaxFilter(width))
        large = large.filter(ImageFilter.GaussianBlur(fine / 100))
    if pen == "hair":
        width = max(1, round(rng.uniform(1.0, 2.2)))
        return _draw_hairline(thin(np.asarray(large) > 150), length, width)
    gain = max(1.0, length / 28 / 1.5)
    return np.clip((np.asarray(large, np.float32) - 120) * gain / 255 + 0.5, 0, 1)


def _draw_hairline(skeleton: np.ndarray, length: int, width: int) -> np.ndarray:
    """Draw a skeleton as a line about `width` pixels wide, in a square of `length` pixels."""
    large = np.asarray(_to_picture(skeleton * 255).resize((length, length)), np.float32)
    picture = _to_picture(large * 2.5 * length / 168)
    line = _to_picture(thin(np.asarray(picture) > 100) * 255)
    if width > 1:
        line = line.filter(ImageFilter.MaxFilter(3))
    return np.asarray(line.filter(ImageFilter.GaussianBlur(0.5)), np.float32) / 255


def draw_digit(digit: np.ndarray, scene: Scene, rng: Rng) -> np.ndarray:
    """Draw a digit at a random place in the picture; return its coverage (H, W)."""
    height, width = scene.shape
    side = rng.uniform(*scene.share) * min(scene.shape)
    coverage = draw_glyph(digit, side, scene.pen, rng)
    picture = _to_picture(coverage * 255).rotate(rng.uniform(-scene.turn, scene.turn), BICUBIC)
    rooms = (width - picture.width, height - picture.height)
    edge = scene.perspective + scene.camera / 60  # a margin that the camera may cut off
    x, y = (round(rng.uniform(edge, 1 - edge) * room) for room in rooms)
    canvas = Image.new("L", (width, height))
    canvas.paste(picture, (x, y))
    return np.asarray(canvas, np.float32) / 255


def take_photo(digit: np.ndarray, scene: Scene, rng: Rng) -> bytes:
    """Make a picture of a digit, uint8 (28, 28), in a scene; return the content of its file."""
    coverage = draw_digit(digit, scene, rng)[..., np.newaxis] * rng.uniform(*scene.opacity)
    paper = np.ones((*scene.shape, 1), np.float32)
    if scene.texture:
        paper = paper + texture(rng, scene.shape, scene.texture)[..., np.newaxis]
    paper = paper * _jitter(scene.paper, rng)
    if scene.lines:
        dark = scene.lines(rng, scene.shape)[..., np.newaxis]
        paper = paper * (1 - dark * np.array((1.0, 0.75, 0.45), np.float32))
    picture = paper * (1 - coverage) + _jitter(scene.ink, rng) * coverage
    if scene.lighting:
        picture = picture * scene.lighting(rng, scene.shape)[..., np.newaxis]
    return _take(picture, coverage[..., 0], scene, rng)


def _take(picture: np.ndarray, coverage: np.ndarray, scene: Scene, rng: Rng) -> bytes:
    """Photograph the levels (H, W, 3) with the scene's camera; return the content of the file.

    A scene with margins has a straight camera, and its picture is cut to the ink (H, W).
    """
    image = _to_picture(picture)
    if scene.perspective:
        image = skew(image, scene.perspective, rng)
    if scene.camera:
        image = turn(image, rng.uniform(-scene.camera, scene.camera))
    image = image.resize([scene.enlarged * length for length in image.size])
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*scene.blur)))
    if scene.noise:
        levels = np.asarray(image, np.float32)
        image = _to_picture(levels + rng.standard_normal(levels.shape, np.float32) * scene.noise)
    if scene.margins:
        y, x = np.nonzero(coverage > coverage.max() / 2)
        left, top, right, bottom = x.min(), y.min(), x.max() + 1, y.max() + 1
        edge = round(rng.choice(scene.margins) * max(right - left, bottom - top))
        ends = min(right + edge, image.width), min(bottom + edge, image.height)
        image = image.crop((max(left - edge, 0), max(top - edge, 0), *ends))
    return _encode(image.convert(scene.mode), scene)


def _encode(image: Image.Image, scene: Scene) -> bytes:
    buffer = io.BytesIO()
    if not scene.quality:
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = scene.orientation
    if scene.orientation in STORED:
        image = image.transpose(STORED[scene.orientation])
    image.save(buffer, "JPEG", quality=scene.quality, exif=exif)
    return buffer.getvalue()


def _coloured(rng: Rng) -> Scene:
    papers = ((250, 225, 120), (180, 220, 245), (245, 190, 200), (190, 230, 180), (225, 205, 170))
    inks = ((150, 30, 40), (30, 60, 150), (20, 100, 60), (100, 40, 120), (60, 40, 30))
    paper, ink = rng.choice(papers), rng.choice(inks)
    return Scene(paper=tuple(paper), ink=tuple(ink), lighting=gradient)


def _tiny(rng: Rng) -> Scene:
    side = int(rng.integers(26, 60))
    high = rng.uniform(10, 16) / side
    paper, shape, share, blur = (255, 255, 255), (side, side), (high, high), (0, 0.3)
    return Scene(shape, share, turn=2, paper=paper, texture=0, noise=1, quality=0, blur=blur)


def _transparent(rng: Rng) -> Scene:
    ink = (20, 20, 20) if rng.random() < 0.5 else (240, 240, 240)
    return Scene((300, 400), ink=ink, mode="RGBA", quality=0)


def _screenshot(rng: Rng) -> Scene:
    dark = rng.random() < 0.4
    paper, ink = ((24, 26, 30), (235, 235, 235)) if dark else ((255, 255, 255), (10, 10, 10))
    return Scene(
        (360, 360), (0.3, 0.9), paper=paper, ink=ink, texture=0, noise=0, quality=0, blur=(0, 0)
    )


MARGINS = (0.0, 0.01, 0.03)  # of a picture that is cut to its digit
_RULED = Scene(lines=rule_lines, ink=(28, 40, 110), lighting=gradient, turn=3)
SCENES: dict[str, Callable[[Rng], Scene]] = {
    "scan": lambda rng: Scene((420, 340), paper=(250, 250, 248), noise=3, mode="L"),
    "phone": lambda rng: Scene(lighting=gradient),
    "shadow": lambda rng: Scene(lighting=shadow),
    "texture": lambda rng: Scene(texture=0.07, paper=(205, 190, 160), lighting=gradient),
    "ruled": lambda rng: _RULED,
    "squared": lambda rng: replace(_RULED, lines=square_lines),
    "blur": lambda rng: Scene(blur=(2, 5), lighting=gradient),
    "perspective": lambda rng: Scene(perspective=0.12, lighting=gradient),
    "noise": lambda rng: Scene(noise=22, lighting=gradient),
    "jpeg": lambda rng: Scene((240, 320), quality=12, lighting=gradient),
    "marker": lambda rng: Scene(pen="thick", ink=(20, 20, 24), lighting=gradient),
    "hairline": lambda rng: Scene(pen="hair", share=(0.4, 0.8), noise=1, blur=(0, 0.4)),
    "pencil": lambda rng: Scene(ink=(120, 118, 115), opacity=(0.55, 0.85), texture=0.02),
    "white on black": lambda rng: Scene(
        paper=(34, 42, 38), ink=(225, 228, 220), lighting=gradient, texture=0.06
    ),
    "transparent": _transparent,
    "tiny": _tiny,
    "huge": lambda rng: Scene((600, 800), (0.12, 0.5), lighting=gradient, enlarged=3),
    "coloured": _coloured,
    "exif": lambda rng: Scene(lighting=gradient, orientation=int(rng.choice([3, 6, 8]))),
    "camera": lambda rng: replace(_RULED, camera=7.0),
    "screenshot": _screenshot,
    # Held back: nothing was tuned on these.
    "crumpled": lambda rng: Scene(texture=0.02, lighting=crumple),
    "whiteboard": lambda rng: Scene(
        paper=(205, 210, 214), ink=(40, 60, 150), lighting=glare, perspective=0.08
    ),
    "pencil on squares": lambda rng: Scene(
        lines=square_lines, ink=(95, 95, 98), opacity=(0.7, 0.95), lighting=gradient
    ),
    "cropped, coloured": lambda rng: replace(_coloured(rng), margins=MARGINS),
    # Pictures cut to the digit; tuned on.
    "cropped": lambda rng: Scene(lighting=gradient, margins=MARGINS),
    "cropped, blurred": lambda rng: Scene(blur=(2, 5), lighting=gradient, margins=MARGINS),
    "cropped, light ink": lambda rng: Scene(
        paper=(34, 42, 38), ink=(225, 228, 220), blur=(0, 4), lighting=gradient, margins=MARGINS
    ),
}
HELD_BACK = ("crumpled", "whiteboard", "pencil on squares", "cropped, coloured")


def make_pictures(condition: str, digits: np.ndarray, seed: int = 0) -> Iterator[bytes]:
    """Yield digits, uint8 (N, 1, 28, 28), as contents of files under a condition, by seed."""
    number = list(SCENES).index(condition)
    for index, digit in enumerate(digits):
        rng = np.random.default_rng((seed, number, index))
        scene = SCENES[condition](rng)
        make = _cut_out if scene.mode == "RGBA" else take_photo
        yield make(digit[0], scene, rng)


def _cut_out(digit: np.ndarray, scene: Scene, rng: Rng) -> bytes:
    """Make a PNG of the ink alone; other pixels are transparent."""
    coverage = draw_digit(digit, scene, rng) * 255
    levels = np.empty((*scene.shape, 4), np.uint8)
    levels[..., :3] = _jitter(scene.ink, rng)
    levels[..., 3] = coverage
    return _encode(Image.fromarray(levels), scene)

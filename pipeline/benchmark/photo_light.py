"""Paper, lines, light and lenses for pictures of digits, each from a random generator."""

# Shape letters: H height, W width.

import numpy as np
from PIL import Image

Rng = np.random.Generator
Shape = tuple[int, int]  # H, W


def _smooth(rng: Rng, shape: Shape, cells: int) -> np.ndarray:
    """Noise (H, W) of standard deviation about 1 whose bumps are a `cells`-th of the picture."""
    rows = max(2, round(cells * shape[0] / max(shape)))
    columns = max(2, round(cells * shape[1] / max(shape)))
    coarse = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _plane(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates y (H, 1) and x (1, W) from -0.5 to 0.5."""
    y = np.linspace(-0.5, 0.5, shape[0], dtype=np.float32)[:, np.newaxis]
    x = np.linspace(-0.5, 0.5, shape[1], dtype=np.float32)[np.newaxis]
    return y, x


def texture(rng: Rng, shape: Shape, strength: float) -> np.ndarray:
    """Paper's own unevenness (H, W), from grains to clouds."""
    cells = (max(shape) // 2, max(shape) // 8, 12)
    layers = [_smooth(rng, shape, count) for count in cells]
    return strength * (0.6 * layers[0] + 0.5 * layers[1] + 0.6 * layers[2])


def gradient(rng: Rng, shape: Shape) -> np.ndarray:
    """Light from one side, and a lens that is darker at its corners."""
    y, x = _plane(shape)
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.6)
    across = x * float(np.cos(angle)) + y * float(np.sin(angle))
    lit: np.ndarray = (1 - fall * (across + 0.5)) * (1 - rng.uniform(0, 0.4) * (x * x + y * y))
    return lit * rng.uniform(0.75, 1.0)


def shadow(rng: Rng, shape: Shape) -> np.ndarray:
    """The shadow of a hand or a phone: a soft edge through the picture."""
    y, x = _plane(shape)
    angle, place = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25)
    bend = rng.uniform(-1, 1)
    across = x * float(np.cos(angle)) + y * float(np.sin(angle)) + bend * (x * x - y * y)
    softness = rng.uniform(0.01, 0.06)
    edge = 1 / (1 + np.exp(-np.clip((across - place) / softness, -30, 30)))
    lit: np.ndarray = gradient(rng, shape) ** 0.5 * (1 - rng.uniform(0.3, 0.6) * edge)
    return lit


def glare(rng: Rng, shape: Shape) -> np.ndarray:
    """A lamp's bright spot on a shiny board."""
    y, x = _plane(shape)
    at_y, at_x = rng.uniform(-0.5, 0.5, 2)
    spot = np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / rng.uniform(0.01, 0.05))
    lit: np.ndarray = gradient(rng, shape) * (1 + rng.uniform(0.1, 0.4) * spot)
    return lit


def crumpled(rng: Rng, shape: Shape) -> np.ndarray:
    """Folded paper: facets that take the light differently."""
    y, x = _plane(shape)
    lit = np.ones(shape, np.float32)
    for _ in range(int(rng.integers(2, 6))):
        angle, place = rng.uniform(0, np.pi), rng.uniform(-0.4, 0.4)
        across = x * float(np.cos(angle)) + y * float(np.sin(angle)) - place
        lit = lit * (1 + rng.uniform(0.03, 0.1) * np.sign(across) * np.exp(-np.abs(across) * 3))
    return lit * gradient(rng, shape) ** 0.6


def ruled(rng: Rng, shape: Shape, upright: bool = False) -> np.ndarray:
    """Lines across the picture: how dark (H, W), 0 to 1."""
    y, x = _plane(shape)
    high = max(shape)
    tilt = float(np.tan(np.radians(rng.uniform(-2.5, 2.5))))
    along = (x if upright else y) * (shape[1] if upright else shape[0])
    along = along + tilt * (y if upright else x) * high
    spacing, width = high * rng.uniform(0.06, 0.14), max(1.0, high / 640 * rng.uniform(1, 2.2))
    off = np.abs((along / spacing + rng.random()) % 1 - 0.5) * spacing
    dark: np.ndarray = np.clip(width / 2 + 0.5 - off, 0, 1) * rng.uniform(0.2, 0.5)
    return dark


def squared(rng: Rng, shape: Shape) -> np.ndarray:
    """Squared paper: how dark (H, W), 0 to 1."""
    state = rng.integers(2**31)
    across = ruled(np.random.default_rng(state), shape)
    upright = ruled(np.random.default_rng(state), shape, upright=True)
    return np.asarray(np.maximum(across, upright))


def seen_askew(image: Image.Image, by: float, rng: Rng) -> Image.Image:
    """The picture from a camera that was not held straight above it."""
    width, height = image.size
    corners = np.array(((0, 0), (width, 0), (width, height), (0, height)), np.float64)
    inward = np.array(((1, 1), (-1, 1), (-1, -1), (1, -1))) * (width, height)
    seen = corners + inward * rng.uniform(0, by, (4, 2))
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, seen, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solved = np.linalg.solve(np.array(rows), np.array(values))
    how = Image.Resampling.BICUBIC
    return image.transform(image.size, Image.Transform.PERSPECTIVE, tuple(solved), how)


def turned(image: Image.Image, degrees: float) -> Image.Image:
    """The picture turned, and cut so that no corner is empty."""
    width, height = image.size
    sine = abs(np.sin(np.radians(degrees)))
    edge_x, edge_y = round(height * sine / 2) + 1, round(width * sine / 2) + 1
    return image.rotate(degrees, Image.Resampling.BICUBIC).crop(
        (edge_x, edge_y, width - edge_x, height - edge_y)
    )


def thinned(ink: np.ndarray) -> np.ndarray:
    """The skeleton of ink, bool (H, W): strokes one pixel wide (Zhang and Suen 1984)."""
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

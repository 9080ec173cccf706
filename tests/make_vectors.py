"""Write the test vectors of RULES.md: pictures, and what they become.

Run it after a change of the rules: python tests/make_vectors.py
"""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from pipeline.core.strings import read_string
from pipeline.data.splits import load_split
from pipeline.images.read import find_digit, read_gray
from tools import photos as photo_light
from tools.photos import SCENES, Scene, take_photo

VECTORS = Path(__file__).parent / "vectors"
LARGER = {"ruled": (300, 400), "squared": (240, 320), "camera": (300, 400)}
COLOURED = ("coloured", "whiteboard", "marker")


def photos(digits: np.ndarray) -> Iterator[tuple[str, Image.Image]]:
    """One picture of each condition, small."""
    for number, (name, make) in enumerate(SCENES.items()):
        rng = np.random.default_rng((7, number))
        scene = make(rng)
        shape = scene.shape if name == "tiny" else LARGER.get(name, (132, 176))
        scene = replace(scene, shape=shape, enlarged=1, orientation=1, mode="RGB")
        content = take_photo(digits[number], scene, rng)
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        yield (
            name.replace(", ", "-").replace(" ", "-"),
            picture.convert("RGB" if name in COLOURED else "L"),
        )


def drawn(digits: np.ndarray) -> Iterator[tuple[str, Image.Image]]:
    """Pictures without noise: prepared ones, enlarged ones, cut off, transparent, blank."""
    for index in (0, 1, 2, 3):
        yield f"mnist-{index}", Image.fromarray(digits[index])
    for index in (4, 5):
        yield f"mnist-inverted-{index}", Image.fromarray(255 - digits[index])
    large = np.pad(np.kron(digits[6], np.ones((9, 9), np.uint8)), ((5, 90), (40, 0)))
    yield "enlarged", Image.fromarray(large)
    smooth = Image.fromarray(255 - digits[7]).resize((1500, 1300), Image.Resampling.BICUBIC)
    yield "large", smooth
    yield "cut-off", smooth.crop((300, 300, 1200, 1300)).resize((90, 100))
    yield "small", Image.fromarray(digits[8]).resize((14, 14), Image.Resampling.BOX)
    ink = Image.fromarray(digits[9]).resize((84, 84), Image.Resampling.BICUBIC)
    for name, level in (("dark", 30), ("bright", 230)):
        plain = Image.new("L", ink.size, level)
        yield f"transparent-{name}-ink", Image.merge("RGBA", (plain, plain, plain, ink))
    paper = ImageOps.invert(ink).convert("RGBA")
    paper.paste((0, 0, 0, 0), (0, 0, 84, 9))
    yield "transparent-strip", paper
    yield "gray-on-gray", ink.point(lambda level: 100 + level // 4)
    yield "hairline-drawn", _lines([(30, 20), (90, 25), (60, 120)], 1)
    yield "two-strokes", _lines([(30, 20), (90, 25)], 8, [(60, 40), (55, 120)])
    pair = Image.new("L", (700, 300), 240)
    for index, place in ((11, (60, 40)), (12, (230, 70)), (13, (480, 30))):
        pair.paste(ImageOps.invert(Image.fromarray(digits[index]).resize((200, 200))), place)
    yield "several", pair
    yield "specks", _lines([(30, 20), (90, 25), (60, 120)], 9, [(5, 130), (6, 131)])
    scene = Scene((200, 260), lines=photo_light.square_lines, texture=0, noise=0, quality=0)
    content = take_photo(digits[10], scene, np.random.default_rng(3))
    yield "squared-drawn", Image.open(io.BytesIO(content)).convert("L")


def blank() -> Iterator[tuple[str, Image.Image]]:
    """Pictures without a digit, or too small for one."""
    rng = np.random.default_rng(0)
    yield "white", Image.new("L", (30, 20), 255)
    yield "black", Image.new("L", (20, 30), 0)
    yield "one-pixel", Image.new("L", (1, 1), 77)
    yield "row", Image.fromarray(rng.integers(0, 256, (1, 50), np.uint8))
    yield "noise", Image.fromarray(rng.integers(0, 256, (40, 60), np.uint8))
    light = np.linspace(150, 230, 90) + rng.normal(0, 4, (70, 90))
    yield "uneven", Image.fromarray(light.astype(np.uint8))
    yield "faint", Image.fromarray(rng.integers(200, 214, (25, 25), np.uint8))
    edge = np.tile(np.arange(0, 240, 4), (40, 1))
    yield "edge", Image.fromarray(edge.astype(np.uint8))
    squares = Image.new("L", (400, 400), 240)
    for across in (3, 43, 83, 123, 163, 203, 243, 283, 323, 363):  # the first one runs out
        ImageDraw.Draw(squares).line([(across + 5, 0), (across - 9, 400)], 150, 1)
        ImageDraw.Draw(squares).line([(0, across - 9), (400, across + 5)], 150, 1)
    levels = np.asarray(squares) + rng.normal(0, 2, (400, 400))
    yield "squared-blank", Image.fromarray(levels.astype(np.uint8))


def _lines(first: list[tuple[int, int]], width: int, *more: list[tuple[int, int]]) -> Image.Image:
    picture = Image.new("L", (120, 140), 255)
    for points in (first, *more):
        ImageDraw.Draw(picture).line(points, fill=0, width=width)
    return picture


def strips() -> Iterator[np.ndarray]:
    """Outputs (T, 11) of CTC networks: sure and unsure ones, repeated digits, none at all."""
    rng = np.random.default_rng(5)
    noises = {"2026": 0.5, "80331": 0.8, "1100": 1, "": 1, "7": 3, "99999": 1}
    for text, noise in noises.items():
        logits = rng.normal(size=(4 * len(text) + 3, 11)) * noise
        logits[:, 10] += 4
        for place, digit in enumerate(text):
            logits[4 * place + 1 : 4 * place + 3, int(digit)] += 6
        yield np.round(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), 4)


def write_strings() -> None:
    """Write strips of outputs, and what they are read as, to strings.json."""
    vectors = []
    for row in strips():
        answer = read_string(row, 3)
        read = {"readings": answer.readings, "places": answer.places}
        vectors.append(json.dumps({"outputs": row.tolist(), **read}))
    (VECTORS / "strings.json").write_text("[\n" + ",\n".join(vectors) + "\n]\n")


def main() -> None:
    """Write the pictures as NAME.png, what they become to expected.json and parts.json.

    What strips of digits are read as is written to strings.json.
    """
    write_strings()
    split = load_split("mnist", Path(__file__).parent.parent / "data" / "mnist", "test")
    VECTORS.mkdir(exist_ok=True)
    expected, parts = {}, {}
    for name, picture in (*photos(split.images[100:, 0]), *drawn(split.images[:, 0]), *blank()):
        picture.save(VECTORS / f"{name}.png", optimize=True)
        gray, shape = read_gray(VECTORS / f"{name}.png")
        prepared = find_digit(gray, shape)
        expected[name], parts[name] = prepared.image.tobytes().hex(), prepared.parts
    for file, found in (("expected.json", expected), ("parts.json", parts)):
        lines = ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in found.items())
        (VECTORS / file).write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()

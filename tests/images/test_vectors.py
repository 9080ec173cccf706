"""The rules of RULES.md, held against its vectors in Python and in the page's JavaScript."""

import io
import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images.read import find_digit, prepare, read_gray, read_image
from tests.conftest import REPOSITORY

VECTORS = REPOSITORY / "tests" / "vectors"
EXPECTED: dict[str, str] = json.loads((VECTORS / "expected.json").read_text())
PARTS: dict[str, list[list[int]]] = json.loads((VECTORS / "parts.json").read_text())
SCRIPT = REPOSITORY / "pipeline" / "web" / "page" / "prepare.js"


def expected(name: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(EXPECTED[name]), np.uint8).reshape(1, 28, 28)


def in_javascript(pictures: list[Image.Image]) -> list[np.ndarray]:
    return [image for image, _ in with_parts_in_javascript(pictures)]


def with_parts_in_javascript(
    pictures: list[Image.Image],
) -> list[tuple[np.ndarray, list[list[int]]]]:
    node = shutil.which("node")
    if not node:
        pytest.skip("no node here")
    asked = b"".join(struct.pack("<II", *p.size) + p.convert("RGBA").tobytes() for p in pictures)
    command = [node, str(REPOSITORY / "tests" / "run_prepare.mjs"), str(SCRIPT)]
    done = subprocess.run(command, input=asked, capture_output=True, check=True)
    answers, stream = [], io.BytesIO(done.stdout)
    for _ in pictures:
        image = np.frombuffer(stream.read(784), np.uint8).reshape(1, 28, 28)
        (count,) = struct.unpack("<I", stream.read(4))
        boxes = np.frombuffer(stream.read(16 * count), "<u4").reshape(count, 4)
        answers.append((image, boxes.tolist()))
    return answers


def test_there_are_fifty_five_vectors_in_less_than_a_megabyte() -> None:
    files = sorted(VECTORS.glob("*.png"))
    assert {file.stem for file in files} == set(EXPECTED)
    assert len(files) == 55
    assert sum(file.stat().st_size for file in VECTORS.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", EXPECTED)
def test_a_vector_becomes_what_it_must_in_python(name: str) -> None:
    found = find_digit(*read_gray(VECTORS / f"{name}.png"))
    np.testing.assert_array_equal(found.image, expected(name))
    assert list(map(list, found.parts)) == PARTS[name]


@pytest.mark.slow
def test_the_vectors_become_the_same_in_javascript() -> None:
    found = with_parts_in_javascript([Image.open(VECTORS / f"{name}.png") for name in EXPECTED])
    wrong = [
        name
        for name, (image, parts) in zip(EXPECTED, found, strict=True)
        if not np.array_equal(image, expected(name)) or parts != PARTS[name]
    ]
    assert wrong == []


def test_any_small_picture_becomes_the_same_in_javascript(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(60):
        height, width = rng.integers(1, 60, 2)
        low = int(rng.integers(0, 255))
        levels = rng.integers(low, 256, (height, width), np.uint8)
        levels[rng.random((height, width)) < rng.random()] = rng.integers(0, 256)
        pictures.append(Image.fromarray(levels))
    for picture, (image, parts) in zip(pictures, with_parts_in_javascript(pictures), strict=True):
        prepared = find_digit(np.asarray(picture), picture.size[::-1])
        np.testing.assert_array_equal(prepared.image, image)
        assert list(map(list, prepared.parts)) == parts


def test_narrow_pictures_of_bright_ink_become_the_same_in_javascript() -> None:
    rng = np.random.default_rng(2)
    pictures = []
    for _ in range(40):  # the paper is taken to go on falling: ink is more than 255 above it
        height, width = rng.integers(8, 30), rng.integers(100, 300)
        levels = rng.normal(30, 15, (height, width)) + np.linspace(0, 40, width)
        levels[height // 4 : -height // 4, width // 2 - 3 : width // 2 + 3] = 255
        levels[:, width // 4 : width // 4 + 4] = rng.uniform(100, 255)
        levels[:2] += rng.uniform(0, 200)
        pictures.append(Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)))
    for picture, image in zip(pictures, in_javascript(pictures), strict=True):
        np.testing.assert_array_equal(prepare(np.asarray(picture)), image)


def test_transparent_colours_become_the_same_in_javascript(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (20 + turn, 30, 4), np.uint8)) for turn in range(20)
    ]
    for picture, image in zip(pictures, in_javascript(pictures), strict=True):
        picture.save(tmp_path / "picture.png")
        np.testing.assert_array_equal(read_image(tmp_path / "picture.png"), image)

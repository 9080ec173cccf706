"""Strips of digits: numbers as people write them, made of a data set's single digits.

The rules are those of the strips that a network is validated and tested on. Training makes its
strips in another way (`training/strips.py`), and from other digits.
"""

# Shape letters: M digits, N strips, H height, W width.

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.files import locked
from pipeline.core.signature import STRIPS, TEXT_LENGTH
from pipeline.core.strings import to_digits
from pipeline.data.catalog import DATASETS, NAMES
from pipeline.data.splits import RECORD, Report, is_intact, load_split, record_dataset

LENGTHS = (1, 3, 5, 10)  # digits of a strip
TEST_STRIPS, VALIDATION_STRIPS = 2000, 1000  # of each length
TEST_SEED, VALIDATION_SEED = 20, 21
HEIGHT = (16, 22)  # pixels of a digit, the same along a strip
GAP, GAP_OF_PAIR = (-3, 6), 2  # pixels between digits: of a strip, and what a pair's differs by
BASELINE = 2  # pixels by which a digit lies higher or lower than its strip
SLANT = 15  # degrees of a strip
INK = 64  # level from which a pixel counts as ink of a digit
_, _HIGH, _WIDE = STRIPS.shape


def build_strips(
    images: np.ndarray, labels: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return strips uint8 (N, H, W), `count` of each length in turn, and their texts, str (N,).

    They are made of digits uint8 (M, 1, 28, 28) with labels (M,); the seed decides all of it.
    """
    rng = np.random.default_rng(seed)
    inks = [image[0] for image in images]
    strips, texts = [], []
    for length in LENGTHS:
        for _ in range(count):
            chosen = rng.integers(len(images), size=length)
            strips.append(_write_strip([inks[index] for index in chosen], rng))
            texts.append("".join(str(labels[index]) for index in chosen))
    return np.stack(strips), np.array(texts)


def _write_strip(digits: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Write digits uint8 (28, 28) next to each other as one hand would, into uint8 (H, W)."""
    slant = math.tan(math.radians(rng.uniform(-SLANT, SLANT)))
    lean = math.ceil(abs(slant) * _HIGH / 2)  # pixels to the left and right of an upright strip
    while True:  # until it fits: a long one is written smaller
        height, gap = rng.integers(HEIGHT[0], HEIGHT[1] + 1), rng.uniform(*GAP)
        tiles = [_cut(digit, int(height)) for digit in digits]
        gaps = np.rint(gap + rng.uniform(-GAP_OF_PAIR, GAP_OF_PAIR, len(tiles))).astype(int)
        gaps[0] = 0
        lefts = np.cumsum([0, *(tile.shape[1] for tile in tiles[:-1])]) + np.cumsum(gaps)
        lefts -= lefts.min()
        length = max(left + tile.shape[1] for left, tile in zip(lefts, tiles, strict=True))
        if length + 2 * lean <= _WIDE:
            break
    strip = np.zeros((_HIGH, _WIDE), np.uint8)
    lefts += lean + rng.integers(_WIDE - length - 2 * lean + 1)
    for left, tile in zip(lefts, tiles, strict=True):
        top = (_HIGH - height) // 2 + rng.integers(-BASELINE, BASELINE + 1)
        place = strip[top : top + height, left : left + tile.shape[1]]
        np.maximum(place, tile, out=place)
    # Each row moves sideways by its distance from the middle.
    matrix = (1, slant, -slant * _HIGH / 2, 0, 1, 0)
    how = Image.Resampling.BILINEAR
    slanted = Image.fromarray(strip).transform((_WIDE, _HIGH), Image.Transform.AFFINE, matrix, how)
    return np.asarray(slanted)


def _cut(digit: np.ndarray, height: int) -> np.ndarray:
    """Cut a digit to its ink and scale it to this height, uint8 (height, W)."""
    rows, columns = (
        np.flatnonzero((digit >= INK).any(axis=1)),
        np.flatnonzero((digit >= INK).any(axis=0)),
    )
    ink = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = max(1, round(ink.shape[1] * height / ink.shape[0]))
    return np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC))


def fetch_strips(dataset: str, folder: Path, report: Report = lambda line: None) -> Path:
    """Build the strips of a data set such as `numbers` in `folder`; return `folder`.

    Strips to validate on are made of the validation digits of the data set that it is made of,
    those to test on of its test digits.
    """
    row = DATASETS[dataset]
    with locked(folder / ".lock"):
        if (folder / RECORD).exists() and is_intact(dataset, folder, report):
            report(f"{dataset}: already in {folder}, and matches its digests")
            return folder
        arrays: dict[str, np.ndarray] = {}
        parts = (
            ("validation", VALIDATION_STRIPS, VALIDATION_SEED),
            ("test", TEST_STRIPS, TEST_SEED),
        )
        for (split, count, seed), names in zip(parts, (NAMES[:2], NAMES[2:]), strict=True):
            report(f"{dataset}: making strips of the {split} digits of {row.made_of}")
            digits = load_split(row.made_of, folder.parent / row.made_of, split)
            strips, texts = build_strips(digits.images, digits.labels, count, seed)
            arrays |= dict(zip(names, (strips, to_digits(texts, TEXT_LENGTH)), strict=True))
        validation = len(arrays[NAMES[1]])
        record_dataset(
            folder,
            dataset,
            row.classes,
            arrays,
            validation,
            {"seeds": [seed for *_, seed in parts]},
        )
    report(f"{dataset}: {len(NAMES)} files in {folder}, their digests recorded in {RECORD}")
    return folder

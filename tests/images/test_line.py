"""A photo of a written line becomes a strip."""

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.data.splits import load_split
from pipeline.data.strips import build_strips
from pipeline.images.read import BlankError, prepare_picture
from tests.conftest import REPOSITORY


def write_numbers(count: int) -> np.ndarray:
    digits = load_split("mnist", REPOSITORY / "data" / "mnist", "test")
    return build_strips(digits.images[:500], digits.labels[:500], count, seed=4)[0]


def photograph(strip: np.ndarray, degrees: float = 0.0, shadow: float = 40.0) -> np.ndarray:
    """A strip written large on uneven paper, uint8 (H, W)."""
    columns = np.flatnonzero(strip.any(axis=0))
    ink = Image.fromarray(np.pad(strip[:, columns[0] : columns[-1] + 1], 12))
    large = ink.resize((4 * ink.width, 4 * ink.height), Image.Resampling.BICUBIC)
    turned = large.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    level = np.asarray(turned, np.float64) / 255
    paper = 220 - np.linspace(0, shadow, level.shape[1])
    noise = np.random.default_rng(0).normal(0, 2, level.shape)
    return np.asarray((paper * (1 - 0.75 * level) + noise).clip(0, 255), np.uint8)


@pytest.mark.parametrize("degrees", [0.0, 6.0, -8.0])
def test_a_photographed_line_becomes_a_strip_with_the_same_digits(degrees: float) -> None:
    for strip in write_numbers(1)[1:]:  # of 3, 5 and 10 digits
        prepared = prepare_picture(photograph(strip, degrees), pictures="line")
        assert prepared.image.shape == (1, 28, 280)
        assert len(prepared.parts) == 1
        high = np.flatnonzero(prepared.image[0].max(axis=1) > 128)
        assert 14 <= len(high) <= 27
        if not degrees:  # of the same height, the same strip
            rows, columns = (np.flatnonzero(strip.any(axis=axis)) for axis in (1, 0))
            ink = strip[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            mine = prepared.image[0]
            rows, columns = (np.flatnonzero((mine > 64).any(axis=axis)) for axis in (1, 0))
            box = mine[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            like = np.asarray(Image.fromarray(ink).resize(box.shape[::-1]), float)
            assert np.corrcoef(box.ravel(), like.ravel())[0, 1] > 0.75


def test_a_line_too_long_to_read_is_refused_in_words() -> None:
    strip = write_numbers(1)[3]
    columns = np.flatnonzero(strip.any(axis=0))
    number = strip[:, columns[0] : columns[-1] + 4]
    with pytest.raises(PipelineError, match="too long to read. Send at most 13 digits"):
        prepare_picture(photograph(np.hstack([number] * 3)), "form.png", "line")


def test_paper_without_ink_is_refused_as_for_a_digit() -> None:
    noise = np.random.default_rng(0).normal(200, 3, (90, 400)).astype(np.uint8)
    for paper in (np.full((80, 400), 200, np.uint8), noise):
        with pytest.raises(BlankError, match="no ink"):
            prepare_picture(paper, pictures="line")


def test_the_box_of_the_line_is_in_pixels_of_the_picture() -> None:
    strip = write_numbers(1)[1]
    photo = photograph(strip, shadow=0.0)
    ((left, top, right, bottom),) = prepare_picture(photo, pictures="line").parts
    rows, columns = (np.flatnonzero((photo < 120).any(axis=axis)) for axis in (1, 0))
    assert abs(left - columns[0]) + abs(right - columns[-1]) < 16
    assert abs(top - rows[0]) + abs(bottom - rows[-1]) < 16

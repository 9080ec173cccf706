"""What the report's figures show."""

import re

import pytest

from pipeline.core.evaluate import Bin
from pipeline.report import figures

LINES = [{"epoch": n / 10, "loss": 2.2 - n / 8, "validation_accuracy": 0.9} for n in range(1, 15)]
BINS = (Bin(30, 0.2, 0.25), Bin(400, 0.99, 1.0))


def heights(svg: str) -> dict[str, float]:
    """The y of each text of the figure, from its top in points."""
    matches = re.findall(r"<text[^>]*?(?:translate\([\d.]+ |\by=\")([\d.]+)[^>]*>([^<]*)<", svg)
    return {text: float(y) for y, text in matches}


@pytest.mark.parametrize(
    ("svg", "legend"),
    [
        (figures.draw_losses(LINES), ["one batch", "running mean"]),
        (figures.draw_reliability(BINS, BINS), ["calibrated", "before", "after"]),
        (figures.draw_confidence(BINS, BINS), ["before", "after"]),
        (figures.draw_margins([0.01, 3.0], {"fp32": 1e-5}), ["largest error", "fp32 1e-05"]),
    ],
    ids=["losses", "reliability", "confidence", "margins"],
)
def test_a_legend_stands_above_the_curves(svg: str, legend: list[str]) -> None:
    places = heights(svg)
    others = [y for text, y in places.items() if text not in legend]
    assert set(legend) <= set(places)
    assert max(places[text] for text in legend) < min(others)


def test_logarithmic_axes_have_labels_between_the_powers_of_ten_where_there_are_few() -> None:
    assert {"0.6", "1", "1.5", "2"} <= set(heights(figures.draw_losses(LINES)))
    wide = heights(figures.draw_margins([0.01, 3.0], {"fp32": 1e-5}))
    assert {"10⁻⁵", "10⁻⁴", "0.001", "0.1"} <= set(wide)
    assert not {"1e-05", "0.2", "2·10⁻⁴"} & set(wide)

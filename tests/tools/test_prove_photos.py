"""Pictures of digits under conditions, and how well a model reads them."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from pipeline.core.errors import PipelineError
from pipeline.data.splits import load_split
from tests.conftest import Chain
from tools import prove_photos
from tools.photos import HELD_BACK, SCENES, make_pictures
from tools.provenance import read_figure
from tools.readme import PAGES, RESULTS, render_page


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    from tests.conftest import project

    chain = project(tmp_path_factory.mktemp("photos"))
    return load_split("mnist", chain.paths.data("mnist"), "test").images[:2]


def test_there_are_more_than_twelve_conditions_and_four_are_held_back() -> None:
    assert len(SCENES) > 12
    assert len(HELD_BACK) == 4
    assert set(HELD_BACK) < set(SCENES)


@pytest.mark.parametrize("condition", [name for name in SCENES if name != "huge"])
def test_a_condition_makes_the_same_files_from_a_seed(condition: str, digits: np.ndarray) -> None:
    first = list(make_pictures(condition, digits, seed=1))
    assert first == list(make_pictures(condition, digits, seed=1))
    assert first != list(make_pictures(condition, digits, seed=2))
    picture = Image.open(io.BytesIO(first[0]))
    assert picture.mode in ("L", "RGB", "RGBA")
    assert np.ptp(np.asarray(picture)) > 40


def test_a_rotated_photo_says_so_in_its_exif(digits: np.ndarray) -> None:
    for content in make_pictures("exif", digits):
        picture = Image.open(io.BytesIO(content))
        assert picture.getexif()[ExifTags.Base.Orientation] in (3, 6, 8)


@pytest.mark.slow
def test_the_proof_reports_each_condition_and_what_was_held_back_apart(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove_photos, "SHORT", 2)
    names = ["phone", "tiny", *HELD_BACK]
    monkeypatch.setattr(prove_photos, "SCENES", {name: SCENES[name] for name in names})
    monkeypatch.chdir(chain.root)
    PAGES[0].write_text("<!-- figures:photos -->\n<!-- /figures -->\n")
    RESULTS.mkdir(parents=True)
    prove_photos.main([str(RESULTS / "photos.json"), "--short"])
    record = read_figure(RESULTS / "photos.json")
    assert [row["name"] for row in record["rows"]] == names
    assert record["total"]["images"] == 12
    assert record["held_back"]["images"] == 8
    for row in record["rows"]:
        assert 0 <= row["accuracy"] <= 1
        assert 0 <= row["calibration_error"] <= 1
    table = PAGES[0].read_text()
    assert "| crumpled (held back) |" in table
    assert "| phone |" in table
    assert render_page(table, RESULTS) == table


def test_photos_need_an_exported_model(empty: Chain) -> None:
    with pytest.raises(PipelineError, match="run 'pipeline export' first"):
        prove_photos.benchmark_photos(empty.paths)

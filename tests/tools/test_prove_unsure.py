import shutil
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import PipelineError
from tests.conftest import REPOSITORY, Chain, edit_json
from tools import nondigits, prove_unsure
from tools.provenance import read_figure
from tools.readme import PAGES, RESULTS, render_page

CLOTHES = REPOSITORY / "data" / "fashion-mnist"


@pytest.fixture(scope="module")
def clothed(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The small chain with clothes to be shown."""
    if not CLOTHES.is_dir():
        pytest.skip("no data/fashion-mnist here: pipeline data fetch --dataset fashion-mnist")
    chain = Chain(tmp_path_factory.mktemp("clothed") / "chain")
    shutil.copytree(made.root, chain.root, symlinks=True)
    (chain.root / "data" / "fashion-mnist").symlink_to(CLOTHES.resolve())
    return chain


def test_the_things_to_measure_with_are_the_same_every_time() -> None:
    for make in (
        *(nondigits.scribble, nondigits.zigzag, nondigits.uniform),
        *(nondigits.gaussian, nondigits.blank),
    ):
        once, again, other = (make(np.random.default_rng(seed)) for seed in (0, 0, 1))
        assert once.dtype == np.uint8
        assert once.shape == (1, 28, 28)
        assert np.array_equal(once, again)
        assert not np.array_equal(once, other)


@pytest.mark.slow
def test_letters_are_of_every_font_and_all_have_ink() -> None:
    for fonts in (nondigits.FONTS, nondigits.FONTS_HELD_BACK):
        others, similar = nondigits.draw_letters(fonts)
        assert len(others) + len(similar) == 52 * len(fonts)
        assert len(similar) == len(nondigits.LOOKALIKES) * len(fonts)
        assert all(image.max() == 255 for image in (*others, *similar))
        assert len({image.tobytes() for image in others}) > 0.9 * len(others)  # v is V in some


def test_no_font_is_held_back_and_chosen_by() -> None:
    assert not set(nondigits.FONTS) & set(nondigits.FONTS_HELD_BACK)


@pytest.mark.slow
def test_the_proof_says_how_much_of_each_kind_is_refused_and_tells_the_readme(
    clothed: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clothed.root)
    RESULTS.mkdir(parents=True)
    block = "<!-- figures:unsure -->\n<!-- /figures -->\n"
    PAGES[0].write_text(block)
    assert "*Not measured yet*: `make prove-unsure`" in render_page(block, RESULTS)
    prove_unsure.main([str(RESULTS / "unsure.json")])
    record = read_figure(RESULTS / "unsure.json")
    right, wrong = record["right"], record["wrong"]
    assert right["images"] + wrong["images"] == record["digits"]["images"] == 10_000
    assert right["refused"] + wrong["refused"] == record["digits"]["refused"]
    assert wrong["refused"] / wrong["images"] > 5 * right["refused"] / right["images"]
    counted = [row["refused"] / row["images"] for row in record["rows"] if row["is_counted"]]
    assert len(counted) == len(record["rows"]) - 2  # without letters that may be digits, and signs
    assert record["share"] == pytest.approx(np.mean(counted))
    text = PAGES[0].read_text()
    times = wrong["refused"] / wrong["images"] / (right["refused"] / right["images"])
    assert f"refused {times:,.0f} times as often" in text
    names = ("scribbles", "zigzags (held back)", "clothes, dark on light", "test digits")
    for name in (*names, "read wrongly"):
        assert f"\n| {name} | " in text
    assert "`make prove-unsure NAME=handwriting`" in text


def set_dataset(record: dict[str, Any]) -> None:
    record["training"]["dataset"] = "fashion-mnist"


def test_a_model_of_no_digits_or_without_a_threshold_is_not_measured(chain: Chain) -> None:
    before = chain.paths.manifest.read_bytes()
    edit_json(chain.paths.manifest, lambda record: record.pop("min_probability"))
    with pytest.raises(PipelineError, match="pipeline train --run handwriting"):
        prove_unsure.measure_unsure(chain.paths)
    chain.paths.manifest.write_bytes(before)
    edit_json(chain.paths.manifest, set_dataset)
    with pytest.raises(PipelineError, match="was not trained on MNIST"):
        prove_unsure.measure_unsure(chain.paths)


def test_without_clothes_the_proof_says_how_to_fetch_them(chain: Chain) -> None:
    with pytest.raises(PipelineError, match="pipeline data fetch --dataset fashion-mnist"):
        prove_unsure.measure_unsure(chain.paths)

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.benchmark import nondigits
from pipeline.core.evaluate import REFUSED
from pipeline.data.splits import load_split
from pipeline.export.runtime import onnx_predictor
from pipeline.report.readme import rendered
from pipeline.repository import config_pbtxt
from pipeline.repository.lint.check import lint_repository
from tests.conftest import REPOSITORY, Chain, edit_json, error_line
from tools.mutations import write_model

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


def thresholds(chain: Chain) -> set[tuple[float, ...]]:
    """What each config says of being sure: of the selected version, then of every version."""
    found = set()
    for path in config_pbtxt.config_files(chain.paths.packaged):
        config = config_pbtxt.read(path)
        own = sorted(key for key in config_pbtxt.statements(config) if key.startswith("min_"))
        each = (float(config.parameters[key].string_value) for key in own)
        found.add((config_pbtxt.min_probability(config), *each))
    return found


def test_the_threshold_of_a_run_stands_in_every_config_of_its_model(made: Chain) -> None:
    fitted = json.loads(made.paths.summary.read_text())["min_probability"]
    assert 0.1 < fitted < 1
    assert json.loads(made.paths.manifest.read_text())["min_probability"] == fitted
    assert thresholds(made) == {(fitted, fitted)}


def test_the_threshold_refuses_its_share_of_the_validation_images(made: Chain) -> None:
    fitted = json.loads(made.paths.summary.read_text())["min_probability"]
    validation = load_split("mnist", made.paths.data("mnist"), "validation").images
    likeliest = onnx_predictor(made.paths.onnx.read_bytes())(validation).max(axis=1)
    refused = (np.exp(likeliest) < fitted).sum()
    assert abs(int(refused) - int(REFUSED * len(validation))) <= 1  # rounding of another runtime


def test_each_version_keeps_its_own_threshold(chain: Chain) -> None:
    first = json.loads(chain.paths.manifest.read_text())["min_probability"]
    edit_json(chain.paths.manifest, lambda record: record.update(min_probability=0.75))
    chain.record("package")
    assert thresholds(chain) == {(0.75, first, 0.75)}
    chain.record("versions", "promote", "1")
    assert thresholds(chain) == {(first, first, 0.75)}
    edit_json(chain.paths.manifest, lambda record: record.pop("min_probability"))
    chain.record("package")  # of a model that has none
    assert thresholds(chain) == {(0.0, first, 0.75)}
    chain.record("versions", "rollback")
    assert thresholds(chain) == {(first, first, 0.75)}


def test_pruned_versions_leave_no_threshold_behind(chain: Chain) -> None:
    for threshold in (0.6, 0.7):
        edit_json(chain.paths.manifest, lambda r, t=threshold: r.update(min_probability=t))  # type: ignore[misc]
        chain.record("package")
    chain.record("versions", "prune")
    assert thresholds(chain) == {(0.7, 0.6, 0.7)}


@pytest.mark.parametrize("key", ["min_probability", "min_probability.1"])
@pytest.mark.parametrize("value", ["often", "", "nan", "1.01", "-0.1", "inf"])
def test_lint_refuses_a_threshold_that_is_no_probability(
    tmp_path: Path, key: str, value: str
) -> None:
    folder = tmp_path / "repository" / "net"
    write_model(folder)
    config = config_pbtxt.read(folder / "config.pbtxt")
    for sound in ("0", "1", "0.5"):
        config_pbtxt.set_parameter(config, key, sound)
        (folder / "config.pbtxt").write_text(config_pbtxt.to_text(config))
        assert lint_repository(folder.parent).count("error") == 0
    config_pbtxt.set_parameter(config, key, value)
    (folder / "config.pbtxt").write_text(config_pbtxt.to_text(config))
    (finding,) = [one for one in lint_repository(folder.parent).findings if one.level == "error"]
    assert finding.rule == "min-probability"
    assert f"'{value}' is no probability" in str(finding)
    assert finding.fix


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
        others, similar = nondigits.letters(fonts)
        assert len(others) + len(similar) == 52 * len(fonts)
        assert len(similar) == len(nondigits.LOOKALIKES) * len(fonts)
        assert all(image.max() == 255 for image in (*others, *similar))
        assert len({image.tobytes() for image in others}) > 0.9 * len(others)  # v is V in some


def test_no_font_is_held_back_and_chosen_by() -> None:
    assert not set(nondigits.FONTS) & set(nondigits.FONTS_HELD_BACK)


@pytest.mark.slow
def test_the_benchmark_says_how_much_of_each_kind_is_refused_and_tells_the_readme(
    clothed: Chain,
) -> None:
    block = "<!-- figures:unsure -->\n<!-- /figures -->\n"
    (clothed.root / "README.md").write_text(block)
    folder = clothed.paths.figures
    assert "*Not proven yet*: `pipeline benchmark --what unsure" in rendered(block, folder)
    record = clothed.record("benchmark", "--what", "unsure", "--figures")
    assert json.loads(clothed.paths.unsure.read_text())["rows"] == record["rows"]
    right, wrong = record["right"], record["wrong"]
    assert right["images"] + wrong["images"] == record["digits"]["images"] == 10_000
    assert right["refused"] + wrong["refused"] == record["digits"]["refused"]
    assert wrong["refused"] / wrong["images"] > 5 * right["refused"] / right["images"]
    counted = [row["refused"] / row["images"] for row in record["rows"] if row["is_counted"]]
    assert len(counted) == len(record["rows"]) - 2  # without letters that may be digits, and signs
    assert record["share"] == pytest.approx(np.mean(counted))
    text = (clothed.root / "README.md").read_text()
    times = wrong["refused"] / wrong["images"] / (right["refused"] / right["images"])
    assert f"refused {times:,.0f} times as often" in text
    names = ("scribbles", "zigzags (held back)", "clothes, dark on light", "test digits")
    for name in (*names, "read wrongly"):
        assert f"\n| {name} | " in text
    assert "`pipeline benchmark --what unsure --name handwriting --figures`" in text


def set_dataset(record: dict[str, Any]) -> None:
    record["training"]["dataset"] = "fashion-mnist"


def test_a_model_of_no_digits_or_without_a_threshold_is_not_measured(chain: Chain) -> None:
    before = chain.paths.manifest.read_bytes()
    edit_json(chain.paths.manifest, lambda record: record.pop("min_probability"))
    result = chain.run("benchmark", "--what", "unsure")
    assert result.exit_code == 1
    assert "pipeline train --run handwriting" in error_line(result)
    chain.paths.manifest.write_bytes(before)
    edit_json(chain.paths.manifest, set_dataset)
    result = chain.run("benchmark", "--what", "unsure")
    assert result.exit_code == 1
    assert "reads no digits" in error_line(result)


def test_without_clothes_the_benchmark_says_how_to_fetch_them(chain: Chain) -> None:
    result = chain.run("benchmark", "--what", "unsure")
    assert result.exit_code == 1
    assert "pipeline data fetch --dataset fashion-mnist" in error_line(result)


@pytest.mark.slow
def test_the_report_says_how_often_wrong_answers_are_refused(chain: Chain) -> None:
    assert "an answer is <em>not sure</em>:" in written(chain)
    edit_json(chain.paths.summary, lambda record: record.pop("min_probability"))
    assert "not sure" not in written(chain)  # a run of old


def written(chain: Chain) -> str:
    result = chain.run("report")
    assert result.exit_code == 0, result.output
    return chain.paths.page.read_text()

import json
from dataclasses import replace

import pytest
from conftest import Chain, error_line

from pipeline import benchmark
from pipeline.benchmark import TrainingRow, Trial, multiply_adds
from pipeline.machine import machine
from pipeline.recipes import RECIPES
from pipeline.report import training_markdown


def test_multiply_adds_are_those_of_the_layers() -> None:
    assert multiply_adds("note") == 784 * 128 + 128 * 10
    convolutions = 26 * 26 * 32 * 9 + 24 * 24 * 64 * 32 * 9
    assert multiply_adds("baseline") == convolutions + 9216 * 128 + 128 * 10


def test_a_row_has_the_mean_the_interval_and_the_median_share() -> None:
    trials = (Trial(1, 0.99, 5, 1000), Trial(2, 0.98, 10, 1000), Trial(3, 0.97, 4, 1000))
    row = TrainingRow("quick", 1, 1, trials)
    assert row.accuracy == pytest.approx(0.98)
    assert row.deviation == pytest.approx(0.01)
    assert row.half_width == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert row.share == 0.005
    single = TrainingRow("quick", 1, 1, trials[:1])
    assert (single.deviation, single.half_width) == (0, 0)
    assert "1/200" in str(single)


@pytest.mark.slow
def test_the_benchmark_trains_scores_and_renders(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "YARDSTICK_EPOCHS", 0.002)
    monkeypatch.setitem(RECIPES, "quick", RECIPES["note"])
    (empty.root / "README.md").write_text("<!-- figures:training -->\n<!-- /figures -->\n")
    options = ["--recipes", "quick", "--seeds", "1", "--figures"]
    record = empty.record("benchmark", *options)
    (row,) = record["rows"]
    assert row["trials"][0]["test_accuracy"] > 0.9
    assert row["share"] > 0
    figure = json.loads((empty.paths.figures / "training.json").read_text())
    assert training_markdown(figure) in (empty.root / "README.md").read_text()
    assert "| `quick` | 101,770 |" in training_markdown(figure)


@pytest.mark.slow
def test_a_benchmark_goes_on_where_it_stopped_and_keeps_the_rows_of_other_recipes(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "YARDSTICK_EPOCHS", 0.002)
    monkeypatch.setitem(RECIPES, "quick", replace(RECIPES["note"], epochs=0.1))
    monkeypatch.setitem(RECIPES, "best", replace(RECIPES["note"], epochs=0.2))
    (empty.root / "README.md").write_text("")
    first = empty.record("benchmark", "--recipes", "quick", "--seeds", "1", "--figures")
    both = ["benchmark", "--recipes", "quick", "--seeds", "2", "--resume"]
    again = empty.record(*both)
    assert again["rows"][0]["trials"][0] == first["rows"][0]["trials"][0]
    assert len(again["rows"][0]["trials"]) == 2
    fresh = empty.record(*both[:-1])
    assert fresh["rows"][0]["trials"][0]["seconds"] != first["rows"][0]["trials"][0]["seconds"]
    empty.record("benchmark", "--recipes", "best", "--seeds", "1", "--figures")
    figure = json.loads((empty.paths.figures / "training.json").read_text())
    assert [row["recipe"] for row in figure["rows"]] == ["quick", "best"]


def test_the_table_says_how_long_quick_takes_beside_the_record() -> None:
    trials = (Trial(1, 0.99, 5, 1000),)
    row = {**TrainingRow("quick", 1, 1, trials).record(), **machine()}
    table = training_markdown(
        {"command": "c", "rows": [row, {**row, "recipe": "record", "share": 0.01}]}
    )
    assert "`quick` takes 0.50 of the time of `record`" in table
    assert "| 1/200 |" in table


def test_an_unknown_recipe_is_refused_before_anything_is_trained(empty: Chain) -> None:
    result = empty.run("benchmark", "--recipes", "quick,bset")
    assert result.exit_code == 1
    assert "recipe must be one of" in error_line(result)

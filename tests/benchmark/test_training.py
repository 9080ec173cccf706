import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.benchmark import training
from pipeline.benchmark.training import SeedTrial, TrainingRow, count_multiply_adds
from pipeline.cli.benchmark import KINDS, URL, USED_BY, benchmark_command
from pipeline.core.machine import machine
from pipeline.training.recipes import RECIPES
from tests.conftest import Chain, error_line
from tools import readme
from tools.provenance import read_figure
from tools.readme import PAGES, RESULTS, merge_training_figure, render_macro, wrap

TRAIN = ["benchmark", "--what", "train"]


def test_multiply_adds_are_those_of_the_layers() -> None:
    assert count_multiply_adds("note") == 784 * 128 + 128 * 10
    convolutions = 26 * 26 * 32 * 9 + 24 * 24 * 64 * 32 * 9
    assert count_multiply_adds("baseline") == convolutions + 9216 * 128 + 128 * 10


def test_a_row_has_the_mean_the_interval_and_the_median_share() -> None:
    trials = (
        SeedTrial(1, 0.99, 5, 1000),
        SeedTrial(2, 0.98, 10, 1000),
        SeedTrial(3, 0.97, 4, 1000),
    )
    row = TrainingRow("quick", 1, 1, trials)
    assert row.accuracy == pytest.approx(0.98)
    assert row.deviation == pytest.approx(0.01)
    assert row.half_width == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert row.share == 0.005
    single = TrainingRow("quick", 1, 1, trials[:1])
    assert (single.deviation, single.half_width) == (0, 0)
    assert "1/200" in str(single)


@pytest.mark.slow
def test_the_benchmark_trains_and_scores_and_its_rows_are_kept_among_the_others(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "YARDSTICK_EPOCHS", 0.002)
    monkeypatch.setitem(RECIPES, "quick", replace(RECIPES["note"], epochs=0.2))
    monkeypatch.chdir(empty.root)
    PAGES[0].write_text("<!-- figures:training -->\n<!-- /figures -->\n")
    RESULTS.mkdir(parents=True)
    result = empty.run("--json", *TRAIN, "--recipes", "quick", "--seeds", "1")
    (row,) = json.loads(result.stdout)["rows"]
    assert row["trials"][0]["test_accuracy"] > 0.7
    assert row["share"] > 0
    Path("printed.json").write_text(result.stdout)
    readme.main(["training", "printed.json"])
    figure = read_figure(RESULTS / "training.json")
    assert figure["command"] == "make prove-training"
    assert wrap(render_macro("training", figure)) in PAGES[0].read_text()
    assert "| `quick` | 101,770 |" in render_macro("training", figure)
    both = merge_training_figure([{**row, "recipe": "best"}], RESULTS / "training.json")
    assert {kept["recipe"] for kept in both["rows"]} == {"best", "quick"}


@pytest.mark.slow
def test_a_benchmark_goes_on_where_it_stopped(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "YARDSTICK_EPOCHS", 0.002)
    monkeypatch.setitem(RECIPES, "quick", replace(RECIPES["note"], epochs=0.1))
    of_one = [*TRAIN, "--recipes", "quick", "--seeds", "1"]
    first = empty.record(*of_one)
    again = empty.record(*TRAIN, "--recipes", "quick", "--seeds", "2", "--resume")
    assert again["rows"][0]["trials"][0] == first["rows"][0]["trials"][0]
    assert len(again["rows"][0]["trials"]) == 2
    fresh = empty.record(*of_one)
    assert fresh["rows"][0]["trials"][0]["seconds"] != first["rows"][0]["trials"][0]["seconds"]


def test_the_table_says_how_long_quick_takes_beside_the_record() -> None:
    trials = (SeedTrial(1, 0.99, 5, 1000),)
    row = {**TrainingRow("quick", 1, 1, trials).record(), **machine()}
    table = render_macro(
        "training", {"command": "c", "rows": [row, {**row, "recipe": "record", "share": 0.01}]}
    )
    assert "`quick` takes 0.50 of the time of `record`" in table
    assert "| 1/200 |" in table


def test_an_unknown_recipe_is_refused_before_anything_is_trained(empty: Chain) -> None:
    result = empty.run(*TRAIN, "--recipes", "quick,bset")
    assert result.exit_code == 2
    assert "recipe must be one of" in error_line(result)


@pytest.mark.parametrize(
    "options",
    [
        ["--what", "train", "--compare", "before.json"],
        ["--what", "train", "--csv", "rows.csv"],
        ["--what", "train", "--name", "handwriting"],
        ["--what", "train", "--short"],
        ["--what", "infer", "--rate", "5"],
        ["--what", "all", "--seeds", "2"],
        ["--what", "serve", "--resume"],
    ],
    ids=" ".join,
)
def test_an_option_that_the_kind_would_leave_out_is_refused(
    empty: Chain, options: list[str]
) -> None:
    empty.paths.export.mkdir(parents=True)
    empty.paths.manifest.touch()
    result = empty.run("benchmark", *options)
    assert result.exit_code == 2
    (option,) = (one for one in options if one.startswith("--") and one != "--what")
    kinds = USED_BY[option.removeprefix("--")]
    valid = " or ".join("--url" if kind == URL else f"--what {kind}" for kind in kinds)
    assert f"{option} needs {valid}, not --what {options[1]}" in " ".join(
        error_line(result).split()
    )


def test_each_option_that_some_kinds_use_is_one_of_the_command() -> None:
    assert set(USED_BY) <= {parameter.name for parameter in benchmark_command.params}
    assert all(set(kinds) < {*KINDS, URL} for kinds in USED_BY.values())


def test_a_default_from_a_file_of_settings_is_for_the_kinds_that_use_it(empty: Chain) -> None:
    settings = empty.root / "settings.toml"
    settings.write_text('[benchmark]\nshort = true\ncompare = "before.json"\n')
    result = empty.run("--config", str(settings), *TRAIN, "--recipes", "bset")
    assert result.exit_code == 2
    assert "recipe must be one of" in error_line(result)


@pytest.mark.parametrize("rate", ["nan", "inf", "1e300", "0.5"])
def test_a_rate_that_cannot_be_kept_is_wrong_usage(empty: Chain, rate: str) -> None:
    result = empty.run("benchmark", "--what", "serve", "--rate", rate)
    assert result.exit_code == 2
    assert "Invalid value for '--rate'" in error_line(result)


def test_a_place_where_no_csv_can_be_is_refused_before_anything_is_measured(empty: Chain) -> None:
    (empty.root / "file").write_text("")
    for place in (empty.root / "file" / "rows.csv", empty.root):
        result = empty.run("benchmark", "--what", "infer", "--csv", str(place))
        assert result.exit_code == 1
        assert f"cannot write {place}" in error_line(result)

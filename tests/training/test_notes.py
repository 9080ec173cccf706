"""What a run could not fit well is written down, and said."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.core import evaluate
from tests.data.test_folders import shapes


def test_a_run_on_few_pictures_notes_that_there_is_no_threshold_and_where_the_temperature_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ("--dataset", f"folder:{shapes(tmp_path / 'shapes')}")
    train = ("train", *dataset, "--recipe", "quick", "--epochs", "1")
    at_limit = {1.0: False, evaluate.COLDEST: True, evaluate.HOTTEST: True}
    run = CliRunner()
    assert run.invoke(main, ["--root", str(tmp_path), "data", "fetch", *dataset]).exit_code == 0
    for temperature, is_limit in at_limit.items():
        monkeypatch.setattr(evaluate, "fit_temperature", lambda *_, t=temperature: t)
        result = run.invoke(main, ["--root", str(tmp_path), *train])
        assert result.exit_code == 0, result.output
        summary = json.loads((tmp_path / "runs" / "shapes" / "summary.json").read_text())
        assert summary["min_probability"] is None
        few = f"the validation split has {summary['validation_images']}, at least 134 are needed"
        assert few in summary["notes"][0]
        assert len(summary["notes"]) == 1 + is_limit
        for note in summary["notes"]:
            assert f"note: {note}" in result.output
        assert ("the temperature ran into its limit" in result.output) == is_limit

"""Finished runs: what is listed, shown and compared, and what cannot be."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pipeline.core.evaluate import mcnemar, wilson_interval
from pipeline.core.paths import Paths
from pipeline.training.runs import load_predictions, save_predictions
from tests.conftest import Chain, edit_json, error_line, flip_bit


@pytest.fixture
def runs(chain: Chain) -> Paths:
    """A project with a second run, which is wrong on 30 more test images and right on 10 others."""
    paths = chain.paths.of_run("other")
    shutil.copytree(chain.paths.run_folder, paths.run_folder)
    record = json.loads(paths.summary.read_text())
    predictions = load_predictions(paths, record["predictions_sha256"])
    outputs = predictions.log_probabilities.copy()
    is_right = outputs.argmax(axis=1) == predictions.labels
    for rows, shift in ((np.flatnonzero(is_right)[:30], 1), (np.flatnonzero(~is_right)[:10], 0)):
        outputs[rows, (predictions.labels[rows] + shift) % 10] = 1.0
    changes = {
        "predictions_sha256": save_predictions(paths, outputs, predictions.labels),
        "test_accuracy": float((outputs.argmax(axis=1) == predictions.labels).mean()),
    }
    edit_json(paths.summary, lambda summary: summary.update(changes))
    edit_json(paths.run_config, lambda config: config["settings"].update(lr=0.5))
    return chain.paths


def test_the_list_has_each_finished_run_with_the_interval_of_its_accuracy(runs: Paths) -> None:
    runs.of_run("unfinished").run_folder.mkdir()
    record = Chain(runs.root).record("runs", "list")
    assert [run["run"] for run in record["runs"]] == ["handwriting", "other"]
    for run in record["runs"]:
        low, high = wilson_interval(round(run["test_accuracy"] * 10_000), 10_000)
        assert run["interval"] == [low, high]
        assert low < run["test_accuracy"] < high
    lines = Chain(runs.root).run("runs", "list").stdout.splitlines()
    assert lines[0].split()[:4] == ["run", "data", "set", "recipe"]
    assert len(lines) == 4


def test_a_comparison_counts_the_images_that_only_one_run_reads_and_tells_p(runs: Paths) -> None:
    record = Chain(runs.root).record("runs", "compare", "handwriting", "other")
    assert (record["only_first"], record["only_second"]) == (30, 10)
    assert record["settings"] == {"lr": [record["first"]["settings"]["lr"], 0.5]}
    rights = np.arange(40) < 30
    assert record["mcnemar_p"] == mcnemar(rights, ~rights) < 0.05
    text = Chain(runs.root).run("runs", "compare", "handwriting", "other").stdout
    assert "a clear difference in accuracy on 10,000 images" in text
    same = Chain(runs.root).run("runs", "compare", "other", "other").stdout
    assert "McNemar's p is 1: no clear difference" in same


def test_runs_on_other_images_are_not_compared_and_unknown_ones_list_those_there_are(
    runs: Paths,
) -> None:
    other = runs.of_run("other")
    digest = json.loads(other.summary.read_text())["predictions_sha256"]
    predictions = load_predictions(other, digest)
    digest = save_predictions(other, predictions.log_probabilities[:99], predictions.labels[:99])
    edit_json(other.summary, lambda summary: summary.update(predictions_sha256=digest))
    result = Chain(runs.root).run("runs", "compare", "handwriting", "other")
    assert result.exit_code == 1
    assert "only runs with the same test images can be compared" in error_line(result)
    result = Chain(runs.root).run("runs", "show", "othr")
    assert result.exit_code == 1
    assert "run othr is not finished: there are handwriting, other. Did you mean 'other'?" in (
        error_line(result)
    )


def test_predictions_whose_bytes_changed_are_refused_with_4(runs: Paths) -> None:
    flip_bit(runs.predictions)
    assert Chain(runs.root).run("runs", "list").exit_code == 4


def test_runs_are_compared_without_torch(runs: Paths) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.core.paths import Paths;"
        "from pipeline.training.runs import compare_runs;"
        "compare_runs(Paths(Path(sys.argv[1])), 'handwriting', 'other');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(runs.root)], check=True, timeout=60)

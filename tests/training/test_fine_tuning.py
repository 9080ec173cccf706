"""Runs that start from another run's weights: what they take, record, refuse, and resume."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import SettingError
from pipeline.data.folders import import_folder
from pipeline.data.splits import Split
from pipeline.training.checkpoint import Checkpoint, RunState, load_checkpoint, start_from
from pipeline.training.device import choose_placement
from pipeline.training.loop import train
from pipeline.training.recipes import RECIPES, TrainConfig, tune_recipe
from tests.conftest import Chain, edit_json, error_line
from tests.data.test_folders import shapes

FEW_STEPS = ("--epochs", "0.02")


@pytest.fixture
def trained(made: Chain) -> Checkpoint:
    return load_checkpoint(made.paths)


def test_the_recipe_is_the_runs_with_a_quarter_of_its_rate_and_two_epochs_at_most() -> None:
    standard, quick = RECIPES["standard"], RECIPES["quick"]
    assert tune_recipe(standard, "mnist") == replace(standard, lr=standard.lr / 4, epochs=2)
    assert tune_recipe(quick, "mnist", lr=0.01) == replace(quick, lr=0.01)
    assert tune_recipe(standard, "emnist-digits").outliers == 0


@pytest.mark.parametrize(
    "change", [{"channels": (8, 8, 8, 8)}, {"padded": True}, {"network": "net", "channels": (9,)}]
)
def test_another_network_than_the_runs_is_refused_with_both(change: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=r"--init starts from a network with (\w+) .*, not"):
        tune_recipe(RECIPES["standard"], "mnist", **change)


def test_the_first_state_has_the_runs_weights_and_a_temperature_that_is_fitted_again(
    trained: Checkpoint,
) -> None:
    weights = trained.model.state_dict()
    state = start_from(trained, trained.config, trained.classes)
    assert state.step == 0
    assert float(state.tensors["model.temperature"]) == 1 != float(weights["temperature"])
    for name in weights.keys() - {"temperature"}:
        for part in ("model", "average.module"):
            assert torch.equal(state.tensors[f"{part}.{name}"], weights[name])


@pytest.mark.parametrize("classes", [("a", "b", "c"), tuple("9876543210")])
def test_only_the_last_layer_is_new_where_the_classes_differ(
    trained: Checkpoint, classes: tuple[str, ...]
) -> None:
    weights = trained.model.state_dict()
    state = start_from(trained, trained.config, classes)
    assert len(state.tensors["model.classifier.bias"]) == len(classes)
    same = [n for n in weights if torch.equal(state.tensors[f"model.{n}"], weights[n])]
    differ = weights.keys() - same
    assert differ == {"classifier.weight", "classifier.bias", "temperature"}


def test_a_stopped_run_resumes_to_the_same_weights(trained: Checkpoint) -> None:
    split = Split(np.zeros((64, 1, 28, 28), np.uint8), np.arange(64) % 10, trained.classes)
    recipe = replace(RECIPES["standard"], epochs=4, batch_size=32)
    recipe = replace(recipe, channels=trained.config.settings.channels, outliers=0.0)
    config, saved = TrainConfig(settings=recipe), list[RunState]()
    start = start_from(trained, config, trained.classes)
    inputs = (config, split, split, choose_placement("cpu"))
    whole, _ = train(*inputs, start, save=lambda state: saved.append(copy.deepcopy(state)))
    resumed, _ = train(*inputs, saved[0])
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_run_records_where_it_came_from_and_reads_digits_after_a_few_steps(chain: Chain) -> None:
    base = load_checkpoint(chain.paths).summary
    result = chain.run("train", "--init", "handwriting", "--run", "tuned", *FEW_STEPS)
    assert result.exit_code == 0, result.output
    digest = base.weights_sha256
    assert f"from the weights of run handwriting ({digest[:12]})" in result.stderr
    assert "the last layer" not in result.stderr
    tuned = load_checkpoint(chain.paths.of_run("tuned"))
    assert (tuned.config.init, tuned.config.init_sha256) == ("handwriting", digest)
    assert tuned.config.settings.lr == RECIPES["quick"].lr / 4
    assert tuned.summary.test_accuracy > base.test_accuracy - 0.05
    assert chain.record("runs", "show", "tuned")["settings"]["init_sha256"] == digest
    again = chain.record("train", "--run", "tuned", "--resume")
    assert again["weights_sha256"] == tuned.summary.weights_sha256
    assert "init" not in json.loads(chain.paths.run_config.read_text())


def test_on_other_classes_a_line_says_that_the_last_layer_is_new(
    chain: Chain, tmp_path: Path
) -> None:
    dataset = f"folder:{shapes(tmp_path / 'shapes')}"
    import_folder(dataset, chain.paths.data(dataset))
    result = chain.run("train", "--init", "handwriting", "--dataset", dataset, "--epochs", "1")
    assert result.exit_code == 0, result.output
    new = "the last layer starts from random weights, for 3 classes"
    assert f"the classes differ from those of run handwriting: {new}" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--init", "none"), 1, "there is no run 'none' here: there is handwriting"),
        (("--init", "handwriting"), 1, "cannot start from itself: choose another --run"),
        (("--init", "handwriting", "--recipe", "best"), 2, "run handwriting is quick: leave out"),
        (("--init", "handwriting", "--channels", "8,8,8,8"), 2, "leave out --channels"),
    ],
)
def test_what_no_run_can_start_from_is_refused(
    made: Chain, options: tuple[str, ...], code: int, message: str
) -> None:
    result = made.run("train", *options)
    assert result.exit_code == code
    assert message in error_line(result).replace("\n", " ")


def test_a_resume_is_refused_if_the_run_it_would_start_from_has_other_weights(chain: Chain) -> None:
    tuned = chain.paths.of_run("tuned")
    tuned.run_folder.mkdir()
    record = json.loads(chain.paths.run_config.read_text())
    record |= {"init": "handwriting", "init_sha256": "0" * 64}
    tuned.run_config.write_text(json.dumps(record))
    edit_json(tuned.run_config, lambda config: config["settings"].update(epochs=0.02))
    message = error_line(chain.run("train", "--run", "tuned", "--resume"))
    assert "run handwriting was trained again since this run started from it" in message

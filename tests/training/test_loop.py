import copy
import importlib.util
import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import Metrics
from pipeline.core.files import sha256
from pipeline.data.splits import Split, load_split
from pipeline.training import loop as train_module
from pipeline.training import run
from pipeline.training.checkpoint import RunState
from pipeline.training.device import choose_placement
from pipeline.training.loop import (
    Batches,
    Learner,
    TrainingProgress,
    distortion,
    learning_rate,
    train,
)
from pipeline.training.recipes import RECIPES, TrainConfig, make_recipe
from pipeline.training.records import CURVE_POINTS
from tests.conftest import Chain, edit_json, error_line, flip_bit

SHORT = make_recipe("quick", epochs=4, batch_size=64)
CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def few() -> Split:
    """512 images of stripes, a class for each tenth of the width."""
    labels = np.arange(512) % 10
    images = np.zeros((512, 1, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[0, :, 2 * label + 3 : 2 * label + 6] = 255
    return Split(images, labels, CLASSES)


def weights(model: torch.nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())


def test_training_learns(few: Split) -> None:
    model, last = train(TrainConfig(settings=SHORT), few, few, choose_placement("cpu"))
    assert last.validation_accuracy is not None
    assert last.validation_accuracy > 0.9
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_another_others(few: Split) -> None:
    runs = [
        weights(train(TrainConfig(settings=SHORT, seed=seed), few, few, choose_placement("cpu"))[0])
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("quick", (1, 8, 11)),
        ("note", (8,)),
        *(pytest.param(name, (8,), marks=pytest.mark.slow) for name in ("standard", "baseline")),
    ],
)
def test_a_run_stopped_at_any_step_resumes_to_the_same_weights(
    few: Split, name: str, stops: tuple[int, ...]
) -> None:
    config = TrainConfig(name, make_recipe(name, epochs=2, batch_size=64))
    whole, _ = train(config, few, few, choose_placement("cpu"))
    for stop_after in stops:
        states: list[RunState] = []
        steps: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            train(
                config,
                few,
                few,
                choose_placement("cpu"),
                on_progress=lambda progress: steps.append(progress.step),  # noqa: B023
                save=states.append,
                is_stopped=lambda: len(steps) + 1 >= stop_after,  # noqa: B023
            )
        assert states[-1].step == stop_after
        resumed, _ = train(config, few, few, choose_placement("cpu"), states[-1])
        assert weights(resumed) == weights(whole)


@pytest.mark.slow
def test_averaged_weights_are_what_is_judged_and_returned(few: Split) -> None:
    recipes = [
        make_recipe("standard", epochs=2, batch_size=64, average=decay) for decay in (0, 0.9)
    ]
    plain, averaged = (
        train(TrainConfig(settings=settings), few, few, choose_placement("cpu"))[0]
        for settings in recipes
    )
    assert weights(plain) != weights(averaged)
    # Close by, because an average follows; the normalization's statistics follow as well.
    for name, tensor in averaged.named_parameters():
        assert torch.allclose(tensor, plain.get_parameter(name), atol=0.5), name


def test_after_a_resume_the_averaged_weights_are_judged_at_once(few: Split) -> None:
    config = TrainConfig(settings=make_recipe("quick", epochs=1, batch_size=64, average=0.9))
    states: list[RunState] = []

    def keep(state: RunState) -> None:
        states.append(copy.deepcopy(state))

    train(config, few, few, choose_placement("cpu"), save=keep, save_every=1)
    assert [state.step for state in states] == [1, 2, 3, 4, 5, 6, 7]
    for state in states:
        learner = Learner(config, 10, choose_placement("cpu"))
        learner.restore(state)
        has_followed = state.step >= 4  # from half of the steps on
        assert (learner.best is not learner.network) == has_followed


def test_the_seconds_of_a_run_count_what_it_prepares_but_not_its_evaluation(
    few: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    class Slow(Batches):
        def __init__(self, *args: Any) -> None:
            now[0] += 100
            super().__init__(*args)

    def judged(*_: object) -> Metrics:
        now[0] += 10_000
        return Metrics(1, 0.5, 0.0)

    monkeypatch.setattr(train_module, "Batches", Slow)
    monkeypatch.setattr(train_module, "evaluate", judged)
    monkeypatch.setattr(train_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = TrainConfig(settings=make_recipe("note", epochs=2))
    _, progress = train(config, few, few, choose_placement("cpu"))
    assert progress.seconds == 100


def test_a_loss_that_is_not_finite_stops_at_that_step(few: Split) -> None:
    config = TrainConfig(settings=make_recipe("note", lr=1e30))
    with pytest.raises(PipelineError, match=r"loss is \w+ at step \d+ of \d+ with learning rate"):
        train(config, few, few, choose_placement("cpu"))


def test_one_cycle_climbs_to_the_peak_and_falls_to_nothing() -> None:
    rates = [learning_rate(RECIPES["quick"], step, 400, 100) for step in range(400)]
    assert max(rates) == pytest.approx(RECIPES["quick"].lr, rel=0.01)
    assert rates.index(max(rates)) == 100
    assert rates[-1] < 0.001 * RECIPES["quick"].lr


def test_decay_multiplies_by_gamma_after_each_epoch() -> None:
    baseline = RECIPES["baseline"]
    rates = [learning_rate(baseline, step, 30, 10) for step in (0, 9, 10, 20)]
    assert rates == pytest.approx([1, 1, 0.7, 0.49])


def test_every_epoch_visits_every_image_once_in_another_order() -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    split = Split(images, np.zeros(100, np.int64), CLASSES)
    first, second, again = (
        torch.cat([batches.at(step)[0] for step in steps]).flatten().tolist()
        for batches in [
            Batches(split, make_recipe("quick", batch_size=50), 0, choose_placement("cpu"))
        ]
        for steps in ((0, 1), (2, 3), (0, 1))
    )
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first == again


def test_the_five_steps_of_the_note_stand_together_in_this_order() -> None:
    source = Path(train_module.__file__).read_text()
    steps = [
        "optimizer.zero_grad()",
        "outputs = model(images)",
        "loss = loss_function(outputs, labels)",
        "loss.backward()",
        "optimizer.step()",
    ]
    assert "\n        ".join(steps) in source


def test_a_run_leaves_its_records(made: Chain) -> None:
    paths = made.paths
    summary = json.loads(paths.summary.read_text())
    assert summary["test_accuracy"] > 0.9
    assert summary["train_seconds"] > 0
    assert 0.25 < summary["temperature"] < 4
    assert summary["test_loss"] <= summary["uncalibrated_loss"] + 0.01
    assert 0 < summary["test_calibration_error"] < 0.1
    assert summary["weights_sha256"] == sha256(paths.weights)
    assert json.loads(paths.run_config.read_text())["settings"]["epochs"] == 0.125
    lines = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert lines[-1]["validation_accuracy"] == summary["validation_accuracy"]
    assert not paths.checkpoint.exists()


def test_tensorboard_is_told_where_it_is_installed(made: Chain) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(made.paths.board))
    events.Reload()
    summary = json.loads(made.paths.summary.read_text())
    (accuracy,) = events.Scalars("validation accuracy")
    assert accuracy.step == summary["steps"]
    assert accuracy.value == pytest.approx(summary["validation_accuracy"])
    assert len(events.Scalars("loss")) >= summary["steps"] // 10


def test_without_tensorboard_training_goes_on_without_it(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert empty.run("train", "--recipe", "quick", "--epochs", "0.01").exit_code == 0
    assert not empty.paths.board.exists()


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes(made: Chain, empty: Chain) -> None:
    record = empty.record("train", "--recipe", "quick", "--epochs", "0.125")
    assert record["weights_sha256"] == sha256(made.paths.weights)


@pytest.mark.slow
def test_the_test_split_is_read_once_and_after_training(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def load(dataset: str, folder: Path, name: str) -> Split:
        events.append(name)
        return load_split(dataset, folder, name)

    def trained(*arguments: Any, **options: Any) -> Any:
        result = train(*arguments, **options)
        events.append("trained")
        return result

    monkeypatch.setattr(run, "load_split", load)
    monkeypatch.setattr(run, "train", trained)
    assert empty.run("train", "--recipe", "quick", "--epochs", "0.01").exit_code == 0
    assert events == ["train", "validation", "trained", "validation", "test"]


def curve(chain: Chain) -> list[tuple[int, float]]:
    """The steps and losses that a run keeps."""
    lines = [json.loads(line) for line in chain.paths.metrics.read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_the_curve_has_many_points_and_not_too_many(made: Chain) -> None:
    steps = [step for step, loss in curve(made)]
    assert 10 < len(steps) <= CURVE_POINTS + 1
    assert steps == sorted(set(steps))


def interrupt_after(epochs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process Ctrl-C once that many passes are done."""

    def watched(*arguments: Any, **options: Any) -> Any:
        values = list(arguments)
        on_progress = values[5]
        pressed: list[int] = []

        def progress(now: train_module.TrainingProgress) -> None:
            on_progress(now)
            is_main = threading.current_thread() is threading.main_thread()
            if now.epoch >= epochs and is_main and not pressed:
                pressed.append(now.step)  # a second Ctrl-C would not let the step end
                os.kill(os.getpid(), signal.SIGINT)

        values[5] = progress
        return train(*values, **options)

    monkeypatch.setattr(run, "train", watched)


@pytest.mark.slow
def test_ctrl_c_exits_130_and_the_run_resumes_to_the_same_bytes(
    made: Chain, empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt_after(0.05, patched)
        stopped = empty.run("train", "--recipe", "quick", "--epochs", "0.125")
    assert stopped.exit_code == 130
    assert "next: pipeline train --resume\ninterrupted" in stopped.stderr
    assert not empty.paths.summary.exists()
    unfinished = empty.run("export")
    assert unfinished.exit_code == 1
    assert "the run is not finished" in error_line(unfinished)
    other = empty.run(
        "train", "--recipe", "quick", "--epochs", "0.125", "--resume", "--seed", "7", "--lr", "0.01"
    )
    assert other.exit_code == 1
    lr = RECIPES["quick"].lr
    assert f"lr was {lr}, is 0.01; seed was 0, is 7" in error_line(other)
    resumed = empty.run("train", "--resume")  # alone: with the settings that the run began with
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after step" in resumed.stderr
    assert sha256(empty.paths.weights) == sha256(made.paths.weights)
    assert curve(empty) == curve(made)
    again = empty.record("train", "--recipe", "quick", "--epochs", "0.125", "--resume")
    assert again["weights_sha256"] == sha256(made.paths.weights)
    changed = empty.run("train", "--recipe", "quick", "--epochs", "0.25", "--resume")
    assert changed.exit_code == 1
    assert "is finished, with other settings" in error_line(changed)


def test_resume_state_whose_bytes_changed_is_refused_with_4(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt_after(0.05, patched)
        empty.run("train", "--recipe", "quick", "--epochs", "0.125")
    (state,) = empty.paths.checkpoint.glob("step-*.safetensors")
    flip_bit(state)
    refused = empty.run("train", "--recipe", "quick", "--epochs", "0.125", "--resume")
    assert refused.exit_code == 4
    assert state.name in error_line(refused)
    state.unlink()
    assert empty.run("train", "--recipe", "quick", "--epochs", "0.125", "--resume").exit_code == 4


def test_resume_without_a_checkpoint_starts_fresh(empty: Chain) -> None:
    result = empty.run("train", "--recipe", "quick", "--epochs", "0.01", "--resume")
    assert result.exit_code == 0
    assert "no checkpoint yet" in result.stderr


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_export_refuses_a_damaged_checkpoint_with_4(chain: Chain, damage: str) -> None:
    weights_file = chain.paths.weights
    if damage == "flip":
        flip_bit(weights_file)
    else:
        content = weights_file.read_bytes()
        weights_file.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    result = chain.run("export")
    assert result.exit_code == 4
    assert str(weights_file) in error_line(result)
    assert "pipeline train" in error_line(result)


def test_weights_that_are_no_network_of_ours_are_corrupt_even_with_a_right_digest(
    chain: Chain,
) -> None:
    chain.paths.weights.write_bytes(b"\x10" + bytes(30))
    edit_json(chain.paths.summary, lambda r: r.update(weights_sha256=sha256(chain.paths.weights)))
    assert chain.run("export").exit_code == 4


def test_train_refuses_a_cached_file_with_a_flipped_bit_with_4(empty: Chain) -> None:
    cached = empty.root / "data" / "mnist" / "train-images-idx3-ubyte"
    content = cached.read_bytes()
    cached.unlink()
    cached.write_bytes(content)
    flip_bit(cached)
    result = empty.run("train")
    assert result.exit_code == 4
    assert "train-images-idx3-ubyte" in error_line(result)
    assert "pipeline data fetch" in error_line(result)


def test_train_without_data_says_how_to_fetch_it(tmp_path: Path) -> None:
    result = Chain(tmp_path).run("train")
    assert result.exit_code == 1
    assert "pipeline data fetch" in error_line(result)


@pytest.mark.slow
def test_the_quick_recipe_reads_989_of_1000_digits_and_more(empty: Chain) -> None:
    assert empty.record("train", "--recipe", "quick")["test_accuracy"] >= 0.989


def test_distortion_fades_over_the_last_steps_where_the_recipe_says_so() -> None:
    settings = make_recipe("standard", fade=0.25)
    strengths = [distortion(settings, step, 100) for step in (0, 74, 75, 80, 99)]
    assert strengths == pytest.approx([1, 1, 1, 0.8, 0.04])
    assert distortion(make_recipe("standard", fade=0.0), 99, 100) == 1


def test_a_line_of_progress_foresees_the_end_only_after_the_first_steps() -> None:
    first = TrainingProgress(0.01, 7, 1, 2.5, 0.1, images_per_second=4, seconds=10)
    assert str(first) == "epoch 0.01/7: loss 2.5000"
    later = TrainingProgress(0.5, 451 / 645, 322, 2.5, 0.1, images_per_second=5000, seconds=10)
    assert str(later) == "epoch 0.50/0.7: loss 2.5000, 5,000 images/s, 4 s left"

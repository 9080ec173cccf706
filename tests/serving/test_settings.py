import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths
from pipeline.repository.settings import PackageConfig
from pipeline.serving.settings import ServeConfig
from pipeline.training.recipes import RECIPES, Recipe, TrainConfig, make_recipe


@pytest.mark.parametrize(
    "wrong",
    [
        {"network": "transformer"},
        {"optimizer": "adam"},
        {"schedule": "none"},
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0},
        {"label_smoothing": 1.0},
        {"channels": (16, 24)},
        {"channels": (16, 24, 0, 48)},
    ],
)
def test_a_recipe_refuses_a_setting_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match=next(iter(wrong)).replace("_", "[_-]")):
        Recipe(**wrong)


def test_a_changed_recipe_keeps_its_other_fields() -> None:
    changed = make_recipe("baseline", epochs=2, lr=None)
    assert (changed.epochs, changed.lr) == (2, RECIPES["baseline"].lr)


def test_a_run_survives_its_record() -> None:
    config = TrainConfig("baseline", RECIPES["baseline"], seed=3)
    assert TrainConfig.from_record(json.loads(json.dumps(config.record()))) == config


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 65, "a b"])
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(PipelineError, match="is not a valid name"):
        Paths(Path(), name=name)


def test_settings_are_checked_where_they_are_born() -> None:
    with pytest.raises(PipelineError, match="seed"):
        TrainConfig(seed=-1)
    with pytest.raises(PipelineError, match="device"):
        TrainConfig(device="tpu")
    with pytest.raises(PipelineError, match="instances"):
        PackageConfig(instances=0)
    with pytest.raises(PipelineError, match="max-queue-delay-us"):
        PackageConfig(max_queue_delay_us=-1)
    with pytest.raises(PipelineError, match="port"):
        ServeConfig(http_port=0)
    with pytest.raises(PipelineError, match="port"):
        ServeConfig(http_port=8000, grpc_port=8000)


def test_clothes_are_mirrored_where_digits_are_bent_and_options_still_win() -> None:
    digits, clothes = (
        make_recipe("standard"),
        make_recipe("standard", "fashion-mnist", elastic=0.03),
    )
    assert (digits.mirror, clothes.mirror) == (0, 0.5)
    assert clothes.elastic == 0.03
    assert clothes.batch_size == digits.batch_size
    assert make_recipe("quick", "fashion-mnist") == make_recipe("quick")  # it distorts nothing

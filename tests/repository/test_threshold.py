"""The probability below which an answer is "not sure": fitted, packaged, kept by each version."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.evaluate import REFUSED
from pipeline.data.splits import load_split
from pipeline.export.runtime import onnx_predictor
from pipeline.repository import config_pbtxt
from pipeline.repository.lint.check import lint_repository
from tests.conftest import Chain, edit_json
from tools.mutations import write_model


def thresholds(chain: Chain) -> set[tuple[float | None, ...]]:
    """What each config says of being sure: of the selected version, then of every version."""
    found = set()
    for path in config_pbtxt.config_files(chain.paths.packaged):
        config = config_pbtxt.read(path)
        own = sorted(
            key for key in config_pbtxt.version_parameters(config) if key.startswith("min_")
        )
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
    assert thresholds(chain) == {(None, first, 0.75)}
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
    assert f"'{value}' is not a probability" in str(finding)
    assert finding.fix

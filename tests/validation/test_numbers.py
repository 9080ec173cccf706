"""The chain of a model that reads numbers: from strips to served answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.client.local import LocalClient
from pipeline.data import strips
from pipeline.data.splits import load_split
from pipeline.export.runtime import onnx_predictor
from pipeline.images.read import write_png
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import compare_golden, unpack_golden
from pipeline.scoring.parquet import Rows
from pipeline.scoring.settings import ScoreConfig
from pipeline.scoring.worker import read_selected_model, score_rows
from tests.conftest import Chain, link_server_environment, project, short_proofs

pytestmark = pytest.mark.slow
NAME = ("--name", "numbers")
# A small network that learns to read most strips in some hundred steps.
SHORT = {"channels": "8,16,32,48,64", "epochs": "0.25", "batch-size": "24", "lr": "0.015"}
SHORT |= dict.fromkeys(
    ("average", "outliers", "rotate", "stretch", "shear", "elastic", "stroke"), "0"
)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """A network that was trained for a few steps, exported and packaged, on few strips."""
    chain = project(tmp_path_factory.mktemp("numbers") / "project")
    with pytest.MonkeyPatch.context() as patch, short_proofs():
        patch.setattr(strips, "TEST_STRIPS", 10)
        patch.setattr(strips, "VALIDATION_STRIPS", 35)
        chain.record("data", "fetch", "--dataset", "numbers")
        options = [word for name, value in SHORT.items() for word in (f"--{name}", value)]
        patch.setattr("pipeline.training.strips.GAP", (4.0, 8.0))
        chain.record("train", "--recipe", "number", *options)
        chain.record("export", "--run", "numbers")
        chain.record("validate", *NAME)
        chain.record("package", *NAME, "--max-batch-size", "8")
        link_server_environment(chain)
        yield chain


def test_run_and_model_are_called_numbers_and_the_signature_is_of_strings(numbers: Chain) -> None:
    summary = json.loads(numbers.paths.of_run("numbers").summary.read_text())
    assert (summary["dataset"], len(summary["classes"])) == ("numbers", 10)
    paths = numbers.paths.named("numbers")
    config = config_pbtxt.read(paths.packaged / "config.pbtxt")
    assert list(config.input[0].dims) == [1, 28, 280]
    assert list(config.output[0].dims) == [94, 11]
    assert not config.output[0].label_filename
    assert config_pbtxt.pictures(config) == "line"
    assert config_pbtxt.answers_strings(config)
    golden = unpack_golden(paths.golden.read_bytes(), "the golden set")
    assert golden.outputs.shape[1:] == (94, 11)
    assert golden.labels.dtype.kind == "U"
    card = paths.card.read_text()
    assert "A reader of handwritten numbers" in card
    assert "It cannot answer" not in card


@pytest.mark.parametrize("damage", ["none", "blank", "time", "head"])
def test_another_blank_other_time_and_a_changed_head_fail_the_golden_set(
    numbers: Chain, damage: str
) -> None:
    paths = numbers.paths.named("numbers")
    golden = unpack_golden(paths.golden.read_bytes(), "the golden set")
    model = onnx.load(paths.onnx)
    bias = next(each for each in model.graph.initializer if list(each.dims) == [11])
    values = numpy_helper.to_array(bias)
    changed = {"blank": np.roll(values, 1), "head": values + 0.05 * np.eye(11)[3]}
    values = np.asarray(changed.get(damage, values), np.float32)
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    predict = onnx_predictor(model.SerializeToString())
    steps = slice(None, None, -1 if damage == "time" else 1)
    problems = compare_golden(golden, lambda images: predict(images)[:, steps], (7,))
    assert bool(problems) is (damage != "none"), problems


def test_a_string_and_its_probability_are_answered_without_a_server(
    numbers: Chain, tmp_path: Path
) -> None:
    paths = numbers.paths.named("numbers")
    test = load_split("numbers", numbers.paths.data("numbers"), "test")
    with LocalClient(paths.onnx) as client:
        predictions = client.classify(list(test.images[20:24]))
    for prediction in predictions:
        assert set(prediction.label) <= set("0123456789")
        assert 0 < prediction.probability <= 1
        assert prediction.probability == max(chance for _, chance in prediction.top)
    picture = tmp_path / "number.png"
    write_png(test.images[25], picture)
    record = numbers.record("query", "--onnx", *NAME, str(picture))
    assert record["label"] == record["top"][0][0]
    assert len(record["parts"]) == 1


def test_a_report_has_the_accuracy_by_length(numbers: Chain) -> None:
    numbers.record("report", "--run", "numbers", *NAME)
    page = numbers.paths.of_run("numbers").page.read_text()
    assert "Accuracy by length" in page
    assert "Confusion matrix</h2>" not in page


def test_numbers_are_scored_offline_and_watched_by_their_length(
    numbers: Chain, tmp_path: Path
) -> None:
    paths = numbers.paths.named("numbers")
    images = load_split("numbers", numbers.paths.data("numbers"), "test").images
    log = tmp_path / "log.jsonl"
    with LocalClient(paths.onnx, prediction_log=log) as client:
        labels = [each.label for each in client.classify(list(images) * 5)]
    rows = Rows(np.arange(len(images)), images, np.full(len(images), "", object))
    predict = onnx_predictor(paths.onnx.read_bytes())
    table, rejected, _ = score_rows(rows, read_selected_model(paths), predict, ScoreConfig())
    assert table["label"].to_pylist() == labels[: len(images)]
    assert not len(rejected)
    drift = numbers.run("--json", "drift", str(log), *NAME)
    checks = json.loads(drift.stdout)["checks"]
    assert [check["name"] for check in checks][:2] == ["classes", "confidence"]
    assert "digits" in checks[0]["said"]


@pytest.mark.server
def test_a_server_answers_as_eager_pytorch_on_every_strip(numbers: Chain) -> None:
    with short_proofs():
        table = numbers.record("validate", *NAME, str(numbers.paths.repository))
    tables = table.get("models", [table])
    first = next(each for each in tables if each["name"] == "numbers")
    assert [row["name"] for row in first["rows"]][-2:] == ["Triton HTTP", "Triton gRPC"]
    assert {row["differing"] for row in first["rows"]} == {0}

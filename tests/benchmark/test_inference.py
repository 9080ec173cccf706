"""The benchmark of an export in its runtimes."""

import json
from typing import Any

import pytest

from pipeline.benchmark import inference
from pipeline.benchmark.inference import InferBenchmark
from pipeline.benchmark.timing import Until
from pipeline.benchmark.workers import YARDSTICK
from tests.conftest import Chain, edit_json, error_line, flip_bit


@pytest.mark.slow
def test_each_runtime_is_scored_and_measured_beside_the_yardstick(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = InferBenchmark(Until(3, 3), seconds=0.1, batches=(1, 8), threads=(1,))
    monkeypatch.setattr(inference, "SHORT", tiny)
    measure, results = inference.benchmark_inference, list[inference.Inference]()

    def measure_once(*arguments: Any) -> inference.Inference:
        """Measure at the first call; the comparisons below are with the same result."""
        results.append(results[0] if results else measure(*arguments))
        return results[0]

    monkeypatch.setattr(inference, "benchmark_inference", measure_once)
    table = chain.root / "rows.csv"
    record = chain.record("benchmark", "--what", "infer", "--short", "--csv", str(table))
    asked = [(row["name"], row["batch"]) for row in record["rows"]]
    names = ("eager PyTorch, 1 thread", "ONNX Runtime fp32, 1 thread")
    assert asked == [(YARDSTICK, 1), *((name, batch) for batch in (1, 8) for name in names)]
    for row in record["rows"]:
        assert (row["wrong"], row["failed"]) == (0, 0)
        assert len(row["images_per_second"]["rounds"]) == 3
    assert set(record["scores"]) == set(names)
    for row in record["rows"][1:]:
        assert row["accuracy"] == record["scores"][row["name"]]["accuracy"]
    for found in record["scores"].values():
        assert found["images"] == 10_000
        assert (found["accuracy"] > 0.9, found["differing"]) == (True, 0)
    eager, runtime = (record["scores"][name]["peak_bytes"] for name in names)
    assert 0 < runtime < eager  # each in a process of its own: ONNX Runtime's needs no torch
    assert len(table.read_text().splitlines()) == 1 + len(record["rows"])
    assert json.loads(chain.paths.inference.read_text())["scores"] == record["scores"]

    record["scores"][names[1]]["accuracy"] += 0.01  # as if it had been better once
    before = chain.root / "before.json"
    before.write_text(json.dumps(record))
    result = chain.run("benchmark", "--what", "infer", "--short", "--compare", str(before))
    assert result.exit_code == 3
    assert "worse  accuracy -1.00% of images" in error_line(result)

    record["scores"][names[1]]["accuracy"] -= 0.01
    rounds = record["rows"][1]["images_per_second"]
    rounds["rounds"] = [one * 1e6 for one in rounds["rounds"]]  # beyond the noise of any machine
    before.write_text(json.dumps(record))
    result = chain.run("benchmark", "--what", "infer", "--short", "--compare", str(before))
    assert result.exit_code == 3
    assert "some rows seem slower: measuring them again" in result.stderr
    assert "worse  speed" in error_line(result)
    assert len(results) == 4  # what seemed slower was measured again


def test_an_export_that_is_not_there_has_nothing_to_measure(empty: Chain) -> None:
    result = empty.run("benchmark", "--what", "infer")
    assert result.exit_code == 1
    assert "run 'pipeline export'" in error_line(result)


def test_an_export_that_is_not_validated_is_told_to_be(chain: Chain) -> None:
    chain.paths.golden.unlink()
    edit_json(chain.paths.manifest, lambda record: record["files"].pop("golden.npz"))
    result = chain.run("benchmark", "--what", "infer", "--short")
    assert result.exit_code == 1
    assert "golden.npz (No such file or directory): run 'pipeline validate' first" in error_line(
        result
    )


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_other_bytes_than_those_that_are_recorded_are_not_measured(chain: Chain, file: str) -> None:
    flip_bit(chain.paths.export / file)
    result = chain.run("benchmark", "--what", "infer", "--short")
    assert result.exit_code == 4
    assert f"{file} does not match its digest" in error_line(result)

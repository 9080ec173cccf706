"""Rebuilding a release: once for real, else with a training that only copies what was trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.paths import Paths
from pipeline.export import rebuild
from pipeline.training.run import train_run
from tests.conftest import Chain, Edit, edit_json, error_line


@pytest.fixture
def release(made: Chain, tmp_path: Path) -> Path:
    """A copy of the small chain's version, to be changed."""
    return Path(shutil.copytree(made.paths.packaged / "1", tmp_path / "release"))


@pytest.fixture
def rebuilt(made: Chain, monkeypatch: pytest.MonkeyPatch) -> Callable[[Edit], None]:
    """Let a rebuild make the small chain's export, with a change of its manifest."""

    def use(edit: Edit) -> None:
        def export(scratch: Paths, *arguments: object) -> None:
            shutil.copytree(made.paths.export, scratch.export)
            edit_json(scratch.manifest, edit)

        monkeypatch.setattr(rebuild, "train_run", lambda *arguments, **options: None)
        monkeypatch.setattr(rebuild, "export_run", export)

    return use


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments: object, **options: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(rebuild, "train_run", train)


@pytest.mark.slow
def test_a_release_is_rebuilt_to_the_byte_with_the_threads_that_it_records(
    made: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    seen: list[Path] = []
    train = train_run

    def watch(scratch: Paths, *arguments: Any, **options: Any) -> None:
        assert torch.get_num_threads() == before
        seen.append(scratch.root)
        train(scratch, *arguments, **options)

    monkeypatch.setattr(rebuild, "train_run", watch)
    try:
        record = made.record("rebuild", str(made.paths.packaged / "1"))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert record["equal"] is True
    assert record["differences"] == {}
    ((recorded, again),) = record["files"].values()
    assert recorded == again
    assert not seen[0].exists()


def test_what_differs_from_the_record_is_named(
    made: Chain, release: Path, rebuilt: Callable[[Edit], None]
) -> None:
    def change(record: dict[str, Any]) -> None:
        record["files"]["model.onnx"] = "0" * 64
        record["environment"] |= {"torch": "9.9", "instructions": "SSE"}
        record["metrics"]["test_accuracy"] = 0.5

    rebuilt(change)
    result = made.run("rebuild", str(release / "manifest.json"))
    assert result.exit_code == 3
    assert "model.onnx" in result.stdout
    assert "not equal" in result.stdout
    assert [line.split()[-1] for line in result.stdout.splitlines() if "torch" in line] == ["9.9"]
    assert error_line(result).endswith("These facts differ: torch, instructions")


def test_a_difference_that_changes_no_byte_is_no_failure(
    made: Chain, release: Path, rebuilt: Callable[[Edit], None]
) -> None:
    rebuilt(lambda record: record["environment"].update(processor="another"))
    record = made.record("rebuild", str(release))
    assert record["equal"] is True
    assert record["differences"]["processor"][1] == "another"


def test_another_seed_is_found_by_what_the_file_states(
    made: Chain, release: Path, no_training: None
) -> None:
    edit_json(release / "manifest.json", lambda record: record["training"].update(seed=8))
    result = made.run("rebuild", str(release))
    assert result.exit_code == 3
    assert error_line(result).endswith("next to it: seed 8, not 0")


def test_another_seed_in_a_manifest_alone_gives_other_bytes(
    made: Chain, release: Path, rebuilt: Callable[[Edit], None]
) -> None:
    (release / "model.onnx").unlink()
    edit_json(release / "manifest.json", lambda record: record["training"].update(seed=8))

    def change(record: dict[str, Any]) -> None:
        record["training"]["seed"] = 8
        record["files"]["model.onnx"] = "0" * 64

    rebuilt(change)
    result = made.run("rebuild", str(release))
    assert result.exit_code == 3
    assert error_line(result).endswith("No recorded fact differs")


def test_data_with_another_digest_are_refused_before_the_training(
    made: Chain, release: Path, no_training: None
) -> None:
    name = "t10k-labels-idx1-ubyte"
    edit_json(release / "manifest.json", lambda record: record["data_sha256"].update({name: "0"}))
    result = made.run("rebuild", str(release))
    assert result.exit_code == 3
    assert f"{name} has digest ff7bcfd416de, not 0" in error_line(result)


def test_a_file_that_does_not_match_its_digest_is_corrupt(
    made: Chain, release: Path, no_training: None
) -> None:
    edit_json(release / "manifest.json", lambda record: record["files"].update({"model.onnx": "0"}))
    result = made.run("rebuild", str(release))
    assert result.exit_code == 4
    assert "model.onnx does not match its digest" in error_line(result)


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        (
            lambda record: record.pop("training"),
            1,
            "only a run's release can be rebuilt",
        ),
        (lambda record: record.pop("opset"), 4, "is damaged (KeyError('opset'))"),
    ],
)
def test_a_manifest_that_cannot_be_rebuilt_says_why(
    made: Chain, release: Path, no_training: None, edit: Edit, code: int, message: str
) -> None:
    edit_json(release / "manifest.json", edit)
    result = made.run("rebuild", str(release))
    assert result.exit_code == code
    assert message in error_line(result)


@pytest.mark.slow
def test_a_fine_tuned_release_is_rebuilt_from_the_run_that_it_started_from_or_says_what_is_missing(
    chain: Chain,
) -> None:
    few = ("--epochs", "0.02")
    for command in (
        ("train", "--init", "handwriting", "--run", "tuned", *few),
        ("export", "--run", "tuned", "--name", "tuned"),
    ):
        result = chain.run(*command)
        assert result.exit_code == 0, result.output
    release = str(chain.root / "exported" / "tuned")
    record = chain.record("rebuild", release)
    assert (record["equal"], record["differences"]) == (True, {})
    wanted = json.loads(chain.paths.of_run("tuned").run_config.read_text())["init_sha256"]
    assert chain.run("train", "--seed", "8", *few).exit_code == 0
    result = chain.run("rebuild", release)
    assert result.exit_code == 3
    assert "was fine-tuned from other weights: those of run handwriting" in error_line(result)
    assert f"not {wanted[:12]}" in error_line(result)
    shutil.rmtree(chain.paths.run_folder)
    result = chain.run("rebuild", release)
    assert result.exit_code == 1
    assert "there is no run 'handwriting' here: there is tuned" in error_line(result)

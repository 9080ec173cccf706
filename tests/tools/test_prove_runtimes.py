"""The proof on old runtimes itself, tried on the ONNX Runtime that is here."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.data.splits import load_split
from pipeline.export.subject import subject_of_run
from pipeline.export.targets import span
from tests.conftest import Chain
from tools import prove_runtimes
from tools.prove_runtimes import Row, Runtime, prove, require, run_file

HERE = Runtime(onnxruntime.__version__, np.__version__, "26.01")


@pytest.fixture
def images(made: Chain) -> np.ndarray:
    return load_split("mnist", made.paths.data("mnist"), "test").images[:100]


@pytest.mark.slow
def test_both_files_of_a_runtime_answer_as_eager_pytorch(
    made: Chain, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove_runtimes, "environment", lambda runtime: Path(sys.executable))
    rows = prove(subject_of_run(made.paths), images, (HERE,))
    require(rows)
    assert [(row.file, row.opset, row.ir_version) for row in rows] == [
        ("default", 18, 9),
        ("26.01", 23, 11),
    ]
    for row in rows:
        assert (row.onnxruntime, row.numpy) == (HERE.onnxruntime, HERE.numpy)
        assert (row.releases, row.images) == (span("26.01").releases, 100)


GOOD = Row("1.16.3", "1.26.4", "23.09-24.02", "default", 18, 9, 10_000, 0, 1e-5)


@pytest.mark.parametrize(
    "wrong", [{"differing": 1}, {"max_abs_diff": 1e-3}, {"max_abs_diff": float("nan")}]
)
def test_a_row_that_differs_fails_the_proof_by_name(wrong: dict[str, float]) -> None:
    require([GOOD])
    with pytest.raises(CheckFailedError, match=r"ONNX Runtime 1\.16\.3"):
        require([GOOD, replace(GOOD, **wrong)])  # type: ignore[arg-type]  # of one field each


def test_a_file_that_does_not_load_says_why(images: np.ndarray) -> None:
    with pytest.raises(CheckFailedError, match="does not run the model: .*INVALID_PROTOBUF"):
        run_file(Path(sys.executable), b"no model", images)


def test_an_environment_that_is_there_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove_runtimes, "ENVIRONMENTS", tmp_path)
    folder = tmp_path / HERE.onnxruntime
    folder.mkdir()
    (folder / "done").write_text(" ".join(HERE.packages))
    assert prove_runtimes.environment(HERE) == folder / "bin" / "python"


@pytest.mark.slow
def test_packages_that_cannot_be_installed_name_the_python_that_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def borrow(folder: Path, with_pip: bool) -> None:
        """Instead of an environment with its own pip, which takes seconds, one that uses ours."""
        python = folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)

    monkeypatch.setattr("venv.create", borrow)
    monkeypatch.setattr(prove_runtimes, "ENVIRONMENTS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PipelineError, match="cannot be installed.*PYTHON=python3.11"):
        prove_runtimes.environment(replace(HERE, onnxruntime="0.0.1"))
    assert not (tmp_path / "0.0.1" / "done").exists()

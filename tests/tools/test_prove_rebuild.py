"""The measurement of rebuilds, without trainings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from tools import prove_rebuild
from tools.prove_rebuild import LIMITED, run_pipeline


def test_a_command_that_fails_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"runs show nowhere ended with 1: (.|\n)*nowhere"):
        run_pipeline(tmp_path, {}, "runs", "show", "nowhere")


def test_each_recipe_is_a_row_and_the_first_is_rebuilt_under_each_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(root: Path, variables: Mapping[str, str], *arguments: str) -> dict[str, Any]:
        asked.append((dict(variables), arguments))
        equal = "ATEN_CPU_CAPABILITY" not in variables and "standard" not in arguments[1]
        files = {"model.onnx": ("a", "a" if equal else "b")}
        return {"equal": equal, "differences": {}, "seconds": 1.0, "files": files}

    monkeypatch.setattr(prove_rebuild, "run_pipeline", run)
    record = prove_rebuild.prove(tmp_path, {"quick": 3, "standard": 2})
    rows = [(row["recipe"], row["equal"], row["rebuilds"]) for row in record["rows"]]
    assert rows == [("quick", 3, 3), ("standard", 0, 2)]
    assert [(row["limit"], row["equal"]) for row in record["limited"]] == [
        (limit, "ATEN" not in limit) for limit in LIMITED
    ]
    threads = [variables.get("OMP_NUM_THREADS") for variables, _ in asked[:5]]
    assert threads == ["1", "1", "1", "2", "1"]  # training, export, and three rebuilds

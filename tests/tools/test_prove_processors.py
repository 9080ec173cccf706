"""The comparison of trainings under the limits of older processors, without the trainings."""

import json
from pathlib import Path

import pytest

from pipeline.core.errors import PipelineError
from tools import prove_processors
from tools.prove_processors import LIMITS, run_python

ONE = {"ATEN_CPU_CAPABILITY": "avx2"}


def test_a_process_has_its_limit_and_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    environment = json.loads(run_python(ONE, "-c", code))
    assert {name: environment.get(name) for name in LIMITS} == {**dict.fromkeys(LIMITS), **ONE}


def test_a_training_that_fails_is_an_error_with_its_reason() -> None:
    with pytest.raises(PipelineError, match=r"avx2.* ended with exit code 1: (.|\n)*it broke"):
        run_python(ONE, "-c", "raise ValueError('it broke')")


def test_each_limit_is_a_row_with_what_ran_and_the_bytes_of_each_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter("aa" + "ab" + "cc" * 5)  # under the first limit, the second training differs

    def run(limits: dict[str, str], *arguments: str) -> str:
        if arguments[0] == "-c":
            return f"onednn_verbose,v1,info,cpu,isa:I {len(limits)}\ntorch: T\n"
        assert arguments[arguments.index("--root") + 1] == str(tmp_path)
        return json.dumps({"weights_sha256": next(digests), "test_accuracy": 0.5})

    monkeypatch.setattr(prove_processors, "run_python", run)
    lines: list[str] = []
    rows = prove_processors.prove(tmp_path, report=lines.append)
    assert len(rows) == len(lines) == 1 + sum(map(len, LIMITS.values()))
    assert [row.limit for row in rows[:2]] == ["", "ATEN_CPU_CAPABILITY=default"]
    assert [row.weights_sha256 for row in rows[:3]] == [("a", "a"), ("a", "b"), ("c", "c")]
    assert {(row.torch, row.onednn[:1], row.test_accuracy) for row in rows} == {("T", "I", 0.5)}

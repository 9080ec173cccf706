import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.machine import machine
from pipeline.training.recipes import TrainConfig, make_recipe
from tests.conftest import Chain
from tools import gpu_check
from tools.provenance import write_figure
from tools.readme import NOT_VERIFIED, render_macro, render_page

JUNIT = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so_and_writes_nothing(empty: Chain) -> None:
    result = empty.root / "gpu.json"
    with pytest.raises(PipelineError, match="no CUDA device"):
        gpu_check.gpu_check(empty.paths, "Ada", result)
    with pytest.raises(PipelineError, match="the check needs your name"):
        gpu_check.gpu_check(empty.paths, " ", result)
    assert not result.exists()


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (3, 1, 0, 0), (3, 0, 1, 0), (3, 0, 0, 1)])
def test_a_test_that_failed_or_was_skipped_or_none_at_all_is_no_check(
    tmp_path: Path, counts: tuple[int, ...]
) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT.format(*counts))
    with pytest.raises(CheckFailedError, match="not every test marked gpu ran and passed"):
        gpu_check.count_passed(tmp_path / "tests.xml")
    (tmp_path / "tests.xml").write_text(JUNIT.format(3, 0, 0, 0))
    assert gpu_check.count_passed(tmp_path / "tests.xml") == 3


@pytest.mark.slow
def test_the_check_trains_twice_exports_validates_and_is_signed(
    empty: Chain, short_proof: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig("quick", make_recipe("quick", epochs=0.03))
    asked: list[bool] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: asked.append(True))
    with monkeypatch.context() as patched:
        patched.setattr(gpu_check, "LEAST_ACCURACY", 0.5)
        plain, compiled = gpu_check.train_twice(empty.paths, "cpu", print, config)
    assert len(asked) == 1
    with monkeypatch.context() as patched:
        patched.setattr(gpu_check, "train_run", lambda *_, **__: plain)
        with pytest.raises(CheckFailedError, match="less than 98.5%"):
            gpu_check.train_twice(empty.paths, "cpu", print, config)
    check = gpu_check.check_export(empty.paths, plain, compiled, print)
    assert check["test_accuracy"] == plain.test_accuracy > 0.5
    assert 0 < check["max_error"] < 1e-4
    assert check["max_error_on_gpu"] is None  # there is none here
    exported = replace(empty.paths, name=gpu_check.NAME)
    assert json.loads(exported.manifest.read_text())["files"].keys() >= {"model.onnx"}
    signed = {"command": "make gpu-check", "signed_off_by": "Ada", "tests": 3}
    record = {**signed, **machine(), **check}
    assert f"verified by Ada on {record['measured_at'][:10]}" in render_macro("gpu", record)


def test_the_readme_says_not_verified_until_somebody_has_signed(tmp_path: Path) -> None:
    readme = "<!-- figures:gpu -->\n<!-- /figures -->"
    assert NOT_VERIFIED in " ".join(render_page(readme, tmp_path).split())
    record = {
        "command": "make gpu-check",
        "signed_off_by": "Ada",
        "measured_at": "2026-11-23",
        "device": "cuda (a GPU)",
        "torch": "2",
        "cuda": "13",
        "tests": 3,
        "test_accuracy": 0.99,
        "train_seconds": 1.0,
        "compiled_train_seconds": 20.0,
    }
    write_figure("gpu", tmp_path / "gpu.json", record)
    assert "GPU: verified by Ada" in render_page(readme, tmp_path)

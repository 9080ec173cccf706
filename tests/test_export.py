import json
import os
import subprocess
import sys

import onnx
import pytest
import torch
from conftest import REPOSITORY, Chain, edit_json, error_line

from pipeline import graph
from pipeline.config import IMAGES, RECIPES, ExportConfig, log_probabilities
from pipeline.errors import CheckFailedError
from pipeline.export import check_onnx, export_program, to_onnx
from pipeline.files import sha256
from pipeline.model import build


def exported(made: Chain) -> onnx.ModelProto:
    return onnx.load_model(made.paths.onnx)


def test_the_file_has_our_signature_and_dialect(made: Chain) -> None:
    found = graph.signature(exported(made), "it")
    assert found == graph.Signature(IMAGES, log_probabilities(10), opset=18, ir_version=9)


def test_one_file_is_written_and_nothing_beside_it(made: Chain) -> None:
    names = sorted(path.name for path in made.paths.export.iterdir())
    assert names == ["golden.npz", "manifest.json", "model.onnx", "model.pt2", "validation.json"]


def test_no_path_of_this_machine_is_in_the_files(made: Chain) -> None:
    for path in (made.paths.onnx, made.paths.program):
        content = path.read_bytes()
        assert str(REPOSITORY).encode() not in content
        assert b"site-packages" not in content
        assert b".py" not in content.replace(b".pytorch", b"").replace(b"pkg.py", b"")


def test_the_metadata_says_what_a_client_and_an_auditor_need(made: Chain) -> None:
    metadata = {entry.key: entry.value for entry in exported(made).metadata_props}
    assert json.loads(metadata["classes"]) == list("0123456789")
    assert "uint8 [batch, 1, 28, 28]" in metadata["images"]
    assert metadata["weights_sha256"] == sha256(made.paths.weights)
    assert json.loads(metadata["versions"])["torch"] == torch.__version__
    assert len(json.loads(metadata["data_sha256"])) == 4


def test_the_manifest_has_the_digest_of_every_file(made: Chain) -> None:
    manifest = json.loads(made.paths.manifest.read_text())
    assert manifest["schema"] == 1
    assert set(manifest["files"]) == {"golden.npz", "model.onnx", "model.pt2", "validation.json"}
    for name, digest in manifest["files"].items():
        assert digest == sha256(made.paths.export / name)
    assert manifest["training"]["recipe"] == "quick"
    assert manifest["opset"] == 18
    assert manifest["metrics"]["test_accuracy"] > 0.9


def test_the_exported_program_loads_and_takes_any_batch(made: Chain) -> None:
    program = torch.export.load(made.paths.program).module()
    for count in (1, 5):
        assert program(torch.zeros(count, 1, 28, 28, dtype=torch.uint8)).shape == (count, 10)


@pytest.mark.slow
def test_two_processes_export_the_same_bytes(made: Chain, chain: Chain) -> None:
    command = [sys.executable, "-m", "pipeline", "--root", str(chain.root), "-q", "export"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert sha256(chain.paths.onnx) == sha256(made.paths.onnx)


def test_a_new_export_takes_the_old_proof_away(chain: Chain) -> None:
    assert chain.run("export").exit_code == 0
    assert not chain.paths.validation.exists()
    assert not chain.paths.golden.exists()
    refused = chain.run("package")
    assert refused.exit_code == 3
    assert "is not validated: run 'pipeline validate' first" in error_line(refused)


def test_export_without_a_run_says_how_to_train_one(empty: Chain) -> None:
    result = empty.run("export")
    assert result.exit_code == 1
    assert "run 'pipeline train' first" in error_line(result)


def test_export_of_a_record_that_is_none_is_corrupt(chain: Chain) -> None:
    chain.paths.summary.write_text("{}")
    assert chain.run("export").exit_code == 4
    edit_json(chain.paths.summary, lambda record: record.update(schema=1))
    assert chain.run("export").exit_code == 4


def test_an_export_in_another_dialect_is_refused() -> None:
    program = export_program(build(RECIPES["note"], 10).eval())
    content = to_onnx(program, 10, ExportConfig(), {})
    with pytest.raises(CheckFailedError, match="not Signature"):
        check_onnx(content, 10, ExportConfig(ir_version=8))
    with pytest.raises(CheckFailedError, match="not Signature"):
        check_onnx(content, 11, ExportConfig())

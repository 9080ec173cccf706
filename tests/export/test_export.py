import json
import os
import subprocess
import sys
from dataclasses import replace

import onnx
import pytest
import torch

from pipeline.core.errors import CheckFailedError
from pipeline.core.files import sha256
from pipeline.core.signature import IMAGES, log_probabilities
from pipeline.export import graph
from pipeline.export.export import check_onnx, export_program
from pipeline.training.networks import build
from pipeline.training.recipes import RECIPES
from tests.conftest import REPOSITORY, Chain, edit_json, error_line
from tests.networks import onnx_of

PROOF = ("MODEL_CARD.md", "evidence.npz", "golden.npz", "reference_profile.json", "validation.json")


def exported(made: Chain) -> onnx.ModelProto:
    return onnx.load_model(made.paths.onnx)


def test_the_file_has_our_signature_and_dialect(made: Chain) -> None:
    found = graph.read_signature(exported(made), "it")
    assert found == graph.Signature(IMAGES, log_probabilities(10), opset=18, ir_version=9)


def test_one_file_is_written_and_nothing_beside_it(made: Chain) -> None:
    names = sorted(path.name for path in made.paths.export.iterdir())
    assert names == sorted([*PROOF, "manifest.json", "model.onnx", "model.pt2"])


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
    assert set(manifest["files"]) == {*PROOF, "model.onnx", "model.pt2"}
    for name, digest in manifest["files"].items():
        assert digest == sha256(made.paths.export / name)
    assert manifest["training"]["recipe"] == "quick"
    assert manifest["opset"] == 18
    assert manifest["metrics"]["test_accuracy"] > 0.9


@pytest.mark.slow
def test_the_exported_program_loads_and_takes_any_batch(made: Chain) -> None:
    program = torch.export.load(made.paths.program).module()
    for count in (1, 5):
        assert program(torch.zeros(count, 1, 28, 28, dtype=torch.uint8)).shape == (count, 10)


@pytest.mark.slow
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
    assert "none exists yet; 'pipeline train --run handwriting' trains it" in error_line(result)


def test_export_of_a_record_that_is_none_is_corrupt(chain: Chain) -> None:
    chain.paths.summary.write_text("{}")
    assert chain.run("export").exit_code == 4
    edit_json(chain.paths.summary, lambda record: record.update(schema=1))
    assert chain.run("export").exit_code == 4


@pytest.mark.slow
def test_an_export_in_another_dialect_is_refused() -> None:
    content = onnx_of(build(RECIPES["note"], 10).eval())
    wanted = graph.Signature(IMAGES, log_probabilities(10), 18, 9)
    check_onnx(content, wanted)
    for other in (
        replace(wanted, ir_version=8),
        replace(wanted, outputs=log_probabilities(11)),
        replace(wanted, images=replace(IMAGES, shape=(3, 28, 28))),
    ):
        with pytest.raises(CheckFailedError, match="it should be one that takes images"):
            check_onnx(content, other)


@pytest.mark.slow
def test_variants_are_files_with_the_same_signature_and_another_process_makes_the_same(
    chain: Chain,
) -> None:
    record = chain.record("export", "--precision", "fp32,fp16,int8")
    assert [one["precision"] for one in record["variants"]] == ["fp32", "fp16", "int8"]
    manifest = json.loads(chain.paths.manifest.read_text())
    assert manifest["precisions"] == ["fp32", "fp16", "int8"]
    sizes = []
    for precision in manifest["precisions"]:
        path = chain.paths.variant(precision)
        assert manifest["files"][path.name] == sha256(path)
        found = graph.read_signature(onnx.load_model(path), "it")
        assert found == graph.Signature(IMAGES, log_probabilities(10), opset=18, ir_version=9)
        sizes.append(path.stat().st_size)
    assert sizes[0] > 1.6 * sizes[1] > 1.6 * sizes[2]

    # Another process makes the same bytes.
    arguments = ("--root", str(chain.root), "-q", "export", "--precision", "fp16,int8")
    command = [sys.executable, "-m", "pipeline", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    again = json.loads(chain.paths.manifest.read_text())
    onnx_files = [chain.paths.variant(precision).name for precision in manifest["precisions"]]
    assert [again["files"][name] for name in onnx_files] == [
        manifest["files"][name] for name in onnx_files
    ]


def test_an_unknown_precision_is_wrong_usage_and_named(chain: Chain) -> None:
    result = chain.run("export", "--precision", "fp8")
    assert result.exit_code == 2
    assert "'fp8' is not one of fp32, fp16, int8, exact" in error_line(result)


@pytest.mark.slow
def test_a_target_decides_opset_and_ir(chain: Chain) -> None:
    record = chain.record("export", "--target-triton", "24.10")
    assert (record["opset"], record["ir_version"]) == (21, 10)
    found = graph.read_signature(onnx.load_model(chain.paths.onnx), "it")
    assert (found.opset, found.ir_version) == (21, 10)
    refused = chain.run("export", "--target-triton", "23.10", "--opset", "20")
    assert refused.exit_code == 2
    assert "Triton 23.10 cannot load opset 20" in error_line(refused)


def test_the_targets_are_listed_without_a_run(empty: Chain) -> None:
    listed = empty.run("export", "--list-targets")
    assert listed.exit_code == 0
    assert "24.08-24.11" in listed.stdout
    targets = empty.record("export", "--list-targets")["targets"]
    assert len(targets) == 10


def test_a_module_that_only_takes_a_fixed_batch_is_refused_in_words() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().reshape(2, -1)[:, :10]

    with pytest.raises(CheckFailedError, match="cannot trace Fixed for any number of images"):
        export_program(Fixed(), IMAGES)

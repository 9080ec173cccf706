"""The proof as the command gives it: what it writes, what it refuses, what it leaves behind."""

import copy
import json

import numpy as np
import pytest
from torch import nn

from pipeline.core.files import sha256
from pipeline.repository.golden import unpack_golden
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.networks import Cnn
from pipeline.validation.reference import reference_predictor
from tests.conftest import FEW, Chain, edit_json, error_line, flip_bit
from tests.networks import onnx_of


@pytest.fixture(scope="module")
def network(made: Chain) -> Cnn:
    model = load_checkpoint(made.paths).model
    assert isinstance(model, Cnn)
    return model


def test_validate_leaves_a_proof_with_the_digest_of_the_bytes_that_ran(made: Chain) -> None:
    proof = json.loads(made.paths.validation.read_text())
    assert (proof["schema"], proof["passed"], proof["is_labelled"]) == (1, True, True)
    (fp32,) = proof["variants"]
    assert fp32["sha256"] == sha256(made.paths.onnx)
    assert fp32["golden_sha256"] == sha256(made.paths.golden)
    assert (fp32["images"], fp32["probes"]) == (FEW, 20)
    assert fp32["batch_sizes"] == [1, 2, 3, 7, 64, 65, 256]
    assert fp32["largest_batch"] == 256
    assert fp32["threads"] == [1, 2]
    assert fp32["flips"] == []
    assert 0 < fp32["max_error"] <= 1e-4
    assert fp32["ratio"] <= 8
    assert fp32["safety_factor"] == pytest.approx(proof["smallest_margin"] / fp32["max_error"])
    assert fp32["images_per_second"].keys() == {"1", "2"}
    assert proof["eager_accuracy"] == fp32["accuracy"] > 0.9


def test_the_golden_set_has_ten_images_a_class_with_the_answers_in_float64(
    made: Chain, network: Cnn
) -> None:
    golden = unpack_golden(made.paths.golden.read_bytes(), "it")
    assert golden.labels.tolist() == [label for label in range(10) for _ in range(10)]
    assert np.array_equal(golden.outputs, reference_predictor(network)(golden.images))
    assert (golden.bounds > 0).all()
    assert golden.bounds.max() < 1e-3


def test_the_evidence_has_a_margin_and_an_error_for_every_row(made: Chain) -> None:
    evidence = np.load(made.paths.evidence)
    assert evidence["labels"].shape == (FEW,)
    for name in ("margins", "reference", "errors_fp32", "said_fp32"):
        assert evidence[name].shape == (FEW + 20,)
    assert np.array_equal(evidence["reference"], evidence["said_fp32"])


def swap_onnx(chain: Chain, model: nn.Module) -> None:
    """Put another network's graph into an export, as if it had been exported so."""
    chain.paths.onnx.write_bytes(onnx_of(model))
    digest = sha256(chain.paths.onnx)
    edit_json(chain.paths.manifest, lambda record: record["files"].update({"model.onnx": digest}))


@pytest.mark.slow
def test_validate_exits_3_on_a_broken_export_and_leaves_no_proof_but_findings(
    chain: Chain, network: Cnn, short_proof: None
) -> None:
    broken = copy.deepcopy(network)
    broken.mean += 0.05
    swap_onnx(chain, broken)
    result = chain.run("validate")
    assert result.exit_code == 3
    message = error_line(result)
    assert "mean is 0.1807 instead of 0.1307" in message
    paths = chain.paths
    for gone in (paths.validation, paths.golden, paths.evidence, paths.card):
        assert not gone.exists()
    findings = json.loads((paths.failed / "validation.json").read_text())
    assert findings["passed"] is False
    assert len([*paths.failed.glob("worst-*.png")]) == 10
    refused = chain.run("package")
    assert refused.exit_code == 3
    assert "its last validation failed" in error_line(refused)

    command = message[message.index("Replay them: pipeline ") :].split()[4:]
    assert command[:1] == ["--replay"]
    again = chain.run("validate", "--replay", str(paths.worst))
    assert again.exit_code == 3
    assert "10 of 10 rows differ by more than their bound" in error_line(again)
    swap_onnx(chain, network)
    fixed = chain.run("validate", "--replay", str(paths.worst))
    assert fixed.exit_code == 0, fixed.output
    assert not paths.validation.exists()


@pytest.mark.slow
def test_an_export_of_other_libraries_cannot_be_made_again_and_is_refused(
    chain: Chain, short_proof: None
) -> None:
    edit_json(chain.paths.manifest, lambda record: record["versions"].update(torch="2.12.0"))
    result = chain.run("validate")
    assert result.exit_code == 3
    assert "its bytes cannot be made again to compare them" in error_line(result)


@pytest.mark.slow
def test_validate_refuses_an_export_of_other_weights(chain: Chain) -> None:
    assert chain.run("train", "--recipe", "quick", "--epochs", "0.01").exit_code == 0
    result = chain.run("validate")
    assert result.exit_code == 3
    assert "has other weights than" in error_line(result)


def test_validate_refuses_a_file_that_changed_since_export_with_4(chain: Chain) -> None:
    flip_bit(chain.paths.onnx)
    result = chain.run("validate")
    assert result.exit_code == 4
    assert str(chain.paths.onnx) in error_line(result)


def test_validate_takes_the_file_itself_too_but_no_stray_one(chain: Chain) -> None:
    flip_bit(chain.paths.onnx)
    assert chain.run("validate", str(chain.paths.onnx)).exit_code == 4
    stray = chain.root / "stray.onnx"
    stray.write_bytes(b"")
    result = chain.run("validate", str(stray))
    assert result.exit_code == 1
    assert "is not exported/NAME/model.onnx" in error_line(result)
    assert "use --onnx and --module for other files" in error_line(result)


def test_a_provider_that_is_not_here_is_named_and_no_cpu_takes_its_place(chain: Chain) -> None:
    result = chain.run("validate", "--provider", "cuda")
    assert result.exit_code == 1
    assert "cannot load its CUDAExecutionProvider here" in error_line(result)
    assert chain.paths.validation.exists()

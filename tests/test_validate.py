"""The gate between training and serving, and everything that must not pass it."""

import copy
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Chain, edit_json, error_line, flip_bit
from torch import nn

from pipeline.checkpoint import load_checkpoint
from pipeline.config import RECIPES, Criterion, ExportConfig
from pipeline.data import Split, load_split
from pipeline.errors import CheckFailedError, CorruptError
from pipeline.evaluate import Predictor
from pipeline.export import export_program, to_onnx
from pipeline.files import sha256
from pipeline.model import Cnn, build, eager_predictor
from pipeline.runtime import onnx_predictor
from pipeline.validate import (
    Golden,
    choose_golden,
    pack_golden,
    probe_images,
    unpack_golden,
    validate,
)


@pytest.fixture(scope="module")
def network(made: Chain) -> Cnn:
    model = load_checkpoint(made.paths).model
    assert isinstance(model, Cnn)
    return model


@pytest.fixture(scope="module")
def test_split(made: Chain) -> Split:
    split = load_split("mnist", made.paths.data("mnist"), "test")
    return replace(split, images=split.images[:600], labels=split.labels[:600])


def onnx_of(model: nn.Module) -> bytes:
    return to_onnx(export_program(model), 10, ExportConfig(), {})


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, 256])
def test_onnx_matches_eager_at_every_batch_size(
    made: Chain, network: Cnn, test_split: Split, batch_size: int
) -> None:
    candidate = onnx_predictor(made.paths.onnx.read_bytes())
    criterion = Criterion(batch_sizes=(batch_size,))
    agreement = validate(eager_predictor(network), candidate, test_split.images, criterion)
    assert agreement.passed, agreement.problems
    assert agreement.differing == 0
    assert agreement.max_abs_diff is not None
    assert agreement.max_abs_diff <= 1e-4


def dropout_left_on(network: Cnn) -> nn.Module:
    network.features.append(nn.Dropout(0.5))
    return network.train()


def wrong_mean(network: Cnn) -> nn.Module:
    network.mean += 0.05
    return network


def wrong_scale(network: Cnn) -> nn.Module:
    network.std *= 1.05
    return network


def one_weight_changed_by_a_hundredth(network: Cnn) -> nn.Module:
    with torch.no_grad():
        network.classifier.weight.view(-1)[torch.argmax(network.classifier.weight.abs())] *= 1.01
    return network


def swapped_labels(network: Cnn) -> nn.Module:
    with torch.no_grad():
        for parameter in (network.classifier.weight, network.classifier.bias):
            parameter[[3, 5]] = parameter[[5, 3]]
    return network


@pytest.mark.parametrize(
    "sabotage",
    [
        wrong_mean,
        wrong_scale,
        one_weight_changed_by_a_hundredth,
        swapped_labels,
    ],
)
def test_a_broken_export_does_not_pass(
    network: Cnn, test_split: Split, sabotage: Callable[[Cnn], nn.Module]
) -> None:
    broken = sabotage(copy.deepcopy(network))
    candidate = onnx_predictor(onnx_of(broken))
    reference = eager_predictor(network)
    agreement = validate(reference, candidate, test_split.images, Criterion(batch_sizes=(64,)))
    assert not agreement.passed
    assert agreement.problems[0].startswith("batch size 64: ")


def test_dropout_left_on_is_refused_although_onnx_runtime_would_skip_it(
    network: Cnn,
) -> None:
    with pytest.raises(CheckFailedError, match="chance: Dropout; export the model in evaluation"):
        onnx_of(dropout_left_on(copy.deepcopy(network)))


def test_a_static_batch_is_refused_as_a_graph_and_as_a_predictor(
    network: Cnn, test_split: Split
) -> None:
    example = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    static = torch.export.export(network, (example,))
    converted = torch.onnx.export(static, dynamo=True, opset_version=18, verbose=False)
    assert converted is not None
    content = converted.model_proto.SerializeToString()
    agreement = validate(
        eager_predictor(network),
        onnx_predictor(content, name=converted.model_proto.graph.input[0].name),
        test_split.images[:60],
        Criterion(batch_sizes=(1, 2, 7)),
    )
    assert not agreement.passed
    assert any(problem.startswith("batch size 7: ") for problem in agreement.problems)


def answers(outputs: np.ndarray) -> Predictor:
    """A predictor that says `outputs`, whatever it is asked, one call after another."""
    position = 0

    def predict(images: np.ndarray) -> np.ndarray:
        nonlocal position
        rows = outputs[position : position + len(images)]
        position = (position + len(images)) % len(outputs)
        return rows

    return predict


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda outputs: outputs + np.float32(2e-4), "differs by 0.0002, 0.0001 is allowed"),
        (lambda outputs: np.where(outputs == outputs, np.nan, 0).astype(np.float32), "inf"),
        (lambda outputs: outputs[:, ::-1].copy(), "images change class, 0 may"),
        (lambda outputs: outputs.astype(np.float64), "answers float64"),
        (lambda outputs: outputs[:, :9], r"answers float32 \(20, 9\) instead"),
    ],
)
def test_a_candidate_that_answers_otherwise_does_not_pass(
    change: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    outputs = np.log(np.random.default_rng(0).dirichlet(np.ones(10), 20)).astype(np.float32)
    images = np.zeros((20, 1, 28, 28), np.uint8)
    criterion = Criterion(batch_sizes=(4,))
    agreement = validate(answers(outputs), answers(change(outputs)), images, criterion)
    assert not agreement.passed
    assert re.search(said, "; ".join(agreement.problems))


def test_a_reference_that_is_not_finite_proves_nothing() -> None:
    outputs = np.full((4, 10), np.nan, np.float32)
    images = np.zeros((4, 1, 28, 28), np.uint8)
    agreement = validate(answers(outputs), answers(outputs), images, Criterion(batch_sizes=(2,)))
    assert "the reference itself is not finite" in agreement.problems


def test_the_probes_are_blank_full_and_noise() -> None:
    probes = probe_images()
    assert probes.shape == (18, 1, 28, 28)
    assert probes.dtype == np.uint8
    assert (probes[0].max(), probes[1].min()) == (0, 255)
    assert probes[2:].std() > 70
    assert np.array_equal(probes, probe_images())


def test_validate_leaves_a_proof_with_the_digest_of_the_bytes_that_ran(made: Chain) -> None:
    proof = json.loads(made.paths.validation.read_text())
    assert proof["passed"] is True
    assert proof["model_sha256"] == sha256(made.paths.onnx)
    assert proof["golden_sha256"] == sha256(made.paths.golden)
    assert proof["agreement"]["images"] == 10_018
    assert proof["agreement"]["batch_sizes"] == [1, 2, 7, 64, 256]
    assert proof["agreement"]["differing"] == 0
    assert 0 < proof["agreement"]["max_abs_diff"] <= 1e-4


def test_the_golden_set_has_two_images_a_class_with_the_references_answers(
    made: Chain, network: Cnn
) -> None:
    golden = unpack_golden(made.paths.golden.read_bytes(), "it")
    assert golden.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert np.array_equal(golden.log_probabilities.argmax(axis=1), golden.labels)
    apart = np.abs(golden.log_probabilities - eager_predictor(network)(golden.images))
    assert apart.max() < 1e-5


def test_a_class_that_is_never_read_rightly_is_in_the_golden_set_all_the_same() -> None:
    outputs = np.log(np.tile(np.array([0.9, 0.1], np.float32), (6, 1)))
    golden = choose_golden(np.zeros((6, 1), np.uint8), np.array([0, 1, 0, 1, 0, 1]), outputs)
    assert golden.labels.tolist() == [0, 0, 1, 1]


def test_a_golden_set_is_the_same_bytes_each_time() -> None:
    golden = Golden(np.zeros((1, 2), np.uint8), np.zeros(1, np.int64), np.zeros((1, 3), np.float32))
    assert pack_golden(golden) == pack_golden(golden)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes them for an option
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        npz(images=np.zeros(1)),
        npz(images=np.zeros(2), labels=np.zeros(1), log_probabilities=np.zeros((1, 2))),
        npz(images=np.zeros(1), labels=np.zeros(1), log_probabilities=np.zeros((1, 2))),
        npz(
            images=np.array([{"a": 1}], dtype=object),
            labels=np.zeros(1),
            log_probabilities=np.zeros((1, 2), np.float32),
        ),
    ],
)
def test_a_golden_set_that_is_none_is_corrupt_and_nothing_is_unpickled(content: bytes) -> None:
    with pytest.raises(CorruptError, match="golden set"):
        unpack_golden(content, "it")


def test_a_golden_set_that_unpacks_to_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.validate._MAX_GOLDEN_BYTES", 100)
    with pytest.raises(CorruptError, match="unpacks to more"):
        unpack_golden(npz(images=np.zeros(1000)), "it")


def test_onnx_runtime_that_refuses_a_model_is_a_failed_check() -> None:
    with pytest.raises(CheckFailedError, match="does not load the model"):
        onnx_predictor(b"no model")


def swap_onnx(chain: Chain, model: nn.Module) -> None:
    """Put another network's graph into an export, as if it had been exported so."""
    chain.paths.onnx.write_bytes(onnx_of(model))
    digest = sha256(chain.paths.onnx)
    edit_json(chain.paths.manifest, lambda record: record["files"].update({"model.onnx": digest}))


def test_validate_exits_3_on_a_broken_export_and_leaves_no_proof_but_findings(
    chain: Chain, network: Cnn
) -> None:
    swap_onnx(chain, wrong_mean(copy.deepcopy(network)))
    result = chain.run("validate")
    assert result.exit_code == 3
    assert "is not what was trained" in error_line(result)
    assert not chain.paths.validation.exists()
    assert not chain.paths.golden.exists()
    findings = json.loads((chain.paths.failed / "validation.json").read_text())
    assert findings["passed"] is False
    refused = chain.run("package")
    assert refused.exit_code == 3
    assert "its last validation failed" in error_line(refused)


def test_validate_refuses_an_export_of_other_weights(chain: Chain) -> None:
    assert chain.run("train", "--recipe", "quick", "--epochs", "0.01").exit_code == 0
    result = chain.run("validate")
    assert result.exit_code == 3
    assert "exported from other weights" in error_line(result)


def test_validate_refuses_a_file_that_changed_since_export_with_4(chain: Chain) -> None:
    flip_bit(chain.paths.onnx)
    result = chain.run("validate")
    assert result.exit_code == 4
    assert str(chain.paths.onnx) in error_line(result)


def test_validate_takes_the_file_itself_too(chain: Chain) -> None:
    assert chain.run("validate", str(chain.paths.onnx)).exit_code == 0
    stray = chain.root / "stray.onnx"
    stray.write_bytes(chain.paths.onnx.read_bytes())
    result = chain.run("validate", str(stray))
    assert result.exit_code == 1
    assert "is no export of ours" in error_line(result)


def test_another_network_in_the_same_signature_does_not_pass(
    test_split: Split, network: Cnn
) -> None:
    torch.manual_seed(1)
    stranger = build(RECIPES["quick"], 10).eval()
    candidate = onnx_predictor(onnx_of(stranger))
    reference = eager_predictor(network)
    criterion = Criterion(batch_sizes=(64,))
    assert not validate(reference, candidate, test_split.images, criterion).passed

"""The exact variant from export to a real server: one digest, wherever it is asked."""

import json
from dataclasses import replace

import pytest
import tritonclient.http

from pipeline.client.client import Client
from pipeline.core.errors import PipelineError
from pipeline.core.evaluate import hash_scores
from pipeline.export.runtime import onnx_predictor
from pipeline.export.subject import load_sample
from pipeline.repository import config_pbtxt
from pipeline.repository.golden import Golden, hash_golden, pack_golden, unpack_golden
from tests.conftest import FEW, Chain, error_line, short_proofs


def wrong_by_one(golden: Golden) -> bytes:
    """The golden set with one score of image 12 more by 1."""
    assert golden.scores is not None
    scores = golden.scores.copy()
    scores[12, 3] += 1
    return pack_golden(replace(golden, scores=scores))


@pytest.mark.slow
@pytest.mark.server
def test_one_digest_from_the_export_to_a_real_server(servable: Chain) -> None:
    chain = servable
    chain.record("export", "--precision", "exact")
    with short_proofs():
        proven = chain.record("validate")
    manifest = json.loads(chain.paths.manifest.read_text())
    (exact,) = (each for each in proven["variants"] if each["precision"] == "exact")
    digest = exact["exact_sha256"]
    assert digest == manifest["exact_sha256"]

    # Anybody repeats it with the file and the images alone.
    content = chain.paths.variant("exact").read_bytes()
    images = load_sample(chain.paths, manifest).images[:FEW]
    assert hash_scores(onnx_predictor(content, outputs=(1,))(images)) == digest
    golden = unpack_golden(chain.paths.variant_golden("exact").read_bytes(), "it")
    assert hash_golden(golden) == manifest["exact_golden_sha256"]
    assert f"`{digest}`" in chain.paths.card.read_text()

    chain.record("package")
    model = chain.paths.named("handwriting-exact")
    config = config_pbtxt.read(model.packaged / "config.pbtxt")
    assert config_pbtxt.parameter(config, "exact_sha256.1") == digest
    assert [output.name for output in config.output] == ["log_probabilities", "scores"]
    fp32 = config_pbtxt.read(chain.paths.packaged / "config.pbtxt")
    assert config_pbtxt.parameter(fp32, "exact_sha256.1") is None

    server = chain.record("serve", "--detach", "--port", "auto")
    address, name = f"127.0.0.1:{server['http_port']}", ("--name", "handwriting-exact")
    url = f"http://{address}"
    with Client(url, "handwriting-exact") as client:
        assert hash_scores(client.infer(golden.images, output="scores")[0]) == hash_golden(golden)
        with pytest.raises(PipelineError, match="has no output 'score'"):
            client.infer(golden.images, output="score")
    # A stock client that asks for one output by name, and the classification extension.
    stock = tritonclient.http.InferenceServerClient(address)
    tensor = tritonclient.http.InferInput("images", [1, 1, 28, 28], "UINT8")
    tensor.set_data_from_numpy(golden.images[:1])
    top = tritonclient.http.InferRequestedOutput("log_probabilities", class_count=1)
    answer = stock.infer("handwriting-exact", [tensor], outputs=[top])
    label = answer.as_numpy("log_probabilities")[0, 0].decode().split(":")[2]
    assert label == str(golden.labels[0])
    assert answer.as_numpy("scores") is None
    stock.close()

    # Its own golden set is equal; one that differs by 1 in one score is not, and says where.
    right, wrong = (chain.root / file for file in ("right.npz", "wrong.npz"))
    right.write_bytes(pack_golden(golden))
    wrong.write_bytes(wrong_by_one(golden))
    passed = chain.run("validate", url, *name, "--golden", str(right))
    assert passed.exit_code == 0, passed.output
    assert "passed: the scores are equal" in passed.stdout
    failed = chain.run("validate", url, *name, "--golden", str(wrong))
    assert failed.exit_code == 3
    assert "scores are not equal in" in error_line(failed)
    assert "the first is image 12" in error_line(failed)
    other = chain.run("validate", url, "--golden", str(right))
    assert other.exit_code == 3
    assert "the model has no output 'scores'" in error_line(other)

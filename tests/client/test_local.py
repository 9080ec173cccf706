"""Answers without a server: those of the server, from the file that it serves."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.client.client import Client
from pipeline.client.local import LocalClient
from pipeline.core.errors import CorruptError, PipelineError, SlowError
from pipeline.core.files import sha256
from pipeline.data.splits import load_split
from pipeline.images.read import write_png
from pipeline.repository import config_pbtxt
from tests.conftest import Chain, error_line, flip_bit

Served = tuple[Chain, dict[str, Any]]


@pytest.mark.server
def test_a_file_gives_the_answers_of_the_server_that_serves_it(
    served: Served, tmp_path: Path
) -> None:
    chain, server = served
    images = load_split("mnist", chain.paths.data("mnist"), "test").images[:200]
    photo = tmp_path / "photo.png"
    enlarged = np.kron(images[0], np.ones((1, 9, 9), np.uint8))
    write_png(255 - np.pad(enlarged, ((0, 0), (40, 40), (40, 40))), photo)
    asked = [*images, photo]
    with (
        Client(f"grpc://127.0.0.1:{server['grpc_port']}") as client,
        LocalClient(chain.paths.packaged / "1" / "model.onnx") as local,
    ):
        theirs, ours = client.classify(asked), local.classify(asked)
        served_config, config = client.config(), local.config()
        assert local.labels(images[0]) == client.labels(images[0])
        outputs, version = local.infer(images)
        assert np.abs(outputs - client.infer(images)[0]).max() < 1e-4
    assert version == "1"
    threshold = config_pbtxt.min_probability(config)
    assert threshold
    assert threshold == config_pbtxt.min_probability(served_config)
    assert (config.input, config.output) == (served_config.input, served_config.output)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.label, one.version, one.sha256) == (other.label, other.version, other.sha256)
        assert (one.is_sure, one.parts) == (other.is_sure, other.parts)
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_query_asks_the_export_or_the_file_that_is_named(made: Chain, tmp_path: Path) -> None:
    image = load_split("mnist", made.paths.data("mnist"), "test").images[0]
    write_png(255 - image, tmp_path / "7.png")
    records = [
        json.loads(made.run("--json", "query", *arguments).stdout)
        for arguments in (
            ["--onnx", str(tmp_path / "7.png")],
            [str(tmp_path), "--onnx"],
            ["--onnx", str(made.paths.packaged / "1" / "model.onnx"), str(tmp_path / "7.png")],
        )
    ]
    assert [record.pop("version") for record in records] == ["", "", "1"]
    assert records[0] == records[1] == records[2]
    assert (records[0]["label"], records[0]["sha256"]) == ("7", sha256(made.paths.onnx))
    both = made.run("query", "--onnx", "--url", "http://localhost:1", str(tmp_path))
    assert both.exit_code == 2
    assert "exclude each other" in error_line(both)


def test_a_file_without_its_record_or_with_other_bytes_is_refused(chain: Chain) -> None:
    flip_bit(chain.paths.onnx)
    with pytest.raises(CorruptError, match=r"model\.onnx does not match its digest"):
        LocalClient(chain.paths.onnx)
    stray = chain.root / "stray.onnx"
    with pytest.raises(PipelineError, match=r"stray\.onnx does not exist: give the ONNX file of"):
        LocalClient(stray)
    stray.write_bytes(b"")
    with pytest.raises(PipelineError, match=r"manifest\.json does not exist"):
        LocalClient(stray)


def test_without_onnx_runtime_it_says_what_to_install(
    made: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "pipeline.export.runtime", raising=False)
    with pytest.raises(PipelineError, match="pip install onnxruntime"):
        LocalClient(made.paths.onnx)


def test_its_metadata_name_the_runtime_and_its_deadline_holds(
    made: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalClient(made.paths.onnx) as local:
        assert local.server_name() == "ONNX Runtime"
        assert local.metadata(of_model=True)["name"] == "handwriting"
        with pytest.raises(SlowError):
            local.infer(np.zeros((64, 1, 28, 28), np.uint8), timeout=1e-9)

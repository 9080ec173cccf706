"""What a served model answers to the test split, where that is here."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.benchmark import serving
from pipeline.benchmark.serving import Beside, Scored, score_served
from pipeline.benchmark.timing import Score
from pipeline.core.paths import Paths
from pipeline.repository.release import Release
from pipeline.repository.running import Server


def released(**manifest: Any) -> Release:
    """A release of which only the manifest is looked at."""
    limits = cast(Any, None)
    golden = cast(Any, None)
    return Release(Path(), 1, "", b"", golden, {"name": "handwriting", **manifest}, limits)


def test_without_the_data_nothing_is_scored_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    release = released(training={"dataset": "mnist"}, data_sha256={})
    nobody = cast(Server, None)
    scored = score_served(Paths(tmp_path), nobody, release, cast(Beside, None), None, said.append)
    assert scored.scores == {}
    assert said[0].startswith("accuracy is left out: ")


def test_the_memory_is_that_of_the_server_and_of_the_models_own_stubs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = {7: "tritonserver", 8: "stub /models/net/1/model.onnx", 9: "stub /models/net-2/1/m"}
    monkeypatch.setattr(serving, "processes_of", lambda server_id: list(commands))
    monkeypatch.setattr(serving, "_command", commands.__getitem__)
    monkeypatch.setattr(serving, "peak_bytes", lambda pid: 10**pid)
    fields: dict[str, Any] = dict.fromkeys(Server.__dataclass_fields__)
    server = Server(**{**fields, "id": "it", "pid": 7})
    scored = Scored({("net", "grpc"): Score(10, 0.9, 1)})
    assert scored.sized(server) == {
        ("net", "grpc"): replace(scored.scores["net", "grpc"], peak_bytes=10**7 + 10**8)
    }

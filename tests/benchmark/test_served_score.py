"""What a served model answers to the test split, where that is here."""

from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import psutil
import pytest

from pipeline.benchmark import serving
from pipeline.benchmark.serving import measure_peak_bytes, score_served
from pipeline.core.paths import Paths
from pipeline.repository.release import Release
from pipeline.repository.running import Server


def released(**manifest: Any) -> Release:
    """A release of which only the manifest is looked at."""
    limits = cast(Any, None)
    golden = cast(Any, None)
    return Release(Path(), 1, "", b"", golden, {"name": "handwriting", **manifest}, limits)


def test_without_the_data_nothing_is_scored_and_that_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    release = released(training={"dataset": "mnist"}, data_sha256={})
    no_server = cast(Server, None)
    scores = score_served(Paths(tmp_path), no_server, release, ["net"], None, lines.append)
    assert scores == {}
    assert lines[0].startswith("accuracy is left out: ")


def test_the_memory_is_that_of_the_server_and_of_the_models_own_stubs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = {7: "tritonserver", 8: "stub /models/net/1/model.onnx", 9: "stub /models/net-2/1/m"}

    def process(pid: int) -> Any:
        if pid not in commands:
            raise psutil.NoSuchProcess(pid)
        return Mock(**{"cmdline.return_value": commands[pid].split()})

    monkeypatch.setattr(serving, "find_processes", lambda server_id: [*commands, 10])
    monkeypatch.setattr(psutil, "Process", process)
    monkeypatch.setattr(serving, "peak_bytes", lambda pid: 10**pid)
    fields: dict[str, Any] = dict.fromkeys(Server.__dataclass_fields__)
    server = Server(**{**fields, "id": "it", "pid": 7})
    assert measure_peak_bytes(server, "net") == 10**7 + 10**8

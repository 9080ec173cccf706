import asyncio
import json
import logging
import multiprocessing
import resource
import shutil
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.client.async_client import AsyncClient
from pipeline.client.client import Client
from pipeline.client.log import PredictionLog, older_log
from pipeline.client.prediction import Prediction
from pipeline.core.errors import PipelineError
from pipeline.images.read import encode_png
from pipeline.web.link import Link
from pipeline.web.settings import GatewayConfig
from tests import fakes
from tests.conftest import error_line
from tools import gateways

FIELDS = ["schema", "time", "name", "version", "sha256", "class", "probability", "sure", "ink"]
SEVEN = Prediction("7", 0.9, (("7", 0.9),), "1", "ab" * 32, True)


def images(count: int) -> np.ndarray:
    """The fakes take the first pixel for the digit."""
    found = np.full((count, 1, 28, 28), 51, np.uint8)
    found[:, 0, 0, 0] = np.arange(count) % 10
    return found


def digit() -> bytes:
    """The PNG of a one: a stroke on paper."""
    stroke = np.zeros((1, 28, 28), np.uint8)
    stroke[:, 4:24, 12:16] = 255
    return encode_png(stroke)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_client_logs_a_line_for_each_image_and_never_pixels_or_names(
    scheme: str, tmp_path: Path
) -> None:
    log, picture = tmp_path / "log.jsonl", tmp_path / "secret.png"
    picture.write_bytes(digit())
    server = fakes.http_server if scheme == "http" else fakes.grpc_server
    with (
        server(fakes.as_triton) as (port, _),
        Client(f"{scheme}://127.0.0.1:{port}", prediction_log=log) as client,
    ):
        client.classify(images(6))
        client.infer(images(3))
        client.classify(str(picture))
    found = lines(log)
    assert [line["class"] for line in found[:9]] == list("012345012")
    assert len(found) == 10
    assert all(list(line) == FIELDS for line in found)
    assert found[0] | {"time": ""} == {
        "schema": 1,
        "time": "",
        "name": "handwriting",
        "version": "1",
        "sha256": fakes.DIGEST,
        "class": "0",
        "probability": pytest.approx(0.9),
        "sure": True,
        "ink": pytest.approx(0.2, abs=1e-3),
    }
    assert b"secret" not in log.read_bytes()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_the_client_that_awaits_logs_the_same(tmp_path: Path) -> None:
    async def ask(url: str, log: Path) -> None:
        async with AsyncClient(url, prediction_log=log) as client:
            await asyncio.gather(*(client.classify(images(4)) for _ in range(5)))

    with fakes.http_server(fakes.as_triton) as (port, _):
        asyncio.run(ask(f"http://127.0.0.1:{port}", tmp_path / "log"))
    assert sorted(line["class"] for line in lines(tmp_path / "log")) == sorted(list("0123") * 5)


def test_nothing_is_logged_unless_somebody_asks_for_it(tmp_path: Path) -> None:
    with (
        fakes.http_server(fakes.as_triton) as (port, _),
        Client(f"http://127.0.0.1:{port}") as client,
    ):
        assert client._client._log is None
        client.classify(images(2))
    assert not list(tmp_path.iterdir())


def test_query_logs_what_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "digit.png").write_bytes(digit())
    with fakes.http_server(fakes.as_triton) as (port, _):
        arguments = ["query", "--url", f"http://127.0.0.1:{port}", str(tmp_path / "digit.png")]
        result = CliRunner().invoke(main, [*arguments, "--prediction-log", str(tmp_path / "log")])
    assert result.exit_code == 0, result.output
    assert len(lines(tmp_path / "log")) == 1


def write(path: Path, max_bytes: int, calls: int) -> None:
    log = PredictionLog(path, max_bytes)

    def add() -> None:
        for _ in range(calls):
            log.add("m", images(5), [SEVEN] * 5)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("max_bytes", "kept"), [(10**9, 600), (9_000, None)])
def test_threads_and_processes_share_a_log_and_no_line_is_torn(
    max_bytes: int, kept: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(path, max_bytes, 10)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    files = [file for file in (older_log(path), path) if file.exists()]
    found = [line for file in files for line in lines(file)]
    assert all(list(line) == FIELDS for line in found)
    assert len(found) == (kept or len(found))
    assert len(files) == (1 if kept else 2)
    assert all(file.stat().st_size <= max_bytes for file in files)


def test_a_full_log_becomes_the_older_one_and_the_one_before_goes(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "log", max_bytes=1000)
    for version in range(20):
        said = Prediction("7", 0.9, (), str(version), None, True)
        log.add("m", images(2), [said, said])
    newest = [line["version"] for line in lines(tmp_path / "log")]
    before = [line["version"] for line in lines(older_log(tmp_path / "log"))]
    assert newest[-1] == "19"
    assert int(before[-1]) == int(newest[0]) - 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [".log.lock", "log", "log.1"]
    assert log.lost == 0


def test_a_folder_that_vanished_costs_lines_and_no_answer_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = PredictionLog(folder / "log")
    with (
        fakes.http_server(fakes.as_triton) as (port, _),
        Client(f"http://127.0.0.1:{port}", prediction_log=log) as client,
        caplog.at_level(logging.WARNING),
    ):
        shutil.rmtree(folder)
        assert len(client.classify(images(3))) == 3
        assert len(client.classify(images(4))) == 4
        assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
        assert "predictions continue" in caplog.text
        folder.mkdir()
        client.classify(images(1))
    assert log.lost == 7
    gap, line = lines(folder / "log")
    assert (gap["lost"], line["class"]) == (7, "0")
    assert "7 predictions are missing" in caplog.text


def _fill(path: Path) -> None:
    """In a process whose files cannot grow beyond 1,000 bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    log = PredictionLog(path)
    for _ in range(10):
        log.add("m", images(3), [SEVEN] * 3)
    assert log.lost == 30 - len(lines(path)) > 0, log.lost


def test_a_full_disk_leaves_whole_lines_and_the_rest_is_counted(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_fill, args=(tmp_path / "log",))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert 0 < len(lines(tmp_path / "log")) < 30


def test_a_log_that_cannot_be_or_that_others_may_read_is_refused_at_once(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.touch(0o644)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, said in (
        ("no/log", "name a file in an existing folder"),
        ("open", "chmod 600"),
        ("link", "cannot write the prediction log"),
        (".", "cannot write the prediction log"),
    ):
        with pytest.raises(PipelineError, match=said):
            Client("http://127.0.0.1:1", prediction_log=tmp_path / name)
    result = CliRunner().invoke(main, ["web", "--prediction-log", str(tmp_path / "no" / "log")])
    assert result.exit_code == 1
    assert "prediction log" in error_line(result)
    assert not (tmp_path / "elsewhere").exists()


def test_the_gateway_logs_answers_but_not_its_own_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = PredictionLog(folder / "log")
    gateways.player(monkeypatch)
    link = Link(lambda: "grpc://127.0.0.1:1", "handwriting", 5.0)
    with gateways.served(link, GatewayConfig(port=0), log) as running:
        assert running.ask(path="/readyz").status == 200
        assert running.classify(gateways.picture()).status == 200
        (line,) = lines(folder / "log")
        assert (line["class"], line["probability"], line["version"]) == ("7", 0.91, "1")
        assert 0 < line["ink"] < 1
        assert b"gateway_unlogged 0.0" in running.ask(path="/metrics").body
        shutil.rmtree(folder)
        assert running.classify(gateways.picture()).status == 200
        assert b"gateway_unlogged 1.0" in running.ask(path="/metrics").body

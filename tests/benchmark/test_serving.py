"""The benchmark of serving, and the load that it is made with."""

import json
import os
import socket
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from pipeline.benchmark import load, load_http, serving, timing
from pipeline.benchmark.load import draw_arrivals, run_open_loop
from pipeline.benchmark.serving import NOOP, ServeBenchmark, profile_name
from pipeline.benchmark.target import LoadTarget
from pipeline.benchmark.timing import TimedRow, Until, Window, warm_up
from pipeline.client.client import Client
from pipeline.client.endpoint import endpoint
from pipeline.client.faults import Fault
from pipeline.core.errors import CheckFailedError, ServerError
from pipeline.repository import config_pbtxt
from pipeline.repository.running import load_server
from tests.conftest import Chain, error_line, link_server_environment

Served = tuple[Chain, dict[str, Any]]


@pytest.mark.server
def test_the_benchmark_sets_the_served_model_beside_a_noop_and_beside_onnx_runtime(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_server_environment(chain)
    tiny = ServeBenchmark(Until(1, 1), seconds=0.1, open_seconds=0.3)
    monkeypatch.setattr(serving, "SHORT", tiny)
    monkeypatch.setattr(timing, "WARM_UP", 0.02)
    record = chain.record("benchmark", "--what", "serve", "--short", "--rate", "200")
    assert json.loads(chain.paths.serving.read_text())["ratios"] == record["ratios"]
    assert set(record["ratios"]) == {"single_of_noop", "batch64_of_in_process"}
    assert all(ratio > 0 for ratio in record["ratios"].values())
    asked = {(row["name"], row["way"], row["batch"], row["concurrency"]) for row in record["rows"]}
    for name in ("handwriting", NOOP):
        for way in ("grpc", "http"):
            for each in ((1, 1), (1, 8), (1, 32), (8, 8), (64, 1)):
                assert (name, way, *each) in asked
    for name in ("handwriting", "handwriting-throughput"):
        assert (name, "http", 64, 8) in asked
    assert record["threads"] == os.cpu_count()  # a session for each core
    for row in record["rows"]:
        assert (row["wrong"], row["failed"]) == (0, 0)
        assert bool(row["server"]) == (row["way"] in ("grpc", "http"))
        if row["server"] and row["name"] != NOOP:
            assert (row["accuracy"] > 0.9, row["differing"]) == (True, 0)
            assert row["peak_bytes"] > 50e6  # tritonserver and a stub
    for many in [row for row in record["rows"] if row["batch"] == 64 and row["server"]]:
        assert many["server"]["batch"] == 64
        assert many["server"]["compute_infer_us"] > 0
    in_turn = [row for row in record["rows"] if row.get("rate")]
    assert [(row["way"], row["rate"]) for row in in_turn] == [("grpc", 200), ("http", 200)]
    assert all(100 < row["requests"] < 300 for row in in_turn)  # 3 windows of 60 or so
    assert record["machine"]["cores"]
    assert not (chain.paths.repository / NOOP).exists()  # it was served from a copy


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http"])
def test_load_counts_what_is_answered_wrongly_or_not_at_all(served: Served, way: str) -> None:
    chain, _ = served
    server = load_server(chain.paths)
    assert server
    config = config_pbtxt.read(chain.paths.packaged / "config.pbtxt")
    images = [np.zeros((2, 1, 28, 28), np.uint8)]
    url = {"http": server.http_url, "grpc": server.grpc_url}[way]
    with Client(url, config.name) as asked:
        labels = [[np.full(2, label)] for label in range(10)]
        labelled = [load.build_questions(config, images, label, url) for label in labels]
        named = [load.measure(asked, questions, 2, 0.05) for questions in labelled]
        assert sum(window.wrong == 0 for window in named) == 1  # a blank image has one class
        assert all(window.wrong == 0 or window.wrong >= 4 for window in named)
        config.name = "nobody"
        lost = load.build_questions(config, images, [np.zeros(2)], url)
        window = load.keep_asking(lost, 2, 0.05)
        nothing = run_open_loop(lost, 50, 0.05, 0)
    assert all("nobody" in fault.reason for fault in window.faults)
    for found in (window, nothing):
        assert found.failed > 0
        assert len(found.latencies) == 0
    assert nothing.failed == len(draw_arrivals(50, warm_up(0.05) + 0.05, 0))


def test_a_server_that_died_counts_nothing_and_is_no_bug_of_ours() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        with (
            Client(url, retries=0) as asked,
            pytest.raises(ServerError, match="no answer from grpc"),
        ):
            load.read_counters(asked, "handwriting")


@pytest.mark.parametrize(("rate", "seconds"), [(1.0, 20.0), (1000.0, 3.0)])
def test_a_window_with_an_open_loop_is_long_enough_for_requests_to_arrive(
    monkeypatch: pytest.MonkeyPatch, rate: float, seconds: float
) -> None:
    window = Window(seconds, 1, np.ones(9))
    opened = Mock(return_value=window)
    monkeypatch.setattr(serving, "run_open_loop", opened)
    monkeypatch.setattr(load, "count_during", lambda client, target, measured: measured())
    bench = serving._Bench(Mock(), {}, "net", {}, Mock(), ServeBenchmark())
    assert bench._run_open_loop(Mock(), rate, iter([0])) is window
    assert opened.call_args.args[1:3] == (rate, seconds)


def test_no_rate_is_made_of_a_speed_that_is_none() -> None:
    bench = serving._Bench(Mock(), {}, "net", {}, Mock(), ServeBenchmark())
    silent = TimedRow("net", "grpc", 1, 32, (Window(1.0, 1, np.zeros(0), failed=3),))
    with pytest.raises(CheckFailedError, match="0 wrong, 3 missing"):
        bench._open_rows([silent], print)


def test_an_answer_that_is_no_answer_is_wrong_for_all_of_its_images() -> None:
    def wrong(way: str, answer: bytes, classes: np.ndarray) -> int:
        target = LoadTarget(endpoint(f"{way}://127.0.0.1"), "net")
        asked = load.Questions(target, 3, (b"",), (classes,), "float32")
        return load.count_wrong(asked, [(0, answer)])

    for answer in (b"", b"\xff\xff"):  # without outputs; not a message at all
        assert wrong("grpc", answer, np.zeros(3)) == 3
    head = b"HTTP/1.1 200 OK\r\n"
    named = head + b"Inference-Header-Content-Length: 2\r\n\r\n{}"
    for answer in (head + b"\r\n{}", named + b"\0" * 10):  # JSON alone; too short for three
        assert wrong("http", answer, np.zeros(3)) == 3
    right = named + np.eye(3, dtype=np.float32).tobytes()
    assert wrong("http", right, np.arange(3)) == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\n\r\nwithout a length",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_an_answer_over_http_that_breaks_off_or_refuses_is_no_answer(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((ValueError, Fault), match="answer|503"):
            load_http._answer(ours)


def test_counters_become_what_a_window_cost() -> None:
    parts = ("queue", "compute_infer")
    before = load.ModelCounters(10, 1, 10, dict.fromkeys(parts, 1000))
    after = load.ModelCounters(74, 3, 18, {"queue": 9000, "compute_infer": 81000})
    assert after.since(before) == {"queue_us": 1.0, "compute_infer_us": 10.0, "batch": 32.0}


def test_a_model_that_takes_smaller_batches_only_is_refused(empty: Chain) -> None:
    empty.paths.packaged.mkdir(parents=True)
    (empty.paths.packaged / "config.pbtxt").write_text('name: "handwriting" max_batch_size: 8')
    result = empty.run("benchmark", "--what", "serve")
    assert result.exit_code == 1
    assert "takes batches of 8: package it with" in error_line(result)


def test_a_model_that_is_not_packaged_has_nothing_to_measure(empty: Chain) -> None:
    result = empty.run("benchmark", "--what", "serve")
    assert result.exit_code == 1
    assert "run 'pipeline package' first" in error_line(result)


def test_a_runtime_in_process_has_as_many_threads_as_all_sessions_of_the_server() -> None:
    message = config_pbtxt.ModelConfig()
    message.instance_group.add(count=2)
    config_pbtxt.set_parameter(message, "intra_op_thread_count", "3")
    configs = {profile_name("net"): message}
    assert serving._Bench(Mock(), {}, "net", configs, Mock(), ServeBenchmark()).threads == 6

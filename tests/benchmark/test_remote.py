"""The benchmark of any server, on fakes that answer, refuse or break off, and on a real Triton."""

import contextlib
import csv
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.benchmark import remote, timing
from pipeline.benchmark.load import build_requests
from pipeline.benchmark.load_http import build_request
from pipeline.benchmark.remote import RemoteBenchmark, make_tensors
from pipeline.benchmark.table import format_tables
from pipeline.benchmark.target import InputTensor, LoadTarget
from pipeline.client.endpoint import endpoint
from pipeline.client.faults import Fault
from pipeline.core.errors import PipelineError
from tests import fakes
from tests.conftest import Chain, error_line
from tests.fakes import Reply

Served = tuple[Chain, dict[str, Any]]
SHORT = ("--duration", "0.6")
IMAGES = {"name": "images", "datatype": "UINT8", "shape": ["-1", "1", "28", "28"]}
INFER = "/v2/models/net/versions/2/infer"


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 0.02)


@pytest.fixture
def foreign() -> Iterator[Callable[..., str]]:
    """Start a server that is not Triton: it has no extension, and speaks JSON over HTTP."""
    with contextlib.ExitStack() as stack:

        def start(refuse: Callable[[int], Reply | None] = lambda count: None) -> str:
            bodies: list[dict[str, Any]] = []

            def script(connection: Any) -> None:
                stream = connection.makefile("rb")
                while True:
                    path, headers, body = fakes.request(stream)
                    assert headers["x-key"] == "secret"
                    tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
                    answer: dict[str, Any] = {"name": "other", "version": "1", "extensions": []}
                    if path == "/v2/models/net/versions/2":
                        answer = {"name": "net", "inputs": [tensor], "outputs": []}
                    reply = None
                    if path == INFER:
                        bodies.append(json.loads(body))
                        reply = refuse(len(bodies))
                        answer = {"outputs": bodies[-1]["inputs"]}
                    close = {"Connection": "close"} if len(bodies) % 5 == 4 else {}
                    reply = reply or Reply(body=json.dumps(answer).encode(), headers=close)
                    connection.sendall(fakes.response(reply))
                    if "Connection" in reply.headers:
                        return

            return f"http://127.0.0.1:{stack.enter_context(fakes.tcp(script))}"

        yield start


OPTIONS = ("--name", "net", "--model-version", "2", "--header", "X-Key=secret", *SHORT)


def test_a_server_that_is_not_triton_is_measured_without_times_of_its_own(
    empty: Chain, foreign: Callable[..., str], tmp_path: Path
) -> None:
    url, file = foreign(), tmp_path / "rows.csv"
    asking = ("--concurrency", "1,3", "--batch", "1,4", "--csv", str(file))
    result = empty.run("--json", "benchmark", "--url", url, *OPTIONS, *asking)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert "does not list the extension 'statistics'" in record["statistics"]
    cells = [(row["batch"], row["concurrency"]) for row in record["rows"]]
    assert cells == [(1, 1), (1, 3), (4, 1), (4, 3)]
    for row in record["rows"]:
        assert row["failed"] == 0
        assert row["requests"] > 0
        assert row["server"] == {}
        assert 0 < row["client"]["send_us"] + row["client"]["recv_us"] < 1e3 * row["average_ms"]
    with file.open() as lines:
        first, *_ = csv.DictReader(lines)
    assert (first["Server Queue"], first["Network+Server Send/Recv"]) == ("", "")
    assert float(first["Avg latency"]) >= float(first["Client Send"]) > 0


def test_failures_are_counted_said_and_in_no_rate(
    empty: Chain, foreign: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.benchmark.load_http.PAUSE", 0.001)
    busy = Reply(400, body=json.dumps({"error": "no such pen"}).encode())
    began = time.monotonic()
    url = foreign(lambda count: busy if count % 2 and time.monotonic() > began + 0.3 else None)
    result = empty.run("benchmark", "--url", url, *OPTIONS)
    assert result.exit_code == 3
    assert "requests failed: no such pen (status 400)" in result.stdout
    assert "requests failed and count in no rate" in error_line(result)


def test_a_server_that_is_overloaded_ends_with_5(empty: Chain, foreign: Callable[..., str]) -> None:
    began = time.monotonic()
    url = foreign(lambda count: Reply(503) if time.monotonic() > began + 0.2 else None)
    result = empty.run("--json", "benchmark", "--url", url, *OPTIONS)
    assert result.exit_code == 5
    (row,) = json.loads(result.stdout)["rows"]
    assert row["failed"] > 0
    assert row["images_per_second"]["rounds"][-1] == 0
    assert "overloaded" in error_line(result)


def test_a_model_that_refuses_the_first_request_is_not_measured(
    empty: Chain, foreign: Callable[..., str]
) -> None:
    url = foreign(lambda count: Reply(400, body=b'{"error": "wrong shape"}'))
    result = empty.run("benchmark", "--url", url, *OPTIONS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "refuses: wrong shape (status 400)" in error_line(result)


def test_a_server_that_is_not_there_ends_with_5(empty: Chain) -> None:
    with fakes.tcp(lambda connection: None) as port:
        pass  # nothing listens any more
    result = empty.run("benchmark", "--url", f"http://127.0.0.1:{port}", *SHORT)
    assert result.exit_code == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--what", "serve"), "--what and --url exclude each other"),
        (("--compare", "x"), "--compare needs --what infer or --what serve or --what all"),
        (("--concurrency", "1,0"), "is not a list of numbers from 1 on"),
        (("--concurrency", "2000"), "--concurrency is at most 1024"),
        (("--shape", "3,4"), "the format is INPUT:SIZE,SIZE,..."),
        (("--shape", "x:three"), "is not a list of numbers from 1 on"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(
    empty: Chain, options: tuple[str, ...], message: str
) -> None:
    result = empty.run("benchmark", "--url", "http://127.0.0.1:1", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_options_of_a_url_need_one(empty: Chain) -> None:
    result = empty.run("benchmark", "--what", "serve", "--input-data", "zero")
    assert result.exit_code == 2
    assert "--input-data needs --url, not --what serve" in error_line(result)


def make(*inputs: dict[str, Any], largest: int | None = 8, **config: Any) -> list[InputTensor]:
    batch = config.pop("batch", 2)
    return make_tensors("net", inputs, largest, batch, RemoteBenchmark(**config))


def test_inputs_have_the_shapes_and_data_types_of_the_metadata() -> None:
    (tensor,) = make(IMAGES)
    assert tensor.values.shape == (2, 1, 28, 28)
    assert tensor.values.dtype == np.uint8
    assert 0 < tensor.values.max() < 128
    for datatype, width in [("BOOL", 1), ("INT64", 8), ("FP16", 2), ("FP32", 4), ("BF16", 2)]:
        (tensor,) = make({**IMAGES, "datatype": datatype})
        assert len(tensor.raw()) == 2 * 784 * width
        assert np.any(tensor.values)
    halves = np.frombuffer(tensor.raw(), np.uint16).astype(np.uint32) << 16
    assert np.allclose(halves.view(np.float32), tensor.values.ravel(), rtol=0.01)
    texts = {"name": "text", "datatype": "BYTES", "shape": [-1, -1]}
    (tensor,) = make(texts, shapes={"text": (3,)})
    assert [len(text) for text in tensor.values.ravel()] == [remote.STRING] * 6
    (tensor,) = make(texts, shapes={"text": (3,)}, is_zero=True)
    assert set(tensor.values.ravel()) == {b""}
    assert tensor.raw() == bytes(6 * 4)
    assert not np.any(make(IMAGES, is_zero=True)[0].values)


def test_a_server_that_tells_no_largest_batch_has_batches_where_the_first_dimension_varies() -> (
    None
):
    assert make(IMAGES, largest=None, batch=999)[0].values.shape == (999, 1, 28, 28)
    fixed = {**IMAGES, "shape": [1, 28, 28]}
    assert make(fixed, largest=None, batch=1)[0].values.shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"batch": 9}, "takes at most 8 in a batch, not 9"),
        ({}, {"largest": 0}, "takes at most 1 in a batch, not 2"),
        ({"shape": [1, 28]}, {"largest": None}, "takes at most 1 in a batch, not 2"),
        ({"shape": [-1, 3, -1]}, {}, "give --shape images:3,N"),
        ({"shape": [-1, 3, -1]}, {"shapes": {"images": (4, 5)}}, "give --shape images:3,N"),
        ({"shape": [-1, 3, -1]}, {"shapes": {"images": (3,)}}, "give --shape images:3,N"),
        ({}, {"shapes": {"image": (3,)}}, "no input 'image' for --shape: its inputs are images"),
        ({"datatype": "FP8"}, {}, "'FP8' is not one of KServe's protocol"),
        ({"shape": [-1, -1]}, {"shapes": {"images": (1 << 30,)}}, "lower --batch"),
    ],
)
def test_what_a_model_does_not_take_is_refused_in_words(
    change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        make({**IMAGES, **change}, **options)
    with pytest.raises(PipelineError, match="names no inputs"):
        make(**options)


def test_a_request_as_json_has_texts_and_numbers_of_the_inputs() -> None:
    tensors = [
        InputTensor("x", "FP32", np.ones((1, 2), np.float32)),
        InputTensor("t", "BYTES", np.array([[b"ab", b"cde"]], object)),
    ]
    target = LoadTarget(endpoint("http://127.0.0.1"), "net", is_binary=False)
    body = json.loads(build_request(target, tensors).partition(b"\r\n\r\n")[2])
    assert [entry["data"] for entry in body["inputs"]] == [[1.0, 1.0], ["ab", "cde"]]
    assert "outputs" not in body
    (binary,) = build_requests(replace(target, is_binary=True), [tensors])
    assert binary.endswith(b"\2\0\0\0ab\3\0\0\0cde")


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http"])
def test_triton_tells_its_own_times_and_they_make_up_the_latency(served: Served, way: str) -> None:
    chain, server = served
    url = f"{way}://127.0.0.1:{server[f'{way}_port']}"
    asking = ("--concurrency", "2", "--batch", "4", *SHORT)
    (row,) = chain.record("benchmark", "--url", url, *asking)["rows"]
    parts = {**row["server"], **row["client"]}
    assert (row["failed"], row["way"], round(parts.pop("batch")) >= 4) == (0, way, True)
    assert parts["compute_infer_us"] > 0
    assert sum(parts.values()) == pytest.approx(1e3 * row["average_ms"], rel=0.5)
    result = chain.run("benchmark", "--url", url, "--batch", "65", *SHORT)
    assert result.exit_code == 1
    assert "takes at most 64 in a batch, not 65" in error_line(result)


@pytest.mark.server
@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make certificates with")
@pytest.mark.parametrize("way", ["grpc", "http"])
def test_a_server_behind_tls_is_measured_with_the_certificates_that_it_asks_for(
    served: Served, way: str, tmp_path: Path
) -> None:
    chain, server = served
    ours = fakes.authority(tmp_path / "ours")
    pems = {"--ca": "ca.crt", "--certificate": "me.crt", "--key": "me.key"}
    given = [word for option, file in pems.items() for word in (option, str(ours.file(file)))]
    with fakes.tls_front(server[f"{way}_port"], ours.context(is_asking=True)) as port:
        asking = ("benchmark", "--url", f"{way}s://127.0.0.1:{port}", "--concurrency", "2", *SHORT)
        (row,) = chain.record(*asking, *given)["rows"]
        assert (row["failed"], row["way"]) == (0, way)
        assert row["requests"] > 0
        assert row["server"]["compute_infer_us"] > 0
        stranger, unknown = chain.run(*asking, *given[:2]), chain.run(*asking)
    assert (stranger.exit_code, unknown.exit_code) == (5, 5)
    assert "(--certificate, --key)" in error_line(stranger)
    assert "give the certificate of the CA" in error_line(unknown)


def test_a_row_with_failures_has_its_reasons_under_the_table() -> None:
    fault = Fault("busy", "too much to do")
    window = timing.Window(1.0, 1, np.ones(3), failed=2, faults=(fault, fault))
    silent = replace(window, latencies=np.zeros(0))
    assert "NaN" not in json.dumps(timing.TimedRow("net", "grpc", 1, 1, (silent,)).record())
    text = format_tables([timing.TimedRow("net", "grpc", 1, 1, (window,))])
    assert "2 requests failed: too much to do" in text
    assert text.splitlines()[0].split()[-1] == "failed"

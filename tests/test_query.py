import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Chain, error_line

from pipeline.client import Client, endpoint
from pipeline.data import load_split
from pipeline.errors import PipelineError, ServerError
from pipeline.images import write_png
from pipeline.serve import free_port

TIMEOUT = 1.0  # seconds
HANG_GUARD = 20.0  # seconds; generous, because machines are shared


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://localhost:8000", "localhost:8000"),
        ("grpc://localhost", "localhost:8001"),
        ("http://[::1]:9/", "[::1]:9"),
    ],
)
def test_an_endpoint_is_a_protocol_and_an_address(url: str, address: str) -> None:
    assert endpoint(url).address == address


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x", "http://", "http://x/path", "http://x:port", "http://x:0x"]
)
def test_a_url_that_names_no_server_says_how_to_write_one(url: str) -> None:
    with pytest.raises(PipelineError, match=r"http://HOST:8000|valid port"):
        endpoint(url)


def test_a_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(PipelineError, match="timeout must be above 0"):
        Client("http://localhost:1", timeout=0)


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def other() -> Iterator[int]:
    """The port of an HTTP server that is no Triton."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "13")
            self.end_headers()
            self.wfile.write(b"<html></html>")

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_nothing_listening_is_a_server_error_with_what_to_do(protocol: str) -> None:
    client = Client(f"{protocol}://127.0.0.1:{free_port()}", timeout=TIMEOUT)
    with pytest.raises(ServerError, match=r"no answer from .* 'pipeline serve' starts it"):
        client.classify([np.zeros((1, 28, 28), np.uint8)])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_hangs_is_given_up_in_time(protocol: str, silent: int) -> None:
    client = Client(f"{protocol}://127.0.0.1:{silent}", timeout=TIMEOUT)
    start = time.monotonic()
    with pytest.raises(ServerError, match="no answer from"):
        client.server_name()
    assert time.monotonic() - start < HANG_GUARD


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_is_no_triton_is_an_error_of_ours(protocol: str, other: int) -> None:
    client = Client(f"{protocol}://127.0.0.1:{other}", timeout=TIMEOUT)
    with pytest.raises(PipelineError):
        client.classify([np.zeros((1, 28, 28), np.uint8)])


def test_a_name_that_does_not_resolve_is_a_server_error() -> None:
    with pytest.raises(ServerError):
        Client("http://no-such-host.invalid:8000", timeout=TIMEOUT).server_name()


def test_nothing_asked_needs_no_server() -> None:
    assert Client("http://127.0.0.1:1").classify([]) == []


def test_query_without_a_server_exits_5_with_one_line(empty: Chain, digit: Path) -> None:
    result = empty.run("query", str(digit))
    assert result.exit_code == 5
    assert len(error_line(result).splitlines()) == 1
    assert "pipeline serve" in error_line(result)
    port = free_port()
    result = empty.run("query", str(digit), "--url", f"http://127.0.0.1:{port}", "--timeout", "1")
    assert result.exit_code == 5
    assert len(error_line(result).splitlines()) == 1
    assert str(port) in error_line(result)


def test_a_text_file_as_image_exits_1_naming_it_even_without_a_server(
    empty: Chain, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    result = empty.run("query", str(text))
    assert result.exit_code == 1
    assert str(text) in result.stderr


def test_a_folder_and_a_blank_picture_are_named_for_what_they_are(
    empty: Chain, tmp_path: Path
) -> None:
    write_png(np.zeros((1, 28, 28), np.uint8), tmp_path / "blank.png")
    result = empty.run("query", str(tmp_path), str(tmp_path / "blank.png"))
    assert result.exit_code == 1
    assert f"{tmp_path} is a folder" in result.stderr
    assert "blank.png shows no ink" in result.stderr


@pytest.fixture(scope="session")
def digit(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the first test image, a seven."""
    path = tmp_path_factory.mktemp("digits") / "seven.png"
    write_png(load_split("mnist", made.paths.data("mnist"), "test").images[0], path)
    return path


def test_query_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, pipeline.query, pipeline.verify, pipeline.supervise, pipeline.package;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'onnxscript')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


Served = tuple[Chain, dict[str, Any]]


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_digit_is_answered_with_label_probability_version_and_digest(
    served: Served, digit: Path, protocol: str
) -> None:
    chain, server = served
    url = f"{protocol}://127.0.0.1:{server[f'{protocol}_port']}"
    result = chain.run("--json", "query", str(digit), "--url", url, "--top", "2")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["file"], answer["label"], answer["version"]) == (str(digit), "7", "1")
    assert answer["probability"] > 0.5
    assert answer["top"][0] == ["7", answer["probability"]]
    assert len(answer["top"]) == 2
    manifest = json.loads((chain.paths.packaged / "1" / "manifest.json").read_text())
    assert answer["sha256"] == manifest["files"]["model.onnx"]


@pytest.mark.server
def test_a_file_that_is_no_image_is_named_and_the_others_are_answered(
    served: Served, digit: Path, tmp_path: Path
) -> None:
    chain, _ = served
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    result = chain.run("query", str(digit), str(text), str(digit))
    assert result.exit_code == 1
    assert result.stdout.count(f"{digit}: 7") == 2
    assert str(text) in result.stderr
    assert "1 of 3 images could not be read" in result.stderr


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_more_images_than_a_batch_holds_are_split_and_keep_their_order(
    served: Served, protocol: str
) -> None:
    chain, server = served
    split = load_split("mnist", chain.paths.data("mnist"), "test")
    client = Client(f"{protocol}://127.0.0.1:{server[f'{protocol}_port']}", timeout=30)
    outputs, version = client.infer(split.images[:150])
    singles = np.concatenate([client.infer(image[None])[0] for image in split.images[:150:50]])
    client.close()
    assert version == "1"
    assert np.abs(outputs[::50] - singles).max() < 1e-4
    assert (outputs.argmax(axis=1) == split.labels[:150]).mean() > 0.9


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_threads_may_share_a_client(served: Served, protocol: str) -> None:
    chain, server = served
    split = load_split("mnist", chain.paths.data("mnist"), "test")
    client = Client(f"{protocol}://127.0.0.1:{server[f'{protocol}_port']}", timeout=60)
    expected = client.infer(split.images[:40])[0]
    wrong: list[int] = []

    def ask(start: int) -> None:
        for index in range(start, 40, 8):
            row = client.infer(split.images[index : index + 1])[0][0]
            if np.abs(row - expected[index]).max() > 1e-4:
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_the_server_refuses_is_said_without_a_traceback(served: Served, protocol: str) -> None:
    _, server = served
    url = f"{protocol}://127.0.0.1:{server[f'{protocol}_port']}"
    with Client(url, "nobody") as nobody, Client(url) as client:
        with pytest.raises(PipelineError, match="serves no model 'nobody'"):
            nobody.infer(np.zeros((1, 1, 28, 28), np.uint8))
        with pytest.raises(PipelineError, match="refuses: .*shape"):
            client.infer(np.zeros((1, 1, 27, 28), np.uint8))
        with pytest.raises(PipelineError, match="refuses: .*data-?type|refuses: .*UINT8"):
            client.infer(np.zeros((1, 1, 28, 28), np.float32))


@pytest.mark.server
def test_query_into_a_closed_pipe_is_quiet(served: Served, digit: Path) -> None:
    chain, _ = served
    command = [sys.executable, "-m", "pipeline", "--root", str(chain.root), "query"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*command, *[str(digit)] * 200], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert b"Traceback" not in done.stderr

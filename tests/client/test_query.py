import json
import os
import signal
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

from pipeline.cli.command import OPTIONAL, _message_of
from pipeline.client.async_client import AsyncClient
from pipeline.client.client import Client
from pipeline.client.endpoint import endpoint
from pipeline.core.errors import PipelineError, ServerError
from pipeline.data.splits import load_split
from pipeline.images.read import write_png
from tests.conftest import REPOSITORY, Chain, error_line, free_port
from tests.fakes import Asked, Reply, as_triton, http_server, request, tcp

TIMEOUT = 1.0  # seconds
HANG_GUARD = 120.0  # seconds; generous, because machines are shared


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
    "url",
    [
        *("localhost:8000", "ftp://x", "http://", "http://x/path", "http://x:port", "http://x:0x"),
        *("http://my host:8000", "http://x:8000\n", " http://x", "http://x\x7f", "http://x:0"),
        *("http://me:secret@x:8000", "http://x?key=secret", "http://x#secret", "http://@x"),
    ],
)
def test_a_url_that_names_no_server_says_how_to_write_one(url: str) -> None:
    with pytest.raises(PipelineError, match=r"http://HOST:8000|valid port") as raised:
        endpoint(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e12])
@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_a_timeout_of_nothing_or_without_an_end_is_refused(make: Any, timeout: float) -> None:
    with pytest.raises(PipelineError, match="timeout must be above 0 and at most 86,400 seconds"):
        make("http://localhost:1", timeout=timeout)


@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_less_than_no_retries_are_refused(make: Any) -> None:
    with pytest.raises(PipelineError, match="retries must be 0 or more, got -1"):
        make("http://localhost:1", retries=-1)


@pytest.mark.parametrize("make", [Client, AsyncClient])
@pytest.mark.parametrize("url", ["http://localhost:1", "grpc://localhost:1"])
@pytest.mark.parametrize(
    "header",
    [("a b", "x"), ("", "x"), (":path", "x"), ("ä", "x"), ("a", "x\ny"), ("a", "€"), ("a", 5)],
)
def test_headers_that_cannot_be_sent_are_refused(make: Any, url: str, header: Any) -> None:
    with pytest.raises(
        PipelineError, match=f"^header {header[0]!r} is not valid for .*: use letters"
    ):
        make(url, headers=dict([header]))
    with pytest.raises(PipelineError, match="'KEY-bin' is not valid for grpc"):
        make("grpc://localhost:1", headers={"KEY-bin": "x"})


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
    client = Client(f"{protocol}://127.0.0.1:{free_port()}", timeout=HANG_GUARD)
    with pytest.raises(ServerError, match=r"no answer from .* start it \('pipeline serve'\)"):
        client.classify([np.zeros((1, 28, 28), np.uint8)])


@pytest.mark.slow
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
    assert (
        "has no packaged model. Name the project's folder with --root, or a server with --url"
        in error_line(result)
    )
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


def test_an_empty_folder_and_a_blank_picture_are_named_for_what_they_are(
    empty: Chain, tmp_path: Path
) -> None:
    write_png(np.zeros((1, 28, 28), np.uint8), tmp_path / "blank.png")
    (tmp_path / "nothing").mkdir()
    result = empty.run("query", str(tmp_path / "nothing"), str(tmp_path / "blank.png"))
    assert result.exit_code == 1
    assert f"{tmp_path / 'nothing'} has no files" in result.stderr
    assert "blank.png shows no ink" in result.stderr


def test_a_single_bad_file_is_one_line_of_error(empty: Chain, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("not a picture")
    alone = empty.run("query", str(tmp_path / "bad.png"))
    assert (alone.exit_code, alone.stderr.count("Error: ")) == (1, 1)
    both = empty.run("query", *[str(tmp_path / "bad.png")] * 2)
    assert (both.exit_code, both.stderr.count("Error: ")) == (1, 3)
    assert "2 of 2 images got no answer; 0 answered" in both.stderr


def test_without_a_server_query_says_how_to_start_one(chain: Chain, tmp_path: Path) -> None:
    write_png(load_split("mnist", chain.paths.data("mnist"), "test").images[0], tmp_path / "7.png")
    result = chain.run("query", str(tmp_path / "7.png"))
    assert result.exit_code == 5
    assert error_line(result) == (
        "no server runs here: start one with 'pipeline serve --detach', or name one with --url"
    )


def test_an_empty_folder_is_one_line_and_counts_as_no_image(empty: Chain, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    result = empty.run("query", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert error_line(result).endswith("nothing has no files: name a folder of pictures")
    file = str(stroke(tmp_path / "0.png"))
    with http_server(as_triton) as (port, _):
        url = f"http://127.0.0.1:{port}"
        result = empty.run("query", str(tmp_path / "nothing"), file, file, "--url", url)
    assert result.exit_code == 1
    assert "2 answered" in result.stderr
    assert "images" not in result.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--url", "localhost:57523"), "write http://HOST:8000"),
        (("--url", "ftp://x"), "write http://HOST:8000"),
        (("--timeout", "0"), "x>0"),
    ],
)
def test_a_url_or_a_timeout_that_is_none_is_wrong_usage(
    empty: Chain, wrong: tuple[str, str], said: str
) -> None:
    result = empty.run("query", "x.png", *wrong)
    assert result.exit_code == 2
    assert said in error_line(result)


def query(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, asking for a drawn stroke, which the fakes call 0."""
    command = [sys.executable, "-m", "pipeline", "query", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)


def stroke(path: Path) -> Path:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 8:20, 13:15] = 255
    write_png(image, path)
    return path


def test_a_name_that_is_no_text_is_printed_with_its_answer(tmp_path: Path) -> None:
    file = stroke(tmp_path / os.fsdecode(b"\xff.png"))
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    with http_server(as_triton) as (port, _):
        done = query(file, "--url", f"http://127.0.0.1:{port}", env=strict)
    assert done.returncode == 0, done.stderr
    assert b"\\udcff.png: 0  90.00%" in done.stdout


def test_a_name_that_is_too_long_is_no_image_file(empty: Chain) -> None:
    result = empty.run("query", "x" * 300)
    assert result.exit_code == 1
    assert "xxx is not a file" in result.stderr


@pytest.mark.slow
def test_standard_input_that_holds_nothing_or_cannot_be_read_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "nothing").touch()
    for flags, path, said in (
        (os.O_RDONLY, tmp_path / "nothing", b"standard input is empty: send"),
        (os.O_WRONLY, tmp_path / "nothing", b"cannot read standard input (Bad file descriptor)"),
    ):
        descriptor = os.open(path, flags)
        done = query("-", stdin=descriptor)
        os.close(descriptor)
        assert (done.returncode, done.stdout) == (1, b"")
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_server_that_stops_answering_leaves_the_count_of_what_it_answered(empty: Chain) -> None:
    def before(method: str, asked: Asked) -> Reply | None:
        return Reply(400, b'{"error": "tired"}') if asked.inferences > 1 else None

    files = [str(stroke(empty.root / f"{index}.png")) for index in range(5)]
    with http_server(before) as (port, _):
        url = f"http://127.0.0.1:{port}"
        result = empty.run("query", files[0], "missing.png", *files[1:], "--url", url)
    assert result.exit_code == 1
    assert result.stdout.count(": 0  90.00%") == 1
    assert "1 answered\nError: http://127.0.0.1" in result.stderr


def test_headers_that_query_is_given_are_sent(empty: Chain) -> None:
    seen: list[str | None] = []

    def script(connection: socket.socket) -> None:
        seen.append(request(connection.makefile("rb"))[1].get("x-key"))

    file = str(stroke(empty.root / "0.png"))
    with tcp(script) as port:
        url = f"http://127.0.0.1:{port}"
        assert empty.run("query", file, "--url", url, "--header", "X-Key=a=b").exit_code == 5
        assert empty.run("query", file, "--url", url, "--header", "X-Key").exit_code == 2
        result = empty.run("query", file, "--url", url, "--header", "X Key=a")
    assert set(seen) == {"a=b"}
    assert "'X Key' is not valid for http" in error_line(result)


@pytest.fixture(scope="session")
def digit(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the first test image, a seven."""
    path = tmp_path_factory.mktemp("digits") / "seven.png"
    write_png(load_split("mnist", made.paths.data("mnist"), "test").images[0], path)
    return path


def test_query_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, pipeline.client.query, pipeline.validation.servers;"
        "import pipeline.serving.supervise, pipeline.repository.package;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'onnxscript')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What an installation without extras lacks, imported as if it were not there.
CLIENT_ONLY = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
from pipeline.cli.main import main
main(sys.argv[1:])
"""


def client_only(*arguments: str, cwd: Path = REPOSITORY) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", CLIENT_ONLY, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", [["--url", "grpc://127.0.0.1:1"], []])
def test_where_only_asking_is_installed_query_asks(tmp_path: Path, where: list[str]) -> None:
    line = np.zeros((1, 28, 28), np.uint8)
    line[0, 4:24, 13:15] = 255
    write_png(line, tmp_path / "digit.png")
    asked = client_only("query", str(tmp_path / "digit.png"), "--root", str(tmp_path), *where)
    assert asked.returncode == 5, asked.stderr  # nobody answers, and that is what it says
    assert asked.stderr.startswith("Error: ")


def test_where_only_asking_is_installed_the_rest_says_what_it_needs(tmp_path: Path) -> None:
    trained = client_only("train", "--root", str(tmp_path))
    assert trained.returncode == 1, trained.stderr
    assert "Traceback" not in trained.stderr
    assert f"torch is not installed for {sys.executable}" in trained.stderr
    assert "run \"pip install 'handwriting-pipeline[train]'\"" in trained.stderr
    assert "(in a clone: make .venv)" in trained.stderr


# Each command in one process, where the modules of no extra are there.
WITHOUT_EXTRAS = f"""
import json, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
from click.testing import CliRunner
from pipeline.cli.main import main
commands = json.loads(sys.argv[1])
results = [CliRunner().invoke(main, ["--root", sys.argv[2], *command]) for command in commands]
print(json.dumps([(result.exit_code, result.stderr) for result in results]))
"""
NEEDS = {
    "train": "train; export; package --deploy compose; validate",
    "report": "report",
    "web": "web",
    "batch": "score . --output scored",
}


def test_a_command_whose_extra_is_missing_says_the_line_to_type(made: Chain) -> None:
    needs = [(extra, line.split()) for extra in NEEDS for line in NEEDS[extra].split("; ")]
    listed = json.dumps([command for _, command in needs])
    command = [sys.executable, "-c", WITHOUT_EXTRAS, listed, str(made.root)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    for (extra, words), (code, message) in zip(needs, json.loads(done.stdout), strict=True):
        assert code == 1, (words, message)
        assert "Traceback" not in message, words
        assert f"run \"pip install 'handwriting-pipeline[{extra}]'\"" in message, words


def test_a_module_of_the_package_or_of_no_extra_is_not_blamed_on_one(made: Chain) -> None:
    missing = ModuleNotFoundError("No module named 'PIL'", name="PIL.Image")
    message = _message_of(missing, "query") or ""
    assert "run \"pip install 'handwriting-pipeline'\"" in message
    ours = ModuleNotFoundError("No module named 'pipeline.x'", name="pipeline.x")
    assert _message_of(ours, "query") is None


def test_where_only_asking_is_installed_doctor_says_what_is_possible(tmp_path: Path) -> None:
    done = client_only("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the client's: 'pipeline query', 'pipeline lint', 'pipeline validate URL'" in done.stdout
    assert f"with {sys.executable} -m pip install 'handwriting-pipeline[train]'" in done.stdout
    assert "problem" not in done.stdout
    assert "rm -rf" not in done.stdout
    assert done.stdout.endswith("next: pipeline query --url grpc://HOST:8001 IMAGE\n")


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
    assert "1 of 3 images got no answer; 2 answered" in result.stderr


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
        with pytest.raises(PipelineError, match="does not serve a model 'nobody'"):
            nobody.infer(np.zeros((1, 1, 28, 28), np.uint8))
        with pytest.raises(PipelineError, match="takes images of shape"):
            client.infer(np.zeros((1, 1, 27, 28), np.uint8))
        with pytest.raises(PipelineError, match="takes uint8, not float32"):
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


@pytest.mark.server
def test_of_1000_files_the_900_good_are_answered_in_order_and_the_100_bad_are_named(
    served: Served, tmp_path: Path
) -> None:
    chain, _ = served
    images = load_split("mnist", chain.paths.data("mnist"), "test").images
    files = [tmp_path / "all" / f"{index:04d}.png" for index in range(1000)]
    files[0].parent.mkdir()
    for index, file in enumerate(files):
        if index % 10:
            write_png(images[index], file)
        else:
            file.write_text("no image")
    result = chain.run("--json", "query", "--top", "1", str(files[0].parent))
    assert result.exit_code == 1
    answered = [json.loads(line)["file"] for line in result.stdout.splitlines()]
    assert answered == [str(file) for index, file in enumerate(files) if index % 10]
    assert all(f"Error: {file} cannot be read" in result.stderr for file in files[::10])
    assert "100 of 1000 images got no answer; 900 answered" in result.stderr


@pytest.mark.server
def test_ctrl_c_in_the_middle_is_130_without_a_traceback(served: Served, digit: Path) -> None:
    chain, _ = served
    command = [sys.executable, "-m", "pipeline", "--root", str(chain.root), "query", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:  # type: ignore[call-overload]
        process.stdin.write(f"{digit}\n".encode() * 200)
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(200)]  # and it waits for more
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(HANG_GUARD) == 130
        assert process.stderr.read() == b"200 answered\ninterrupted\n"

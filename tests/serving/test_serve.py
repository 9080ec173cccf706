import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.cli.command import Settings
from pipeline.cli.serve import echo_server
from pipeline.client.client import Client
from pipeline.core.errors import CheckFailedError, PipelineError, ServerError
from pipeline.core.files import locked, sha256, write_json
from pipeline.core.paths import Paths
from pipeline.data.splits import load_split
from pipeline.repository import running
from pipeline.repository.config_pbtxt import ModelConfig
from pipeline.serving import process as server_process
from pipeline.serving import serve, supervise, tritonserver
from pipeline.serving.admin import Admin
from pipeline.serving.settings import ServeConfig
from pipeline.serving.tritonserver import ServerRuntime
from tests.conftest import (
    REPOSITORY,
    Chain,
    edit_json,
    error_line,
    flip_bit,
    link_server_environment,
)
from tools.traffic import Traffic, expected, lost, traffic

Served = tuple[Chain, dict[str, Any]]
HANG_GUARD = 60.0  # seconds


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_GUARD
    while not happened():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def region_owners() -> set[str]:
    """Return the ids of the servers whose models have shared memory on this machine."""
    names = [path.name for path in Path("/dev/shm").glob("*handwriting-*")]
    return {match[0] for name in names if (match := re.search("handwriting-.{12}", name))}


LEFT_BY_EARLIER_RUNS = region_owners()


def assert_nothing_is_left() -> None:
    """No shared memory without its server; servers of other tests may run beside this one."""

    def orphans() -> list[str]:
        owners = region_owners() - LEFT_BY_EARLIER_RUNS
        return [server_id for server_id in owners if not server_process.find_processes(server_id)]

    wait_until(lambda: not orphans())


@pytest.mark.server
def test_the_whole_test_split_comes_back_right_from_a_real_server(servable: Chain) -> None:
    table = servable.record("validate", str(servable.paths.repository))
    names = [row["name"] for row in table["rows"]]
    assert names == ["eager PyTorch", "ONNX Runtime", "Triton HTTP", "Triton gRPC"]
    assert table["images"] == 10_000
    for row in table["rows"]:
        assert row["differing"] == 0
        assert row["max_abs_diff"] <= 1e-4
        assert row["accuracy"] == table["rows"][0]["accuracy"] > 0.9
        assert row["images_per_second"] > 0
    agreement = json.loads(servable.paths.agreement.read_text())
    assert agreement["schema"] == 1
    assert agreement["rows"] == table["rows"]
    assert not servable.paths.server.exists()
    assert_nothing_is_left()


@pytest.mark.server
def test_status_is_what_the_server_says_when_asked(served: Served) -> None:
    chain, server = served
    record = chain.record("serve", "status")
    assert record["pid"] == server["pid"]
    assert record["models"]["handwriting"]["version"] == 1
    assert "right" in record["answers"]
    assert "admin_key" not in server
    assert chain.paths.server.stat().st_mode & 0o777 == 0o600


@pytest.mark.server
def test_a_second_server_in_the_same_project_is_refused(served: Served) -> None:
    chain, _ = served
    result = chain.run("serve", "--detach", "--port", "auto")
    assert result.exit_code == 1
    assert "is already running" in error_line(result)


@pytest.mark.server
def test_raw_bytes_of_a_digit_and_plain_http_get_a_right_answer(served: Served) -> None:
    chain, server = served
    digit = (chain.paths.packaged / "warmup" / "digit").read_bytes()
    url = f"http://127.0.0.1:{server['http_port']}/v2/models/handwriting/infer"
    request = urllib.request.Request(
        url, digit, {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet"}
    )
    with urllib.request.urlopen(request) as response:
        header = int(response.headers["Inference-Header-Content-Length"])
        body = response.read()
    outputs = np.frombuffer(body[header:], np.float32)
    assert outputs.argmax() == 0  # the warm-up digit is the golden set's first, a zero
    assert np.exp(outputs).sum() == pytest.approx(1, abs=1e-4)


README = (REPOSITORY / "README.md").read_text()
CLIENTS = (REPOSITORY / "docs" / "clients.md").read_text()


def at_its_ports(text: str, server: dict[str, Any]) -> str:
    """A snippet of the docs, asking this server instead of one at the usual ports."""
    return text.replace(":8000", f":{server['http_port']}").replace(
        ":8001", f":{server['grpc_port']}"
    )


@pytest.mark.server
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl: make system")
def test_the_docs_curl_gets_a_right_answer(served: Served) -> None:
    chain, server = served
    (snippet,) = re.findall(r"```sh\n(curl.*?)```", CLIENTS, re.DOTALL)
    assert snippet in README
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", at_its_ports(snippet, server)],
        cwd=chain.root,
        capture_output=True,
        text=True,
        check=True,
    )
    values = [float(value) for value in done.stdout.split()]
    assert len(values) == 10
    assert values.index(max(values)) == 0  # the warm-up digit is a zero


@pytest.mark.server
@pytest.mark.parametrize("library", ["tritonclient", "pipeline.client"])
def test_the_docs_python_gets_a_right_answer(served: Served, library: str, made: Chain) -> None:
    chain, server = served
    made.run("data", "sample", str(chain.root / "digits"), "--count", "1")
    snippets = re.findall(r"```python\n(.*?)```", CLIENTS, re.DOTALL)
    snippet = next(code for code in snippets if library in code and "HOST" not in code)
    assert library == "tritonclient" or snippet in README
    done = subprocess.run(
        [sys.executable, "-c", at_its_ports(snippet, server)],
        cwd=chain.root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (":0:0'" if library == "tritonclient" else "7 0.9") in done.stdout


@pytest.mark.server
def test_the_python_that_serve_prints_gets_a_right_answer(
    served: Served, made: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    chain, _ = served
    made.run("data", "sample", str(chain.root / "digits"), "--count", "1")
    server = running.load_server(chain.paths)
    assert server
    echo_server(Settings(chain.root), server)
    (line,) = re.findall(r"^or: python (-c .*)$", capsys.readouterr().out, re.MULTILINE)
    words = shlex.split(line.replace("IMAGE", "digits/00000.png"))
    done = subprocess.run(
        [sys.executable, *words], cwd=chain.root, capture_output=True, text=True, check=True
    )
    assert "label='7'" in done.stdout


@pytest.mark.server
@pytest.mark.skipif(not shutil.which("node"), reason="needs node: make system")
def test_the_docs_javascript_gets_a_right_answer(served: Served) -> None:
    chain, server = served
    (snippet,) = re.findall(r"```js\n(.*?)```", CLIENTS, re.DOTALL)
    done = subprocess.run(
        ["node", "--input-type=module", "-e", at_its_ports(snippet, server)],
        cwd=chain.root,
        capture_output=True,
        text=True,
        check=True,
    )
    digit, probability = done.stdout.split()
    assert digit == "0"
    assert 0.5 < float(probability) <= 1.001


@pytest.mark.server
def test_a_json_request_that_names_no_output_gets_them_all_as_json(served: Served) -> None:
    chain, server = served
    split = load_split("mnist", chain.paths.data("mnist"), "test")
    tensor = {
        "name": "images",
        "shape": [2, 1, 28, 28],
        "datatype": "UINT8",
        "data": split.images[:2].ravel().tolist(),
    }
    url = f"http://127.0.0.1:{server['http_port']}/v2/models/handwriting/versions/1/infer"
    request = urllib.request.Request(url, json.dumps({"id": "mine", "inputs": [tensor]}).encode())
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    (output,) = answer["outputs"]
    assert (answer["id"], output["shape"], output["datatype"]) == ("mine", [2, 10], "FP32")
    assert np.reshape(output["data"], (2, 10)).argmax(axis=1).tolist() == [7, 2]


@pytest.mark.server
def test_the_classification_extension_returns_value_index_label(served: Served) -> None:
    import tritonclient.grpc as grpc

    chain, server = served
    split = load_split("mnist", chain.paths.data("mnist"), "test")
    client = grpc.InferenceServerClient(f"127.0.0.1:{server['grpc_port']}")
    images = grpc.InferInput("images", [1, 1, 28, 28], "UINT8")
    images.set_data_from_numpy(split.images[:1])
    wanted = [grpc.InferRequestedOutput("log_probabilities", class_count=3)]
    answer = client.infer("handwriting", [images], outputs=wanted).as_numpy("log_probabilities")
    client.close()
    top = [row.decode().split(":") for row in answer.reshape(-1)]
    assert len(top) == 3
    assert top[0][1:] == ["7", "7"]
    values = [float(value) for value, _, _ in top]
    assert values == sorted(values, reverse=True)
    assert values[0] <= 0


@pytest.mark.server
@pytest.mark.parametrize("path", ["v2/repository/models/handwriting/unload", "v2/logging"])
def test_admin_interfaces_are_closed_without_the_key(served: Served, path: str) -> None:
    chain, server = served
    url = f"http://127.0.0.1:{server['http_port']}/{path}"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, b"{}"))
    assert caught.value.code == 403
    caught.value.close()
    key = json.loads(chain.paths.server.read_text())["admin_key"]
    index = f"http://127.0.0.1:{server['http_port']}/v2/repository/index"
    with urllib.request.urlopen(
        urllib.request.Request(index, b"{}", {tritonserver.KEY_HEADER: key})
    ) as response:
        assert json.load(response)[0]["name"] == "handwriting"


def ready_again(chain: Chain, before: dict[str, Any]) -> dict[str, Any]:
    """What `server.json` says once another server than `before` is ready."""

    def is_another() -> bool:
        server = running.load_server(chain.paths)
        return server is not None and server.id != before["id"] and server.is_ready

    wait_until(is_another)
    record: dict[str, Any] = json.loads(chain.paths.server.read_text())
    return record


def stubs(server: dict[str, Any]) -> set[int]:
    return set(server_process.find_processes(server["id"])) - {server["pid"]}


@pytest.mark.server
def test_a_dead_server_and_a_dead_stub_are_said_and_started_again(servable: Chain) -> None:
    first = servable.record("serve", "--detach", "--port", "auto")
    os.kill(first["pid"], signal.SIGKILL)
    second = ready_again(servable, first)
    assert (second["restarts"], second["why"]) == (1, "tritonserver died (signal 9)")
    assert second["http_port"] == first["http_port"]
    for pid in stubs(second):
        os.kill(pid, signal.SIGKILL)
    third = ready_again(servable, second)
    assert third["restarts"] == 2
    assert third["why"] == "handwriting's process died"
    status = servable.record("serve", "status")
    assert (status["pid"], status["restarts"]) == (third["pid"], 2)
    said = servable.record("serve", "logs", "--lines", "100")["lines"]
    assert any("tritonserver died (signal 9): restarting the server" in line for line in said)
    assert sum("ready again" in line for line in said) == 2
    assert servable.run("serve", "stop").exit_code == 0
    assert servable.run("serve", "stop").exit_code == 5
    assert_nothing_is_left()


@pytest.mark.server
def test_a_server_that_hangs_or_answers_wrongly_is_started_again(servable: Chain) -> None:
    first = servable.record("serve", "--detach", "--port", "auto")
    os.kill(first["pid"], signal.SIGSTOP)
    second = ready_again(servable, first)
    assert "handwriting does not answer (no answer from" in second["why"]
    server = running.load_server(servable.paths)
    assert server
    # The very model, with the classes in another order: Triton itself finds nothing wrong with it.
    model = onnx.load_model(servable.paths.onnx)
    for tensor in model.graph.initializer:
        if list(tensor.dims)[:1] == [10]:
            values = np.roll(onnx.numpy_helper.to_array(tensor), 1, axis=0)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    wrong = ModelConfig(name="handwriting", backend="onnxruntime", max_batch_size=64)
    with Admin(server.grpc_url, server.admin_key, HANG_GUARD) as admin:
        admin.load_files(wrong, {"1/model.onnx": model.SerializeToString()})
    third = ready_again(servable, second)
    assert third["why"] == "handwriting version 1 gives incorrect answers"
    assert servable.run("serve", "status").exit_code == 0
    assert servable.run("serve", "stop").exit_code == 0
    assert_nothing_is_left()


@pytest.mark.server
def test_a_killed_supervisor_is_said_and_what_it_left_is_cleared(servable: Chain) -> None:
    server = servable.record("serve", "--detach", "--port", "auto")
    os.kill(server["supervisor_pid"], signal.SIGKILL)
    wait_until(lambda: running.start_time(server["supervisor_pid"]) is None)
    status = servable.run("serve", "status")
    assert status.exit_code == 5
    assert "without its supervisor" in error_line(status)
    assert servable.run("serve", "restart").exit_code == 5
    again = servable.record("serve", "--detach", "--port", "auto")
    assert running.start_time(server["pid"]) is None
    os.kill(again["supervisor_pid"], signal.SIGKILL)
    os.kill(again["pid"], signal.SIGKILL)
    for pid in (again["supervisor_pid"], again["pid"]):
        wait_until(lambda pid=pid: running.start_time(pid) is None)  # type: ignore[misc]
    status = servable.run("serve", "status")
    assert status.exit_code == 5
    assert "has died: 'pipeline serve' starts another" in error_line(status)
    stopped = servable.run("serve", "stop")
    assert "removed a dead server" in stopped.stdout
    assert_nothing_is_left()


@pytest.mark.server
def test_a_restart_and_a_stop_lose_no_request_that_was_accepted(servable: Chain) -> None:
    server = servable.record("serve", "--detach", "--port", "auto")
    urls = [f"{p}://127.0.0.1:{server[f'{p}_port']}" for p in ("http", "grpc")]
    images = load_split("mnist", servable.paths.data("mnist"), "test").images[:200]
    ask = Traffic("", "handwriting", images, expected(servable.paths, [1], images), 1e-3)
    idle = http.client.HTTPConnection("127.0.0.1", server["http_port"])
    idle.request("GET", "/v2")
    idle.getresponse().read()  # and it stays open: Triton waits for it as long as it may
    with traffic(urls, ask) as clients:
        again = servable.record("serve", "restart")
        assert (again["restarts"], again["why"]) == (1, "on request")
        clients.await_more(50)
        assert servable.run("serve", "stop").stdout.startswith("stopped the server")
        tally = clients.stop()
    idle.close()
    assert tally.right > 0
    assert tally.wrong == 0
    assert lost(tally) == []
    assert_nothing_is_left()


@pytest.mark.server
def test_ctrl_c_while_a_detached_server_starts_leaves_nothing(
    servable: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        wait_until(servable.paths.server.exists)  # tritonserver was started
        raise KeyboardInterrupt

    monkeypatch.setattr(server_process, "poll", interrupted)  # while it waits for the server
    assert servable.run("serve", "--detach", "--port", "auto").exit_code == 130
    assert not servable.paths.server.exists()
    assert_nothing_is_left()


@pytest.mark.server
def test_sigterm_while_a_detached_server_starts_leaves_nothing(servable: Chain) -> None:
    command = [sys.executable, "-m", "pipeline", "--root", str(servable.root), "serve"]
    process = subprocess.Popen([*command, "--detach", "--port", "auto"])
    wait_until(servable.paths.server.exists)  # tritonserver was started
    server = running.load_server(servable.paths)
    assert server
    process.terminate()  # as timeout(1) does
    assert process.wait(HANG_GUARD) == 130
    assert not servable.paths.server.exists()
    for pid in (server.pid, server.supervisor_pid):
        assert running.start_time(pid) is None
    assert_nothing_is_left()


@pytest.mark.server
def test_a_server_that_never_becomes_ready_is_gone_with_all_its_processes(
    servable: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = tmp_path / "bin" / "bash"  # which Triton starts its stubs by
    hanging.parent.mkdir()
    hanging.write_text("#!/bin/sh\nsleep 500\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", f"{hanging.parent}:{os.environ['PATH']}")
    result = servable.run("serve", "--detach", "--port", "auto", "--start-seconds", "5")
    assert result.exit_code == 5
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            variables = (process / "environ").read_bytes()
            assert str(hanging.parent).encode() not in variables, process
    assert not servable.paths.server.exists()
    assert_nothing_is_left()


def test_a_folder_that_cannot_be_written_is_one_line(chain: Chain) -> None:
    chain.paths.supervisor_log.mkdir()
    result = chain.run("serve", "--detach")
    assert result.exit_code == 1
    assert str(chain.paths.supervisor_log) in error_line(result)


@pytest.mark.server
def test_ctrl_c_stops_a_server_in_the_foreground_and_leaves_nothing(servable: Chain) -> None:
    command = [sys.executable, "-m", "pipeline", "--root", str(servable.root), "serve"]
    process = subprocess.Popen([*command, "--port", "auto"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert "serving handwriting version 1 at http://127.0.0.1:" in process.stdout.readline()
    pid = json.loads(servable.paths.server.read_text())["pid"]
    process.send_signal(signal.SIGINT)
    assert process.wait(HANG_GUARD) == 130
    process.stdout.close()
    assert running.start_time(pid) is None
    assert not servable.paths.server.exists()
    assert_nothing_is_left()


@pytest.mark.server
def test_sigterm_ends_a_server_that_was_started_for_the_occasion(servable: Chain) -> None:
    command = [sys.executable, "-m", "pipeline", "--root", str(servable.root), "validate"]
    process = subprocess.Popen([*command, str(servable.paths.repository)])

    def servers() -> list[Path]:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        lines = [Path(f"/proc/{child}/cmdline") for child in children]
        return [line for line in lines if b"tritonserver\0" in line.read_bytes()]

    wait_until(lambda: bool(servers()))
    (server,) = servers()
    process.terminate()
    assert process.wait(HANG_GUARD) == 130
    assert not server.exists()
    assert_nothing_is_left()


@pytest.mark.server
@pytest.mark.parametrize("service", ["http", "grpc", "metrics"])
def test_a_taken_port_is_an_error_that_says_which(servable: Chain, service: str) -> None:
    config = serve.with_free_ports(ServeConfig())
    ports = [f"--{name}-port={port}" for name, port in config.ports.items()]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        for extra in ([], ["--detach"]):
            result = servable.run("serve", *ports, f"--{service}-port={port}", *extra)
            assert result.exit_code == 1
            assert f"port {port} ({service}) is taken" in error_line(result)


@contextlib.contextmanager
def answers_of(url: str) -> Iterator[list[np.ndarray]]:
    """What a model on `url` answers while somebody asks it all the time."""
    found, done = list[np.ndarray](), threading.Event()

    def ask() -> None:
        with Client(url, timeout=1.0, retries=0) as client:
            while not done.wait(0.002):
                with contextlib.suppress(PipelineError):
                    found.append(client.infer(np.zeros((1, 1, 28, 28), np.uint8))[0])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield found
    finally:
        done.set()
        asking.join()


@pytest.mark.server
def test_a_server_with_another_network_is_not_ready_and_exits_3(servable: Chain) -> None:
    # A golden set whose answers are another network's, with every digest in order.
    golden = servable.paths.packaged / "1" / "golden.npz"
    arrays = dict(np.load(golden))
    arrays["outputs"] = np.roll(arrays["outputs"], 1, axis=1)
    np.savez(golden, **arrays)
    manifest = golden.with_name("manifest.json")
    edit_json(manifest, lambda record: record["files"].update({"golden.npz": sha256(golden)}))
    assert servable.run("versions", "promote", "1").exit_code == 3  # without a server as well
    ports = serve.with_free_ports(ServeConfig())
    flags = [f"--{service}-port={port}" for service, port in ports.ports.items()]
    with answers_of(f"http://127.0.0.1:{ports.http_port}") as answers:
        result = servable.run("serve", "--detach", *flags)
    assert result.exit_code == 3
    assert "handwriting version 1 gives incorrect answers over http://" in error_line(result)
    assert answers == []  # of the wrong network, to whoever asked in the meantime
    assert servable.run("validate", str(servable.paths.repository)).exit_code == 3
    assert not servable.paths.server.exists()
    assert_nothing_is_left()


@pytest.mark.slow
def test_a_config_that_triton_would_refuse_is_one_line_with_its_place_and_exits_3(
    chain: Chain,
) -> None:
    config = chain.paths.packaged / "config.pbtxt"
    for right, wrong in (('name: "images"', 'name: "pictures"'), ("max_batch_size", "max_bach")):
        text = config.read_text()
        config.write_text(text.replace(right, wrong, 1))
        for extra in ([], ["--detach"]):
            result = chain.run("serve", "--port", "auto", *extra)
            assert result.exit_code == (3 if "images" in right else 1)
            message = error_line(result)
            assert str(config) in message
            assert wrong.split('"')[-2 if '"' in wrong else 0] in message
            assert len(message.splitlines()) == 1
        config.write_text(text)
    assert not chain.paths.server.exists()
    assert_nothing_is_left()


@pytest.mark.server
@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="there is a GPU")
def test_a_load_that_no_file_foretells_is_one_line_and_exits_5(servable: Chain) -> None:
    config = servable.paths.packaged / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_CPU", "KIND_GPU"))
    result = servable.run("serve", "--detach", "--port", "auto", "--start-seconds", "30")
    assert result.exit_code == 5
    message = error_line(result)
    assert "GPU" in message
    assert len(message.splitlines()) == 1
    assert not servable.paths.server.exists()
    assert_nothing_is_left()


def test_a_packaged_file_with_a_flipped_bit_is_not_served(chain: Chain) -> None:
    flip_bit(chain.paths.packaged / "1" / "model.onnx")
    result = chain.run("serve")
    assert result.exit_code == 4
    assert str(chain.paths.packaged / "1" / "model.onnx") in error_line(result)


@pytest.mark.slow
def test_a_model_that_would_have_the_server_run_a_command_is_not_served(chain: Chain) -> None:
    config = chain.paths.packaged / "config.pbtxt"
    text = config.read_text()
    ran = chain.root / "ran"
    config.write_text(text.replace("count: 1", f'count: 1 name: "$(touch {ran})"', 1))
    for command in (["serve", "--port", "auto"], ["validate", str(chain.paths.repository)]):
        result = chain.run(*command)
        assert result.exit_code == 3
        assert f"may run '$(touch {ran})'" in error_line(result)
    config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"', 1))
    result = chain.run("validate", str(chain.paths.repository))
    assert result.exit_code == 3
    assert "the backend is python, not ONNX Runtime" in error_line(result)
    config.write_text(text)
    stub = chain.paths.packaged / "triton_python_backend_stub"
    stub.write_text(f"#!/bin/sh\ntouch {ran}\n")
    stub.chmod(0o755)
    result = chain.run("serve", "--port", "auto")
    assert result.exit_code == 3
    assert str(stub) in error_line(result)


@pytest.mark.slow
def test_a_missing_and_a_truncated_model_are_not_served(chain: Chain) -> None:
    model = chain.paths.packaged / "1" / "model.onnx"
    content = model.read_bytes()
    for left, exit_code in ((None, 1), (content[:1000], 4), (b"", 4)):
        model.unlink()
        if left is not None:
            model.write_bytes(left)
        for extra in ([], ["--detach"]):
            result = chain.run("serve", "--port", "auto", *extra)
            assert result.exit_code == exit_code
            assert str(model) in error_line(result)
            assert len(error_line(result).splitlines()) == 1
        model.touch()
    assert not chain.paths.server.exists()
    assert_nothing_is_left()


def test_the_free_ports_of_a_server_are_three_different_ones() -> None:
    for _ in range(300):
        assert len(set(serve.with_free_ports(ServeConfig()).ports.values())) == 3
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for _ in range(30):
            assert port not in serve.with_free_ports(ServeConfig()).ports.values()


def test_numpy_2_in_the_servers_environment_is_refused_in_a_line(chain: Chain) -> None:
    real = REPOSITORY / ".venv-triton"
    (packages,) = real.glob("lib/python3.*/site-packages")
    odd = chain.root / ".venv-triton" / packages.relative_to(real)
    odd.mkdir(parents=True)
    (chain.root / ".venv-triton" / "bin").symlink_to(real / "bin")
    for entry in packages.iterdir():
        if not entry.name.startswith("numpy-"):
            (odd / entry.name).symlink_to(entry)
    (odd / "numpy-2.4.6.dist-info").mkdir()
    result = chain.run("serve", "--runtime", "wheel", "--port", "auto")
    is_needed = "python3.13" in odd.parts  # which has no older numpy
    if not is_needed:
        assert result.exit_code == 1
        assert "has numpy 2.4.6" in error_line(result)
        assert "make .venv-triton" in error_line(result)
        assert len(error_line(result).splitlines()) == 1


def test_a_config_with_another_digest_is_not_served(chain: Chain) -> None:
    config = chain.paths.packaged / "config.pbtxt"
    config.write_text(config.read_text().replace(sha256(chain.paths.onnx), "0" * 64))
    result = chain.run("serve")
    assert result.exit_code == 3
    assert "states digest" in error_line(result)


def test_a_config_that_selects_no_version_is_not_served(chain: Chain) -> None:
    config = chain.paths.packaged / "config.pbtxt"
    config.write_text(config.read_text().replace("versions: 1", ""))
    assert "selects no version" in error_line(chain.run("serve"))


def test_a_model_of_others_is_told_how_to_get_a_proof_or_to_be_served_without(chain: Chain) -> None:
    folder = chain.paths.repository / "theirs"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(chain.paths.onnx.read_bytes())
    (folder / "config.pbtxt").write_text('backend: "onnxruntime"\n')
    result = chain.run("serve")
    assert result.exit_code == 1
    message = error_line(result)
    assert f"{folder} has no evidence" in message
    assert f"pipeline validate --onnx {folder / '1' / 'model.onnx'} --module" in message
    assert f"tritonserver --model-repository={chain.paths.repository}" in message


@pytest.mark.usefixtures("no_checkout")
def test_without_any_tritonserver_it_says_what_is_missing_and_names_the_container(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    result = chain.run("serve")
    assert result.exit_code == 1
    message = error_line(result)
    assert "path: tritonserver is not on the PATH" in message
    assert "checkout .venv-triton" in message
    assert "docker: docker is not on the PATH" in message
    assert tritonserver.IMAGE in message


@pytest.mark.slow
@pytest.mark.parametrize("script", ["exit 1", "exec /bin/sleep 30"])
def test_a_docker_whose_engine_does_not_answer_serves_nothing(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    (tmp_path / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tritonserver, "DOCKER_SECONDS", 0.5)
    (chain.root / ".venv-triton").symlink_to("gone")
    result = chain.run("serve", "--detach", "--port", "auto")
    assert result.exit_code == 1
    assert "make .venv-triton" in error_line(result)
    assert f"{tmp_path / 'docker'} gets no answer from Docker's engine" in error_line(result)


def test_free_ports_are_auto_or_0_and_one_port_is_wrong_usage(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[ServeConfig] = []
    monkeypatch.setattr(
        supervise, "serve_repository", lambda paths, config, *_: served.append(config)
    )
    for value in ("auto", "0"):
        assert empty.run("serve", "--port", value).exit_code == 0
    assert all(config.http_port != ServeConfig.http_port for config in served)
    result = empty.run("serve", "--port", "57523")
    assert result.exit_code == 2
    assert "--http-port, --grpc-port and --metrics-port" in error_line(result)
    assert len(served) == 2


def test_status_of_no_server_says_so(chain: Chain) -> None:
    result = chain.run("serve", "status")
    assert result.exit_code == 5
    assert "no server of this project is running" in error_line(result)


def pretend(chain: Chain, **changes: object) -> None:
    """A record of a server that died, with `changes`."""
    record: dict[str, object] = {
        name: 2**22 for name in running.Server.__dataclass_fields__ if name not in changes
    }
    record |= {"id": f"handwriting-{0:012x}", "admin_key": "", "runtime": "wheel", "profile": ""}
    record |= {"is_ready": True, "ready_at": 1.0, "why": "", "models": {"handwriting": 1}}
    write_json(chain.paths.server, {**record, "root": str(chain.root.resolve()), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""},
        {"id": "*"},
        {"id": "handwriting-"},
        {"id": f"handwriting-{0:012x}/../x"},
        {"pid": "1"},
        {"pid": True},
        {"supervisor_start_time": None},
        {"models": ["handwriting"]},
        {"models": {"handwriting": "1"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["status", "stop", "restart"])
def test_a_damaged_server_record_kills_nobody_and_exits_4(
    chain: Chain, command: str, changes: dict[str, object]
) -> None:
    pretend(chain, **changes)
    result = chain.run("serve", command)
    assert result.exit_code == 4
    assert f"`$.{next(iter(changes))}" in error_line(result)
    assert chain.paths.server.exists()


def test_a_server_record_that_is_none_is_corrupt(chain: Chain) -> None:
    chain.paths.server.write_text("{}")
    assert chain.run("serve", "status").exit_code == 4
    write_json(chain.paths.server, {"id": "x"})
    result = chain.run("serve", "status")
    assert result.exit_code == 4
    assert "missing required field" in error_line(result)


def left_of(server_id: str) -> subprocess.Popen[bytes]:
    """A process that looks like one of a server's, once the system shows its environment."""
    mark = {server_process.MARK: server_id}
    process = subprocess.Popen(["sleep", "9"], env={**os.environ, **mark})
    deadline = time.monotonic() + HANG_GUARD
    while (
        process.pid not in server_process.find_processes(server_id) and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    return process


def test_only_what_bears_a_dead_servers_id_as_our_processes_do_is_cleared(chain: Chain) -> None:
    pretend(chain)
    log = chain.root / f"handwriting-{0:012x}-notes"
    log.touch()
    reader = subprocess.Popen(["tail", "-f", str(log)])
    ours = left_of(f"handwriting-{0:012x}")
    try:
        assert chain.run("serve", "stop").stdout.startswith("removed a dead server")
        assert ours.wait(HANG_GUARD) == -signal.SIGKILL
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.wait()


def test_a_stranger_that_has_the_pid_of_a_dead_supervisor_is_not_sent_a_signal(
    chain: Chain,
) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        for command, exit_code in (("restart", 5), ("stop", 0)):
            record = dict.fromkeys(("pid", "supervisor_pid"), stranger.pid)
            started = running.start_time(stranger.pid)
            assert started
            times = dict.fromkeys(("start_time", "supervisor_start_time"), started)
            pretend(chain, **record, **times)
            result = chain.run("serve", command)
            assert result.exit_code == exit_code
            assert stranger.poll() is None
        assert result.stdout.startswith("removed a dead server")
        assert not chain.paths.server.exists()
    finally:
        stranger.kill()
        assert stranger.wait() == -signal.SIGKILL


def test_a_process_that_is_just_being_started_is_cleared_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server_id = f"handwriting-{1:012x}"
    early, late = left_of(server_id), left_of(server_id)
    seen_first, see = iter([[early.pid]]), server_process.find_processes
    monkeypatch.setattr(server_process, "find_processes", lambda name: next(seen_first, see(name)))
    server_process.clear(server_id, "wheel")
    assert {early.wait(HANG_GUARD), late.wait(HANG_GUARD)} == {-signal.SIGKILL}


def test_a_copy_of_a_project_has_no_server_of_its_own(chain: Chain) -> None:
    pretend(chain, root=str(chain.root.parent / "original"))
    result = chain.run("serve", "stop")
    assert result.exit_code == 5
    assert "no server of this project is running" in error_line(result)


def test_a_second_server_of_a_project_is_refused_even_while_the_first_starts(chain: Chain) -> None:
    with locked(chain.paths.exported / ".supervisor.lock"):
        result = chain.run("serve", "--port", "auto")
    assert result.exit_code == 1
    assert "another 'pipeline serve' is running here" in error_line(result)


def test_a_pid_that_came_again_is_not_our_server() -> None:
    started = running.start_time(os.getpid())
    assert started
    assert running.is_alive(os.getpid(), started)
    assert not running.is_alive(os.getpid(), started + 1)
    assert running.start_time(2**22 + 1) is None


@pytest.fixture
def await_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Await a server that calls itself `name`, or does not answer, and has ended with `code`."""

    def await_answer(name: str | None, code: int | None = None, log: str = "") -> None:
        def server_name() -> str:
            if name is None:
                raise ServerError("nothing there")
            return name

        client = SimpleNamespace(server_name=server_name, endpoint="http://127.0.0.1:1")
        monkeypatch.setattr(
            server_process, "Client", lambda url, **_: contextlib.nullcontext(client)
        )
        (tmp_path / "log").write_text(f"of another\n{log}")
        child: Any = SimpleNamespace(poll=lambda: code)
        config = ServeConfig(start_seconds=1)
        started = server_process.ServerProcess(
            "ours", "", ServerRuntime("path", (), {}), config, child, tmp_path / "log", 11
        )
        started.await_answer(-1)

    return await_answer


def test_a_decoy_on_the_port_is_not_taken_for_ours(await_answer: Callable[..., None]) -> None:
    await_answer("ours")
    with pytest.raises(PipelineError, match=r"another server \(triton\)"):
        await_answer("triton")


def test_a_server_that_died_or_takes_too_long_is_told_with_its_cause(
    await_answer: Callable[..., None],
) -> None:
    log = "E1122 21:00:00.1 123 model.cc:642] \"failed to load 'm' version 1: Internal: why\"\n"
    with pytest.raises(ServerError, match="did not start: failed to load 'm' .* why"):
        await_answer(None, 1, log)
    with pytest.raises(ServerError, match=r"not ready in 1 s\. Its log: .* why"):
        await_answer(None, None, log)


def test_the_cause_is_the_first_error_that_says_something() -> None:
    assert tritonserver.find_cause("") == "its log is empty"
    assert tritonserver.find_cause("I0 fine\nlast words\n") == "last words"
    refusal = "docker: Cannot connect to the Docker daemon at unix:///x. Is it running?"
    docker = f"{refusal}\n\nRun 'docker run --help' for more information\n"
    assert tritonserver.find_cause(docker) == refusal
    lines = (
        'E1122 21:00:00.1 1 main.cc:1] "failed to load all models"\n'
        'E1122 21:00:00.1 1 poll.cc:2] "Poll failed for model directory"\n'
    )
    assert tritonserver.find_cause(lines) == "Poll failed for model directory"


def test_the_command_of_each_runtime_is_loopback_only(tmp_path: Path) -> None:
    for kind, program in (("path", "/opt/tritonserver"), ("docker", "/usr/bin/docker")):
        runtime = ServerRuntime(kind, (program,), {})
        line = tritonserver.build_command(
            runtime, tmp_path, ServeConfig(), "id", "key", tmp_path / "b"
        )
        text = " ".join(line)
        assert line[0] == program
        assert "--http-restricted-api=model-repository" in text
        assert "--backend-directory" not in text
        if kind == "docker":
            assert "-p=127.0.0.1:8000:8000" in text
            assert tritonserver.IMAGE in line
            assert f"--mount=type=bind,source={tmp_path},target=/models,readonly" in line
        else:
            assert "--http-address=127.0.0.1" in text


def test_a_tritonserver_on_the_path_needs_its_native_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    with pytest.raises(PipelineError, match="has no onnxruntime backend"):
        tritonserver.find_runtime(Paths(tmp_path), "path")
    (tmp_path / "backends" / "onnxruntime").mkdir(parents=True)
    assert tritonserver.find_runtime(Paths(tmp_path), "auto").kind == "path"


def test_the_wheel_is_refused_for_a_network_and_for_a_python_without_stub(
    chain: Chain, tmp_path: Path
) -> None:
    link_server_environment(chain)
    config = ServeConfig(host="0.0.0.0", runtime="wheel")
    with (
        pytest.raises(PipelineError, match="too old for a network"),
        serve.run_server(chain.paths, config),
    ):
        pass
    odd = ServerRuntime(
        "wheel", (str(tmp_path / "python3.7/site/pytriton/tritonserver/bin/t"),), {}
    )
    with pytest.raises(PipelineError, match="no stub for Python"):
        tritonserver.copy_backends(odd, tmp_path / "backends")


def test_rows_that_disagree_fail_the_table() -> None:
    from pipeline.repository.release import Limits
    from pipeline.validation.agreement import AgreementRow, Table, require_agreement

    good, far = AgreementRow("a", 0.9, 0, 0.0, 1.0), AgreementRow("b", 0.9, 0, 1e-3, 1.0)
    table = Table("m", 1, None, 1, "test", (good, good))
    require_agreement(table, Limits(1e-4, 0))
    unequal = replace(good, unequal="1 of 9 are not equal, the first is image 3")
    for bad in (far, replace(good, differing=1), replace(good, max_abs_diff=None), unequal):
        with pytest.raises(CheckFailedError, match="answers differ from the reference"):
            require_agreement(replace(table, rows=(good, bad)), Limits(1e-4, 0))
    assert "image 3" in str(replace(table, rows=(replace(good, unequal=""), unequal)))
    bad = replace(good, name="grpc://" + "x" * 40, max_abs_diff=None, images_per_second=None)
    text = str(replace(table, rows=(good, bad)))
    assert "not finite" in text
    assert max(map(len, text.splitlines())) <= 100

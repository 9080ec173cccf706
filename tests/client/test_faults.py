"""What goes wrong between a client and a server, over each protocol, for both clients.

Each fault ends in time, in an error of ours of the right kind that says how to fix it.
"""

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from pipeline.client import faults
from pipeline.client.async_client import AsyncClient
from pipeline.client.client import Certificates, Client
from pipeline.client.endpoint import RemoteModel, endpoint
from pipeline.core.errors import PipelineError, ServerError, SlowError
from pipeline.images.read import write_png
from pipeline.repository import config_pbtxt
from pipeline.serving.admin import Admin
from tests.conftest import Chain, error_line, free_port
from tests.fakes import (
    Asked,
    Authority,
    Before,
    Reply,
    as_triton,
    authority,
    config,
    grpc_server,
    http_server,
    request,
    response,
    tcp,
)

TIMEOUT = 0.5  # seconds, of a call that has to be given up
PATIENCE = 10.0  # seconds, of a call that fails by itself
HANG_GUARD = 8.0  # seconds beyond its timeout in which a call has to end; machines are shared
IMAGE = np.zeros((1, 28, 28), np.uint8)
Ask = Callable[..., Any]


def sync(url: str, images: Any = IMAGE, **options: Any) -> Any:
    with Client(url, **options) as client:
        return client.classify(images)


def awaited(url: str, images: Any = IMAGE, **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, **options) as client:
            return await client.classify(images)

    return asyncio.run(ask())


pytestmark = pytest.mark.slow  # each waits until its call has to be given up
each_client = pytest.mark.parametrize("ask", [sync, awaited])
over_both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.client.async_client.FIRST_PAUSE", 0.01)


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing that a user would take for a crash is printed."""
    yield
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said, said
    assert "Handshake failed" not in said, said


def failure(
    ask: Ask, url: str, kind: type[PipelineError], timeout: float = PATIENCE, **options: Any
) -> str:
    """The message of a call that fails in time, with just this kind of error."""
    start = time.monotonic()
    with pytest.raises(PipelineError) as raised:
        ask(url, timeout=timeout, **options)
    assert time.monotonic() - start < timeout + HANG_GUARD
    assert type(raised.value) is kind, repr(raised.value)
    message = str(raised.value)
    assert len(message.splitlines()) == 1, message
    assert ": " in message or "; " in message, message
    return message


@contextlib.contextmanager
def fake(protocol: str, before: Before = as_triton) -> Iterator[str]:
    server: Any = http_server if protocol == "http" else grpc_server
    with server(before) as (port, _):
        yield f"{protocol}://127.0.0.1:{port}"


def always(status: int, message: str, code: grpc.StatusCode) -> Before:
    body = b'{"error": "%s"}' % message.encode()
    return lambda method, asked: Reply(status, body, code, message)


# No server, or not this one.


@each_client
@over_both
def test_nothing_listens(ask: Ask, protocol: str) -> None:
    url = f"{protocol}://127.0.0.1:{free_port()}"
    message = failure(ask, url, ServerError)
    assert f"no answer from {url} (" in message
    assert "tried 4 times" in message
    assert "start it ('pipeline serve')" in message


@each_client
@over_both
def test_a_name_without_an_address(ask: Ask, protocol: str) -> None:
    message = failure(ask, f"{protocol}://no-such-host.invalid:1", ServerError)
    assert "its host name has no address" in message
    assert "check its spelling" in message


@each_client
@over_both
@pytest.mark.parametrize("name", ["a" * 70, "x" * 300 + ".invalid", "a..b"])
def test_a_name_that_cannot_be_one(ask: Ask, protocol: str, name: str) -> None:
    assert "check" in failure(ask, f"{protocol}://{name}:1", ServerError)


@each_client
@over_both
def test_the_port_of_another_service_that_greets(ask: Ask, protocol: str) -> None:
    def ssh(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        connection.recv(2**16)

    with tcp(ssh) as port:
        message = failure(ask, f"{protocol}://127.0.0.1:{port}", ServerError)
    assert "check host and port" in message


@each_client
@over_both
def test_the_port_of_the_other_protocol(ask: Ask, protocol: str) -> None:
    with fake("grpc" if protocol == "http" else "http") as url:
        port = endpoint(url).port
        message = failure(ask, f"{protocol}://127.0.0.1:{port}", ServerError)
    assert "by default Triton's HTTP is on 8000 and its gRPC on 8001" in message
    if protocol == "http":  # none of the bytes that came are shown
        assert "(its answer is not HTTP: is this the gRPC port?)" in message


@each_client
@over_both
def test_a_page_instead_of_an_answer(ask: Ask, protocol: str) -> None:
    page = Reply(200, b"<!doctype html><title>It works!</title>")
    with http_server(lambda method, asked: page) as (port, _):
        message = failure(ask, f"{protocol}://127.0.0.1:{port}", ServerError)
    assert "check host and port" in message


@each_client
@over_both
def test_a_redirect_is_not_followed(ask: Ask, protocol: str) -> None:
    elsewhere = Asked()

    def there(method: str, asked: Asked) -> None:
        elsewhere.methods.append(method)

    with http_server(there) as (port, _):
        reply = Reply(302, headers={"Location": f"http://127.0.0.1:{port}/v2"})
        with http_server(lambda method, asked: reply) as (decoy, _):
            message = failure(ask, f"{protocol}://127.0.0.1:{decoy}", ServerError)
    assert "check host and port" in message
    assert elsewhere.methods == []


# No answer, or half of one.


@each_client
@over_both
def test_a_server_that_never_accepts(ask: Ask, protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{protocol}://127.0.0.1:{listener.getsockname()[1]}"
        assert "in 0.5 s" in failure(ask, url, SlowError, TIMEOUT)


@each_client
@over_both
def test_a_server_that_takes_the_request_and_never_answers(ask: Ask, protocol: str) -> None:
    done = threading.Event()

    def hang(method: str, asked: Asked) -> None:
        if method == "ModelInfer":
            done.wait(HANG_GUARD)

    with fake(protocol, hang) as url:
        message = failure(ask, url, SlowError, TIMEOUT)
        done.set()
    assert "see whether the server runs ('pipeline serve status')" in message


@each_client
@pytest.mark.parametrize("what", ["status", "headers", "body"])
def test_an_answer_that_comes_drop_by_drop(ask: Ask, what: str) -> None:
    start = {"status": b"HTTP/1.1 200 ", "headers": b"HTTP/1.1 200 OK\r\nX: ", "body": b""}[what]
    start = start or b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
    done = threading.Event()

    def drip(connection: socket.socket) -> None:
        request(connection.makefile("rb"))
        connection.sendall(start)
        while not done.wait(0.02):
            connection.sendall(b"1")

    with tcp(drip) as port:
        failure(ask, f"http://127.0.0.1:{port}", SlowError, TIMEOUT)
        done.set()


@each_client
@over_both
def test_death_with_the_request_in_hand(ask: Ask, protocol: str) -> None:
    seen = []

    def die(connection: socket.socket) -> None:
        seen.append(connection.recv(2**16))

    with tcp(die) as port:
        message = failure(ask, f"{protocol}://127.0.0.1:{port}", ServerError)
    assert "no answer from" in message
    assert "tried 4 times" in message
    assert seen


@each_client
def test_death_within_the_answer(ask: Ask) -> None:
    def die(connection: socket.socket) -> None:
        request(connection.makefile("rb"))
        connection.sendall(response(Reply(body=config_pbtxt.to_json(config()).encode()))[:-50])

    with tcp(die) as port:
        message = failure(ask, f"http://127.0.0.1:{port}", ServerError)
    assert "tried 4 times): it closed the connection" in message


@each_client
def test_death_and_a_new_server_is_a_right_answer(ask: Ask) -> None:
    def dies_once(method: str, asked: Asked) -> Reply | None:
        if asked.inferences == 1:
            raise OSError("dies")
        return None

    with http_server(dies_once) as (port, asked):
        (found,) = ask(f"http://127.0.0.1:{port}")
    assert (found.label, asked.inferences) == ("0", 2)


@over_both
def test_a_server_that_is_started_anew_is_found_again(protocol: str) -> None:
    server: Any = http_server if protocol == "http" else grpc_server
    with server(as_triton) as (port, _):
        client = Client(f"{protocol}://127.0.0.1:{port}", timeout=PATIENCE, retries=0)
        assert client.classify(IMAGE)
    with pytest.raises(ServerError, match="no answer from"):
        client.classify(IMAGE)
    patient = Client(f"{protocol}://127.0.0.1:{port}", timeout=PATIENCE, retries=20)
    with server(as_triton, port=port), client, patient:
        assert patient.classify(IMAGE)[0].label == "0"
        assert patient.classify(IMAGE)[0].label == "0"


# A server that refuses.


@each_client
@over_both
def test_a_restricted_protocol(ask: Ask, protocol: str) -> None:
    said = "This protocol is restricted, expecting header 'triton-grpc-protocol-key'"
    refusal = always(403, said, grpc.StatusCode.UNAVAILABLE)
    with fake(protocol, refusal) as url:
        message = failure(ask, url, PipelineError)
    assert f"refuses: {said}" in message
    assert "give the key in `headers`" in message


@each_client
@over_both
def test_a_model_that_is_unloaded(ask: Ask, protocol: str) -> None:
    said = "Request for unknown model: 'handwriting' has no available versions"
    with fake(protocol, always(400, said, grpc.StatusCode.UNAVAILABLE)) as url:
        message = failure(ask, url, ServerError)
    assert "has unloaded handwriting" in message
    assert "tried 4 times): it is stopping or restarting" in message


@each_client
@over_both
def test_a_model_that_a_server_has_not_loaded_yet_is_asked_for_again(
    ask: Ask, protocol: str
) -> None:
    said = "Request for unknown model: 'handwriting' is not found"
    refused = always(400, said, grpc.StatusCode.UNAVAILABLE)
    starting = iter([refused, refused])
    with fake(protocol, lambda *call: next(starting, as_triton)(*call)) as url:
        assert len(ask(url, timeout=PATIENCE)) == 1
    with fake(protocol, refused) as url:
        message = failure(ask, url, PipelineError)
    assert "does not serve a model 'handwriting': choose another name" in message
    assert "or try again in a moment if the server has just started" in message


@each_client
@over_both
def test_a_version_that_is_no_number(ask: Ask, protocol: str) -> None:
    with pytest.raises(
        PipelineError, match="the version must be a whole number or left out, got 'newest'"
    ):
        ask(f"{protocol}://127.0.0.1:1", version="newest")


@each_client
@over_both
def test_a_batch_that_is_too_large_for_the_server(ask: Ask, protocol: str) -> None:
    said = "Received message larger than max (99999 vs. 4096)"
    with fake(protocol, always(413, said, grpc.StatusCode.RESOURCE_EXHAUSTED)) as url:
        message = failure(ask, url, PipelineError)
    assert "ask about fewer images" in message


@each_client
@over_both
def test_the_process_of_the_model_died(ask: Ask, protocol: str) -> None:
    said = "Failed to process the request(s), message: Stub process is not healthy."
    with fake(protocol, always(500, said, grpc.StatusCode.INTERNAL)) as url:
        message = failure(ask, url, ServerError)
    assert "the model's process" in message
    assert "restart it with 'pipeline serve stop'" in message


# An answer that is none.


def inferred(**change: Any) -> bytes:
    answer = service_pb2.ModelInferResponse(model_name="handwriting", model_version="1")
    tensor: dict[str, Any] = {"name": "log_probabilities", "datatype": "FP32", "shape": [1, 10]}
    content = change.pop("content", np.zeros(10, np.float32).tobytes())
    answer.outputs.add(**tensor | change)
    answer.raw_output_contents.append(content)
    return bytes(answer.SerializeToString())


GARBAGE = {
    "noise": b"\xff\xfe\x00garbage\x80",
    "nothing": b"",
    "another output": inferred(name="other"),
    "no numbers": inferred(content=np.full(10, np.nan, np.float32).tobytes()),
    "too short": inferred(content=b"123"),
    "an unknown type": inferred(datatype="FP99"),
    "rows for other images": inferred(shape=[2, 5]),
    "no shape": inferred(shape=[]),
    "a negative shape": inferred(shape=[1, -10]),
    "broken strings": inferred(datatype="BYTES", content=b"\xff\xff\xff\x7fa"),
}


@each_client
@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_over_grpc(ask: Ask, what: str) -> None:
    def lie(method: str, asked: Asked) -> Reply | None:
        return Reply(body=GARBAGE[what]) if method == "ModelInfer" else None

    with fake("grpc", lie) as url:
        assert "does not answer as Triton does" in failure(ask, url, ServerError)


@each_client
@pytest.mark.parametrize("length", ["5", "x", "99999999", "-1", None])
@pytest.mark.parametrize(
    "body",
    [b"\xff\x00", b"", b"{}", b"[]", b"null", b'{"outputs": 1}', b"[" * 100_000, b'"a"', b"1e999"],
)
def test_garbage_over_http(ask: Ask, body: bytes, length: str | None) -> None:
    headers = {} if length is None else {"Inference-Header-Content-Length": length}

    def lie(method: str, asked: Asked) -> Reply | None:
        return Reply(body=body, headers=headers) if method == "ModelInfer" else None

    with fake("http", lie) as url:
        assert "does not answer as Triton does" in failure(ask, url, ServerError)


@each_client
@over_both
@pytest.mark.parametrize("body", [b"\xff\xfe\x80", b""])
def test_a_config_that_is_none(ask: Ask, protocol: str, body: bytes) -> None:
    with fake(protocol, lambda method, asked: Reply(body=body)) as url:
        assert "does not answer as Triton does" in failure(ask, url, ServerError)


@each_client
@pytest.mark.parametrize("classes", ["{", "5", "null"])
def test_class_names_that_are_none(ask: Ask, classes: str) -> None:
    told = config()
    config_pbtxt.set_parameter(told, "classes", classes)
    body = service_pb2.ModelConfigResponse(config=told).SerializeToString()

    def lie(method: str, asked: Asked) -> Reply | None:
        return Reply(body=body) if method == "ModelConfig" else None

    with fake("grpc", lie) as url:
        assert "does not answer as Triton does" in failure(ask, url, ServerError)


@each_client
@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 " + b"O" * 100_000,
        b"\x00\x01\x02\r\n\r\n",
    ],
)
def test_http_that_is_none(ask: Ask, start: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        request(connection.makefile("rb"))
        connection.sendall(start)

    with tcp(talk) as port:
        assert "check host and port" in failure(ask, f"http://127.0.0.1:{port}", ServerError)


# TLS.


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make certificates with")
    return authority(tmp_path_factory.mktemp("tls") / "ours")


@contextlib.contextmanager
def secure(protocol: str, ca: Authority, **options: Any) -> Iterator[str]:
    if protocol == "http":
        with http_server(as_triton, ca.context(**options)) as (port, _):
            yield f"https://127.0.0.1:{port}"
    else:
        with grpc_server(as_triton, ca.credentials(**options)) as (port, _):
            yield f"grpcs://127.0.0.1:{port}"


@each_client
@over_both
def test_a_server_whose_ca_is_known_answers(ask: Ask, protocol: str, ours: Authority) -> None:
    with secure(protocol, ours) as url:
        for ca in (ours.file("ca.crt"), str(ours.file("ca.crt"))):
            assert ask(url, certificates=Certificates(ca=ca))[0].label == "0"


@over_both
def test_query_takes_certificates(protocol: str, ours: Authority, tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[0, 8:20, 13:15] = 255
    write_png(image, tmp_path / "stroke.png")
    ask = ["query", str(tmp_path / "stroke.png"), "--url"]
    mine = ("--ca", "ca.crt"), ("--certificate", "me.crt"), ("--key", "me.key")
    given = [word for option, file in mine for word in (option, str(ours.file(file)))]
    with secure(protocol, ours, is_asking=True) as url:
        result = Chain(tmp_path).run(*ask, url, *given)
        assert result.exit_code == 0, result.output
        refused = Chain(tmp_path).run(*ask, url, *given[:2])
    assert ": 0  90.00%" in result.stdout
    assert refused.exit_code == 5
    assert "(--certificate, --key)" in error_line(refused)


@each_client
@over_both
def test_a_server_that_asks_for_a_certificate_answers_who_has_one(
    ask: Ask, protocol: str, ours: Authority
) -> None:
    mine = Certificates(ours.file("ca.crt"), ours.file("me.crt"), ours.file("me.key"))
    with secure(protocol, ours, is_asking=True) as url:
        assert ask(url, certificates=mine)[0].label == "0"
        stranger = Certificates(ca=ours.file("ca.crt"))
        message = failure(ask, url, ServerError, certificates=stranger)
    assert "if it requires a client certificate" in message


@each_client
@over_both
def test_an_unknown_authority(ask: Ask, protocol: str, ours: Authority) -> None:
    with secure(protocol, ours) as url:
        message = failure(ask, url, ServerError)
    assert "no secure connection to" in message
    assert "give the certificate of the CA" in message


@each_client
@over_both
def test_a_certificate_of_another_host(ask: Ask, protocol: str, ours: Authority) -> None:
    with secure(protocol, ours, server="elsewhere") as url:
        known = Certificates(ca=ours.file("ca.crt"))
        message = failure(ask, url, ServerError, certificates=known)
    assert "no secure connection to" in message
    assert "is for another host" in message


@each_client
@over_both
def test_tls_where_the_server_speaks_without(ask: Ask, protocol: str) -> None:
    with fake(protocol) as url:
        message = failure(ask, url.replace("://", "s://"), ServerError)
    assert f"write {url}" in message


@each_client
@over_both
def test_no_tls_where_the_server_speaks_it(ask: Ask, protocol: str, ours: Authority) -> None:
    with secure(protocol, ours) as url:
        message = failure(ask, url.replace("s://", "://"), ServerError)
    assert f"write {url}" in message


@each_client
@over_both
def test_a_handshake_that_hangs(ask: Ask, protocol: str) -> None:
    with tcp(lambda connection: threading.Event().wait(TIMEOUT * 3)) as port:  # type: ignore[arg-type]
        failure(ask, f"{protocol}s://127.0.0.1:{port}", SlowError, TIMEOUT)


def test_files_that_are_no_certificates_are_named(ours: Authority, tmp_path: Path) -> None:
    text, missing = tmp_path / "notes.txt", tmp_path / "missing.pem"
    text.write_text("no certificate")
    mine = (ours.file("me.crt"), ours.file("me.key"))
    for wrong, message in [
        (Certificates(ca=text), "notes.txt is not a CA certificate"),
        (Certificates(ca=missing), "missing.pem is not a CA certificate"),
        (Certificates(certificate=mine[0]), "give both"),
        (Certificates(None, mine[0], ours.file("server.key")), "two matching PEM files"),
        (Certificates(None, text, mine[1]), "not a certificate and its key"),
    ]:
        for url in ("https://localhost", "grpcs://localhost"):
            for make in (Client, AsyncClient):
                with pytest.raises(PipelineError, match=message):
                    make(url, certificates=wrong)
    with pytest.raises(PipelineError, match="write https://localhost:8000"):
        Client("http://localhost", certificates=Certificates(ca=ours.file("ca.crt")))


def test_an_unknown_model_has_one_message_for_python_and_the_command_line() -> None:
    fault = faults.Fault("unknown", "Request for unknown model")
    target = RemoteModel(endpoint("http://x:8000"), "nobody", "", {}, Certificates())
    error = faults.explain_fault(fault, target, timeout=1.0)
    assert str(error) == (
        "http://x:8000 does not serve a model 'nobody': choose another name (--name), or try again "
        "in a moment if the server has just started; 'pipeline serve status' lists its models"
    )


# A real server.

Served = tuple[Chain, dict[str, Any]]


@pytest.fixture
def url(served: Served, protocol: str) -> str:
    return f"{protocol}://127.0.0.1:{served[1][f'{protocol}_port']}"


@pytest.mark.server
@each_client
@over_both
def test_a_real_server_refuses_names_versions_and_its_other_port(
    ask: Ask, protocol: str, served: Served, url: str
) -> None:
    message = failure(ask, url, PipelineError, name="nobody")
    assert "does not serve a model 'nobody': choose another name" in message
    message = failure(ask, url, PipelineError, version=99)
    assert "does not serve version 99 of model 'handwriting'" in message
    other = {"http": "grpc", "grpc": "http"}[protocol]
    for part in (other, "metrics"):
        message = failure(ask, f"{protocol}://127.0.0.1:{served[1][f'{part}_port']}", ServerError)
        assert "check host and port" in message


@pytest.mark.server
@each_client
@over_both
def test_a_real_server_says_what_is_wrong_with_a_tensor(
    ask: Ask, protocol: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (IMAGE[:, :27], IMAGE.astype(np.float32)):
        with pytest.raises(PipelineError, match="handwriting takes "):
            ask(url, [wrong]) if wrong.dtype == np.float32 else Client(url).infer(wrong[None])
    # What a client of another make would send.
    monkeypatch.setattr("pipeline.client.async_client.fit_input", lambda images, config: images)
    for wrong in (IMAGE[None, :, :27], IMAGE[None].astype(np.float32), IMAGE[None, :, :0]):
        with pytest.raises(PipelineError, match="refuses: "), Client(url) as client:
            client.infer(wrong)


@pytest.mark.server
@over_both
def test_a_real_server_that_restricts_or_has_unloaded_a_model(
    protocol: str, served: Served, url: str
) -> None:
    chain, server = served
    grpc_url = f"grpc://127.0.0.1:{server['grpc_port']}"
    with pytest.raises(PipelineError, match="restricted.*give the key"):
        Admin(grpc_url, "guessed", PATIENCE).unload("handwriting")
    key = json.loads(chain.paths.server.read_text())["admin_key"]
    packaged = chain.paths.packaged
    told = config_pbtxt.read(packaged / "config.pbtxt")
    told.name = "fleeting"
    parts = [packaged / "labels.txt", *packaged.glob("warmup/*"), *packaged.glob("1/model.onnx")]
    files = {str(path.relative_to(packaged)): path.read_bytes() for path in parts}
    with Admin(grpc_url, key, 60) as admin, Client(url, "fleeting") as client:
        admin.load_files(told, files)
        assert client.classify(IMAGE)
        admin.unload("fleeting")
        for ask in (sync, awaited):
            message = failure(ask, url, ServerError, name="fleeting")
            assert "has unloaded fleeting" in message
        with pytest.raises(ServerError, match="has unloaded fleeting"):
            client.classify(IMAGE)

"""The gateway on a real socket, before a client that plays Triton's part."""

import base64
import contextlib
import http.client
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Chain, error_line
from gateways import (
    ATTEMPTS,
    OURS,
    WAIT_SECONDS,
    Player,
    Served,
    bombs,
    encoded,
    jpeg,
    picture,
    player,
    png,
    served,
    until,
)
from PIL import Image

from pipeline.config import GatewayConfig
from pipeline.errors import PipelineError, ServerError, SlowError
from pipeline.files import write_json
from pipeline.gateway import PAGE
from pipeline.guard import HEADERS, check_host, host_names
from pipeline.images import read_image
from pipeline.limits import MAX_BYTES, FullError, RefusedError, Room, check_picture
from pipeline.link import Link, finder
from pipeline.paths import Paths
from pipeline.running import Server, root
from pipeline.webserver import address, listening

PLACES = 3
BOMB_MEMORY = 20 * 2**20  # bytes
LONG = b"0" * 65536


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> type[Player]:
    return player(monkeypatch)


@pytest.fixture
def gateway(triton: type[Player]) -> Iterator[Served]:
    """A gateway with little room and a short deadline, in front of `triton`."""
    config = GatewayConfig(port=0, requests=PLACES, timeout=5.0, allow_hosts=("Digits.example",))
    with served(Link(lambda: "grpc://127.0.0.1:1", "handwriting", 1.0), config) as running:
        yield running


# The page and its answer


def test_the_page_and_its_files_come_with_headers_that_keep_others_out(gateway: Served) -> None:
    for path, kind in (("/", "html"), ("/page.css", "css"), ("/page.js", "javascript")):
        reply = gateway.ask(path=path)
        assert (reply.status, kind in reply.headers["content-type"]) == (200, True)
        assert {name: reply.headers[name] for name in HEADERS} == HEADERS
        assert not [name for name in reply.headers if name.startswith("access-control")]
        assert "server" not in reply.headers
    assert HEADERS["content-security-policy"].startswith("default-src 'self';")
    assert gateway.ask(path="/gateway.py").status == 404
    assert gateway.ask(path="/../gateway.py").status == 404
    wrong_method = gateway.ask(path="/classify")
    assert wrong_method.status == 405
    assert "POST a picture to /classify" in wrong_method.record["error"]
    assert "GET / for the page" in gateway.ask(path="/nothing").record["error"]


def test_the_page_needs_nothing_that_its_policy_forbids() -> None:
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", html)
    for file in PAGE.iterdir():
        text = re.sub(r"http://www\.w3\.org/2000/svg", "", file.read_text())
        assert "http://" not in text, file
        assert "https://" not in text, file
        assert "localStorage" not in text, file


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_answered_with_all_that_the_page_shows(gateway: Served, kind: str) -> None:
    content = picture(kind)
    reply = gateway.classify(content)
    assert reply.status == 200
    answer = reply.record
    assert (answer["label"], answer["probability"], answer["sure"]) == ("7", 0.91, True)
    assert (answer["model"], answer["version"], answer["sha256"]) == ("handwriting", "1", "0" * 64)
    assert len(answer["top"]) == 10
    assert "".join(answer["classes"]) == "0123456789"
    seen = np.frombuffer(base64.b64decode(answer["seen"]), np.uint8).reshape(1, 28, 28)
    np.testing.assert_array_equal(seen, read_image(content))
    assert 0 <= answer["model_ms"] <= answer["server_ms"]
    assert reply.headers["server-timing"].startswith("total;dur=")


def test_healthz_readyz_and_metrics_say_how_it_is(gateway: Served, triton: type[Player]) -> None:
    assert gateway.ask(path="/healthz").record == {"status": "ok"}
    ready = gateway.ask(path="/readyz")
    assert (ready.status, ready.record["ready"], ready.record["version"]) == (200, True, "1")
    gateway.classify(picture())
    gateway.classify(b"no picture")
    text = gateway.ask(path="/metrics").body.decode()
    for line in (
        'gateway_requests_total{path="/classify",status="200"} 1.0',
        'gateway_requests_total{path="/classify",status="415"} 1.0',
        'gateway_request_seconds_count{path="/classify"} 2.0',
        "gateway_in_flight 0.0",
        "gateway_held_bytes 0.0",
    ):
        assert line in text.splitlines()


# Who may ask


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_who_comes_from_elsewhere_is_refused(
    gateway: Served, triton: type[Player], attempt: str
) -> None:
    headers, status = ATTEMPTS[attempt]
    content = picture()
    length = f"Content-Length: {len(content)}\r\n\r\n".encode()
    reply = gateway.raw(b"POST /classify HTTP/1.1\r\n" + headers + length + content)
    assert int(reply.split()[1]) == status
    assert triton.made == 0
    assert b"access-control" not in reply.lower()


def test_a_rebound_name_cannot_read_anything_either(gateway: Served) -> None:
    for path in ("/", "/page.js", "/readyz", "/metrics"):
        assert gateway.ask(path=path, headers={"Host": "evil.example"}).status == 421


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1:PORT", "Sec-Fetch-Site": "same-origin"},
        {"Host": "localhost:9000", "Origin": "http://localhost:9000"},  # a forwarded port
        {"Host": "[::1]:80", "Sec-Fetch-Site": "none"},
        {"Host": "digits.example", "Origin": "https://digits.example"},  # behind a proxy
    ],
)
def test_our_own_page_and_programs_are_answered(gateway: Served, headers: dict[str, str]) -> None:
    named = {name: value.replace("PORT", str(gateway.port)) for name, value in headers.items()}
    assert gateway.ask("POST", "/classify", picture(), named).status == 200


def test_a_preflight_of_another_site_learns_nothing(gateway: Served) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    reply = gateway.ask("OPTIONS", "/classify", headers=headers)
    assert reply.status == 403
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_on_all_addresses_any_address_will_do_but_no_name() -> None:
    names = host_names("0.0.0.0")
    check_host("192.168.0.7:8080", names)
    with pytest.raises(RefusedError, match="--allow-host evil.example"):
        check_host("evil.example", names)


# What may be sent


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"notes", 415),
        (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + picture(), 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        (encoded(Image.new("L", (9, 9)), "GIF"), 415),
        (encoded(Image.new("L", (9, 9)), "TIFF"), 415),
        (encoded(Image.new("L", (9, 9)), "BMP"), 415),
        (picture()[:20], 400),
        (picture()[:-50], 400),
        (picture("JPEG")[:200], 400),
        (picture("WEBP")[:25], 400),
        (png(28, 28), 400),
        (encoded(Image.new("L", (99, 99), "white"), "PNG"), 422),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(
    gateway: Served, content: bytes, status: int
) -> None:
    reply = gateway.classify(content)
    assert reply.status == status
    assert len(reply.record["error"]) > 10
    assert ("--data-binary" in reply.record["error"]) is (status == 415)
    assert gateway.classify(picture()).status == 200


@pytest.mark.slow
def test_twelve_bombs_are_refused(gateway: Served, triton: type[Player]) -> None:
    for name, content in bombs().items():
        assert gateway.classify(content).status in (400, 413), name
    until(lambda: gateway.gateway.room == Room(PLACES))
    assert gateway.classify(picture()).record["label"] == "7"


# The peak is set back first: until then it is that of the imports, or of this process.
COSTS = """
import pathlib, sys
from pipeline.errors import PipelineError
from pipeline.gateway import _read
from pipeline.usage import peak_bytes

for name in sys.argv[1:]:
    content = pathlib.Path(name).read_bytes()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, said = peak_bytes(), "accepted"
    try:
        _read(content, "digit")
    except PipelineError:
        said = "refused"
    print(said, peak_bytes() - before)
"""


def costs(contents: Sequence[bytes], folder: Path) -> list[tuple[str, int]]:
    """What a process says of each picture, and the bytes that it costs it."""
    files = [folder / str(number) for number, _ in enumerate(contents)]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    command = [sys.executable, "-c", COSTS, *map(str, files)]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    return [(said, int(held)) for said, held in map(str.split, lines)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_bomb_costs_less_than_20_megabytes_and_the_count_would_show_more(tmp_path: Path) -> None:
    allowed = picture("PNG", (2900, 2900), "RGB")
    *refused, (said, held) = costs([*bombs().values(), allowed], tmp_path)
    assert (said, held > BOMB_MEMORY) == ("accepted", True)
    assert [(said, held < BOMB_MEMORY) for said, held in refused] == [("refused", True)] * 12


def test_a_photo_of_a_telephone_is_no_bomb() -> None:
    check_picture(jpeg(5712, 4284))
    with pytest.raises(RefusedError, match="24500000 are allowed"):
        check_picture(jpeg(7000, 5000))


def test_a_body_that_says_it_is_too_long_is_not_read(gateway: Served) -> None:
    head = f"POST /classify HTTP/1.1\r\n{OURS.decode()}Content-Length: {MAX_BYTES + 1}\r\n\r\n"
    assert gateway.raw(head.encode()).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_say_so_is_cut_off(gateway: Served) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        while sent < 20 * MAX_BYTES:
            sent += len(LONG)
            yield LONG

    try:
        status = gateway.classify(parts()).status
    except (BrokenPipeError, ConnectionResetError):  # it had hung up while we were still sending
        status = 413
    assert status == 413
    assert sent < 4 * MAX_BYTES
    until(lambda: gateway.gateway.room == Room(PLACES))
    text = gateway.ask(path="/metrics").body.decode()
    assert 'gateway_requests_total{path="/classify",status="413"} 1.0' in text


def test_headers_without_an_end_are_refused(gateway: Served) -> None:
    reply = gateway.raw(b"GET / HTTP/1.1\r\n" + OURS + b"X: " + LONG)
    assert reply.startswith(b"HTTP/1.1 4")
    assert gateway.ask(path="/healthz").status == 200


# Too much, too slow, not there


@pytest.mark.parametrize("method", [b"POST", b"HEAD"])
def test_a_request_that_turns_out_to_be_none_is_refused_without_a_word_in_the_log(
    gateway: Served, caplog: pytest.LogCaptureFixture, method: bytes
) -> None:
    head = method + b" /classify HTTP/1.1\r\n" + OURS + b"Transfer-Encoding: chunked\r\n\r\n"
    for _ in range(20):
        assert gateway.raw(head + b"no chunk at all\r\n").startswith(b"HTTP/1.1 4")
    assert gateway.classify(picture()).status == 200
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_one_connection_too_many_is_503_and_the_others_stay(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.connections.MAX_CONNECTIONS", 2)
    address = ("127.0.0.1", gateway.port)
    with socket.create_connection(address), socket.create_connection(address) as second:
        refused = gateway.raw(b"GET /healthz HTTP/1.1\r\n" + OURS + b"\r\n")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in refused
        second.sendall(b"GET /healthz HTTP/1.1\r\n" + OURS + b"\r\n")
        assert second.recv(100).startswith(b"HTTP/1.1 200 ")
        with contextlib.ExitStack() as stack:
            many = [stack.enter_context(socket.create_connection(address)) for _ in range(4)]
            assert many[-1].recv(100) == b""
    until(lambda: gateway.ask(path="/healthz").status == 200)


@pytest.mark.parametrize("begun", [b"", b"GET / HT"])
@pytest.mark.parametrize(
    "before", [b"", b"GET /healthz HTTP/1.1\r\n" + OURS + b"\r\n"], ids=["first", "next"]
)
def test_who_never_ends_a_request_is_hung_up_on(
    gateway: Served, monkeypatch: pytest.MonkeyPatch, before: bytes, begun: bytes
) -> None:
    monkeypatch.setattr("pipeline.connections.REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(gateway.uvicorn, "timeout_keep_alive", 0.1)
    with socket.create_connection(("127.0.0.1", gateway.port), WAIT_SECONDS) as connection:
        if before:
            connection.sendall(before)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        connection.sendall(begun)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass


def test_a_full_queue_is_503_with_retry_after_and_the_others_are_answered(
    gateway: Served, triton: type[Player]
) -> None:
    triton.gate.clear()
    with ThreadPoolExecutor(PLACES) as pool:
        waiting = [pool.submit(gateway.classify, picture()) for _ in range(PLACES)]
        until(lambda: gateway.gateway.room.taken == PLACES)
        refused = gateway.classify(picture())
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "ask again" in refused.record["error"]
        assert gateway.ask(path="/healthz").status == 200
        triton.gate.set()
        assert [reply.result().status for reply in waiting] == [200] * PLACES


def test_requests_hold_only_so_many_bytes_together() -> None:
    room = Room(requests=2, bytes=10)
    room.enter()
    room.hold(8)
    room.enter()
    with pytest.raises(FullError, match="too many large pictures"):
        room.hold(3)
    room.leave(8)
    room.hold(3)


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["triton", "upload"])
def test_what_takes_too_long_is_given_up_with_503(triton: type[Player], slow: str) -> None:
    triton.gate.clear()
    config = GatewayConfig(port=0, timeout=0.3)
    with served(Link(lambda: "grpc://127.0.0.1:1", "handwriting", 1.0), config) as running:
        if slow == "triton":
            reply = running.classify(picture())
            status, retry = reply.status, reply.headers["retry-after"]
        else:
            head = b"POST /classify HTTP/1.1\r\n" + OURS + b"Content-Length: 100\r\n\r\nabc"
            status, retry = _hold_open(running, head)
        assert (status, retry) == (503, "1")
        until(lambda: running.gateway.room == Room(config.requests))


def _hold_open(running: Served, head: bytes) -> tuple[int, str]:
    """What is answered to a request that never ends."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.connect()
    connection.sock.sendall(head)
    answer = http.client.HTTPResponse(connection.sock)
    answer.begin()
    connection.close()
    return answer.status, str(answer.getheader("retry-after"))


def test_who_hangs_up_gives_the_place_back(gateway: Served, triton: type[Player]) -> None:
    for _ in range(PLACES + 2):
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(
                b"POST /classify HTTP/1.1\r\n" + OURS + b"Content-Length: 9\r\n\r\na"
            )
            until(lambda: gateway.gateway.room.held == 1)
        until(lambda: gateway.gateway.room == Room(PLACES))
    assert gateway.classify(picture()).status == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure", [ServerError("no answer"), SlowError("slow"), PipelineError("no model")]
)
def test_a_server_that_is_lost_is_503_until_it_is_back(
    gateway: Served, triton: type[Player], failure: PipelineError
) -> None:
    assert gateway.classify(picture()).status == 200
    triton.failure = failure
    reply = gateway.classify(picture())
    assert (reply.status, reply.record, reply.headers["retry-after"]) == (
        503,
        {"error": str(failure)},
        "1",
    )
    ready = gateway.ask(path="/readyz")
    assert (ready.status, ready.record["ready"], ready.record["error"]) == (
        503,
        False,
        str(failure),
    )
    triton.failure = None
    assert gateway.classify(picture()).status == 200
    until(lambda: gateway.ask(path="/readyz").status == 200)


def test_another_version_is_asked_over_a_new_connection(
    gateway: Served, triton: type[Player]
) -> None:
    gateway.classify(picture())
    gateway.classify(picture())
    assert triton.made == 1
    triton.version = "2"
    assert gateway.classify(picture()).record["version"] == "2"
    gateway.classify(picture())
    assert triton.made == 2


def test_probes_ask_the_model_once_a_second_at_most(
    gateway: Served, triton: type[Player], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.gateway.READY_SECONDS", 1000.0)
    asked = []
    whole = triton.classify

    async def counted(self: Player, images: Any, top: int) -> Any:
        asked.append(threading.get_ident())
        return await whole(self, images, top)

    monkeypatch.setattr(triton, "classify", counted)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: gateway.ask(path="/readyz").status, range(24)))
    assert set(replies) == {200}
    assert len(asked) <= 1


# Where it listens, and the command


def test_without_a_server_of_ours_the_link_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="'pipeline serve'"):
        finder(Paths(tmp_path), None)()
    assert finder(Paths(tmp_path), "grpc://triton:8001")() == "grpc://triton:8001"


def test_of_a_model_that_our_server_lacks_the_link_says_which_ones_it_has(tmp_path: Path) -> None:
    paths = Paths(tmp_path, name="nosuch")
    words = ("id", "admin_key", "runtime", "profile", "why")
    fields: dict[str, Any] = dict.fromkeys(Server.__dataclass_fields__, 1)
    fields |= dict.fromkeys(words, f"handwriting-{0:012}") | {"is_ready": True, "ready_at": 1.0}
    fields |= {"models": {"handwriting": 1, "fashion": 2}, "root": root(paths)}
    server = Server(**fields)
    write_json(paths.server, asdict(server))
    with pytest.raises(ServerError, match="has handwriting, fashion and not nosuch: .* --name"):
        finder(paths, None)()


def test_it_listens_on_loopback_and_a_taken_port_is_an_error() -> None:
    with listening(GatewayConfig(port=0)) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        assert address(GatewayConfig(), listener) == f"http://127.0.0.1:{port}/"
        listener.listen()
        with (
            pytest.raises(PipelineError, match=f"port {port} .*--port"),
            listening(GatewayConfig(port=port)),
        ):
            pass


@pytest.mark.parametrize(
    "changes", [{"timeout": 0}, {"timeout": float("nan")}, {"requests": 0}, {"decoders": 0}]
)
def test_a_gateway_that_could_not_answer_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PipelineError):
        GatewayConfig(**changes)


@pytest.mark.parametrize(("given", "port"), [("auto", 0), ("0", 0), ("8081", 8081)])
def test_a_free_port_of_the_page_is_auto_or_0(
    empty: Chain, monkeypatch: pytest.MonkeyPatch, given: str, port: int
) -> None:
    served: list[int] = []
    monkeypatch.setattr(
        "pipeline.webserver.serve_page", lambda paths, config, *_: served.append(config.port)
    )
    assert empty.run("web", "--port", given).exit_code == 0
    assert served == [port]


@pytest.mark.parametrize(
    "wrong", [("--port", "65536"), ("--port", "x"), ("--url", "ftp://x"), ("--timeout", "0")]
)
def test_a_page_that_could_not_be_served_is_wrong_usage(
    empty: Chain, wrong: tuple[str, str]
) -> None:
    assert empty.run("web", *wrong).exit_code == 2


def test_without_its_libraries_the_command_names_the_extra(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "pipeline.webserver", raising=False)
    result = empty.run("web")
    assert result.exit_code == 1
    assert "pip install '.[web]'" in error_line(result)


def test_the_gateway_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, pipeline.webserver;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'onnxscript')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

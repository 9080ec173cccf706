"""The gateway on a real socket, before a client that plays Triton's part."""

import asyncio
import base64
import contextlib
import http.client
import re
import resource
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
import uvicorn
from PIL import Image

from pipeline.core.errors import PipelineError, ServerError, SlowError
from pipeline.core.files import write_json
from pipeline.core.paths import Paths
from pipeline.data.splits import load_split
from pipeline.images.read import prepare_picture, read_image
from pipeline.repository.running import Server, root
from pipeline.web.gateway import PAGE
from pipeline.web.guard import HEADERS, check_request, host_names
from pipeline.web.limits import MAX_BYTES, FullError, RefusedError, Room, check_picture, client_of
from pipeline.web.link import Link, find_url
from pipeline.web.server import READ_BYTES, Connection, bind_listener, page_url
from pipeline.web.settings import GatewayConfig
from tests.conftest import Chain, error_line
from tools.gateways import (
    ATTEMPTS,
    GET,
    HOLDING,
    OURS,
    WAIT_SECONDS,
    Player,
    Served,
    bombs,
    connected,
    encoded,
    jpeg,
    picture,
    player,
    png,
    served,
    until,
)

PLACES = 5
SHARE = 3  # of them, for one client alone
BOMB_MEMORY = 20 * 2**20  # bytes
LONG = b"0" * 65536
elsewhere = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is no address elsewhere")


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
    kinds = {"/": "html", "/page.css": "css", "/page.js": "javascript", "/samples.png": "png"}
    for path, kind in kinds.items():
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
    assert "post a picture to /classify" in wrong_method.record["error"]
    assert "get the page from /" in gateway.ask(path="/nothing").record["error"]


def test_the_page_needs_nothing_that_its_policy_forbids() -> None:
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", html)
    for file in (*PAGE.iterdir(), *(PAGE.parent / "static").iterdir()):
        if file.suffix == ".png":
            continue
        text = re.sub(r"http://www\.w3\.org/2000/svg", "", file.read_text())
        assert "http://" not in text, file
        assert "https://" not in text, file
        assert "localStorage" not in text, file


def test_the_sample_digits_are_the_second_test_image_of_each_class_of_mnist(empty: Chain) -> None:
    test = load_split("mnist", empty.paths.data("mnist"), "test")
    samples = [test.images[np.flatnonzero(test.labels == digit)[1], 0] for digit in range(10)]
    with Image.open(PAGE / "samples.png") as tiles:
        np.testing.assert_array_equal(255 - np.asarray(tiles), np.hstack(samples))


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
    assert answer["parts"] == [list(box) for box in prepare_picture(content).parts]
    assert len(answer["parts"]) == 1
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
    check_request("GET", {"host": "192.168.0.7:8080"}, names)
    with pytest.raises(RefusedError, match="--allow-host evil.example"):
        check_request("GET", {"host": "evil.example"}, names)


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
from pipeline.core.errors import PipelineError
from pipeline.web.gateway import _read
from pipeline.core.machine import peak_bytes

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
@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_a_request_that_turns_out_to_be_none_is_refused_without_a_word_in_the_log(
    gateway: Served, caplog: pytest.LogCaptureFixture, method: bytes, expect: bytes
) -> None:
    head = method + b" /classify HTTP/1.1\r\n" + OURS + expect
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    for _ in range(20):
        assert gateway.raw(head + b"no chunk at all\r\n").startswith(b"HTTP/1.1 4")
    assert gateway.classify(picture()).status == 200
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_one_connection_too_many_is_503_and_the_others_stay(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.web.server.MAX_CONNECTIONS", 4)  # of which one client has half
    monkeypatch.setattr("pipeline.web.server.MAX_REFUSED", 2)
    monkeypatch.setattr("pipeline.web.server.REFUSED_SECONDS", WAIT_SECONDS)
    address = ("127.0.0.1", gateway.port)
    with socket.create_connection(address), socket.create_connection(address) as second:
        refused = gateway.raw(b"GET /healthz HTTP/1.1\r\n" + OURS + b"\r\n")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in refused
        second.sendall(b"GET /healthz HTTP/1.1\r\n" + OURS + b"\r\n")
        assert second.recv(100).startswith(b"HTTP/1.1 200 ")
        with contextlib.ExitStack() as stack:
            for _ in range(9):
                stack.enter_context(socket.create_connection(address))
            until(lambda: len(gateway.server.server_state.connections) == 2 + 2)
    until(lambda: gateway.ask(path="/healthz").status == 200)


def test_refused_clients_that_have_hung_up_leave_nothing_in_the_log(
    triton: type[Player], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.contextmanager
    def besieged(config: GatewayConfig) -> Iterator[socket.socket]:
        with bind_listener(config) as listener:
            listener.listen()
            for _ in range(9):  # they wait to be accepted, and have gone by then
                socket.create_connection(listener.getsockname()).close()
            yield listener

    monkeypatch.setattr("pipeline.web.server.bind_listener", besieged)
    monkeypatch.setattr("pipeline.web.server.MAX_CONNECTIONS", 1)
    link = Link(lambda: "grpc://127.0.0.1:1", "handwriting", 1.0)
    with served(link, GatewayConfig(port=0)) as running:
        until(lambda: running.ask(path="/healthz").status == 200)
    assert not caplog.records


FLOOD = """
import contextlib, resource, socket, sys

most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
connections = [socket.socket() for _ in range(2000)]
for connection in connections:
    connection.bind(("127.0.0.2", 0))
    connection.setblocking(False)
    connection.connect_ex(("127.0.0.1", int(sys.argv[1])))
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@elsewhere
def test_a_flood_of_connections_does_not_use_up_the_files_that_may_be_open(
    gateway: Served, caplog: pytest.LogCaptureFixture
) -> None:
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, usual[1]))
    command = [sys.executable, "-c", FLOOD, str(gateway.port)]
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as flood:
            assert flood.stdout
            assert flood.stdout.readline() == "connected\n"
            assert gateway.ask(path="/healthz").status == 200
            flood.communicate("")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    assert not caplog.records


@pytest.mark.parametrize("begun", [b"", b"GET / HT"])
@pytest.mark.parametrize(
    "before", [b"", b"GET /healthz HTTP/1.1\r\n" + OURS + b"\r\n"], ids=["first", "next"]
)
def test_who_never_ends_a_request_is_hung_up_on(
    gateway: Served, monkeypatch: pytest.MonkeyPatch, before: bytes, begun: bytes
) -> None:
    monkeypatch.setattr("pipeline.web.server.REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(gateway.server.config, "timeout_keep_alive", 0.1)
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
    with ThreadPoolExecutor(SHARE) as pool:
        waiting = [pool.submit(gateway.classify, picture()) for _ in range(SHARE)]
        until(lambda: gateway.gateway.room.taken.total() == SHARE)
        refused = gateway.classify(picture())
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "try again" in refused.record["error"]
        assert gateway.ask(path="/healthz").status == 200
        triton.gate.set()
        assert [reply.result().status for reply in waiting] == [200] * SHARE


@elsewhere
def test_a_client_that_floods_us_with_pictures_leaves_places_for_others(
    gateway: Served, triton: type[Player]
) -> None:
    content, room = picture(), gateway.gateway.room
    head = b"POST /classify HTTP/1.1\r\n" + OURS + b"Content-Length: %d\r\n\r\n" % len(content)
    triton.gate.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(2 * PLACES):
            stack.enter_context(connected(gateway.port, "127.0.0.2", head + content))
        until(lambda: refusals(gateway) + room.taken.total() == 2 * PLACES)
        other = stack.enter_context(ThreadPoolExecutor(1)).submit(gateway.classify, content)
        until(lambda: room.taken["127.0.0.1"] == 1)
        triton.gate.set()
        assert other.result().record["label"] == "7"


def refusals(gateway: Served) -> float:
    """Return how often the gateway counted 503 as its answer to a picture."""
    text = gateway.ask(path="/metrics").body.decode()
    (count,) = re.findall(r'total{path="/classify",status="503"} (.*)', text) or [0]
    return float(count)


def test_a_client_holds_as_many_bytes_as_are_left_for_others() -> None:
    room = Room(bytes=12)
    room.hold("one", 6)
    with pytest.raises(FullError, match="too many large pictures"):
        room.hold("one", 1)
    room.hold("two", 3)
    room.hold("three", 1)
    room.release("two", 3)
    room.release("three", 1)
    with pytest.raises(FullError, match="too many large pictures"):
        room.hold("two", 7)
    room.release("one", 6)
    assert room == Room(bytes=12)
    assert not room.held


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("2001:db8:0:1:2:3:4:5", "20010db800000001::/64"),
        ("fe80::1%eth0", "fe80000000000000::/64"),
    ],
)
def test_a_client_is_an_address_or_a_network_of_version_6(host: str, client: str) -> None:
    assert client_of(host) == client


@elsewhere
@pytest.mark.parametrize("how", HOLDING)
def test_a_client_that_holds_all_it_can_keeps_no_other_out(
    gateway: Served, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("pipeline.web.server.MAX_CONNECTIONS", 8)
    with holding(gateway, how, 16) as connections:
        for _ in range(5):
            assert gateway.classify(picture()).record["label"] == "7"
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.send(HOLDING[how][1])


@elsewhere
@pytest.mark.parametrize("how", HOLDING)
def test_what_a_client_holds_comes_free_in_time(
    triton: type[Player], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("pipeline.web.server.REQUEST_SECONDS", 0.1)
    monkeypatch.setattr("pipeline.web.server.ANSWER_SECONDS", 0.1)
    config = GatewayConfig(port=0, timeout=0.1)
    with served(Link(lambda: "grpc://127.0.0.1:1", "handwriting", 1.0), config) as running:
        monkeypatch.setattr(running.server.config, "timeout_keep_alive", 0.1)
        with holding(running, how, 16):
            until(lambda: running.server.server_state.connections)
            until(lambda: not running.server.server_state.connections)


@contextlib.contextmanager
def holding(gateway: Served, how: str, count: int) -> Iterator[list[socket.socket]]:
    """So many connections of another client that have begun to hold us, where they may."""
    begun = HOLDING[how][0]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(connected(gateway.port, "127.0.0.2", begun)) for _ in range(count)
        ]


def test_bodies_that_come_a_byte_at_a_time_take_no_place(gateway: Served) -> None:
    head, byte = HOLDING["never ends a body"]
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(connected(gateway.port, "127.0.0.1", head))
            for _ in range(PLACES + 2)
        ]
        for _ in range(5):
            for connection in slow:
                connection.send(byte)
            assert gateway.classify(picture()).record["label"] == "7"
        until(lambda: gateway.gateway.room.held.total() == 5 * len(slow))
        assert not gateway.gateway.room.taken


@elsewhere
def test_large_bodies_that_never_end_leave_room_for_those_of_others(gateway: Served) -> None:
    content, room = picture(), gateway.gateway.room
    room.bytes = 4 * len(content)
    with holding(gateway, "never ends a body", 5) as connections:
        for connection in connections:
            connection.send(content)
        until(lambda: room.held.total() == 2 * len(content))
        assert gateway.classify(content).record["label"] == "7"


def test_a_last_answer_that_stays_unread_holds_no_connection(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.web.server.ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(gateway.server.config, "timeout_keep_alive", 0.1)
    with contextlib.ExitStack() as stack:
        for count in range(1, 24):  # some of which nearly fit into what the system buffers
            stack.enter_context(connected(gateway.port, "127.0.0.1", GET * count))
            until(lambda: gateway.server.server_state.connections)
        until(lambda: not gateway.server.server_state.connections)


def test_requests_are_not_read_far_ahead_of_their_answers(gateway: Served) -> None:
    head = b"POST /classify HTTP/1.1\r\n" + OURS + b"Content-Length: 0\r\n\r\n"
    with (
        ThreadPoolExecutor(1) as pool,
        socket.create_connection(("127.0.0.1", gateway.port), WAIT_SECONDS) as connection,
    ):
        sending = pool.submit(connection.sendall, head * 100_000)
        answers = 0
        while answers < 100:
            answers += connection.recv(65536).count(b"HTTP/1.1 400 ")
        (kept,) = gateway.server.server_state.connections
        assert isinstance(kept, Connection)
        assert len(kept.conn.trailing_data[0]) <= READ_BYTES + len(head)
        connection.shutdown(socket.SHUT_RDWR)
        assert isinstance(sending.exception(), OSError)


def test_requests_sent_ahead_are_answered_as_the_client_reads(gateway: Served) -> None:
    script = (PAGE / "page.js").read_bytes()
    with connected(gateway.port, "127.0.0.1", GET * 60) as connection:
        until(lambda: gateway.server.server_state.connections)
        (kept,) = gateway.server.server_state.connections
        assert isinstance(kept, Connection)
        until(lambda: kept._unread)
        text = gateway.ask(path="/metrics").body.decode()
        (answers,) = re.findall(r'total{path="/page.js",status="200"} (.*)', text)
        assert float(answers) < 20
        connection.setblocking(True)
        received = b""
        while received.count(script) < 60:
            part = connection.recv(1 << 20)
            assert part
            received += part
        assert kept._unread
        until(kept._unread.cancelled)


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
            until(lambda: gateway.gateway.room.held.total() == 1)
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
    monkeypatch.setattr("pipeline.web.gateway.READY_SECONDS", 1000.0)
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
    with pytest.raises(ServerError, match="'pipeline serve --detach'"):
        find_url(Paths(tmp_path))


def test_of_a_model_that_our_server_lacks_the_link_says_which_ones_it_has(tmp_path: Path) -> None:
    paths = Paths(tmp_path, name="nosuch")
    words = ("id", "admin_key", "runtime", "profile", "why")
    fields: dict[str, Any] = dict.fromkeys(Server.__dataclass_fields__, 1)
    fields |= dict.fromkeys(words, f"handwriting-{0:012}") | {"is_ready": True, "ready_at": 1.0}
    fields |= {"models": {"handwriting": 1, "fashion": 2}, "root": root(paths)}
    server = Server(**fields)
    write_json(paths.server, asdict(server))
    with pytest.raises(ServerError, match="has handwriting, fashion, not nosuch: .* --name"):
        find_url(paths)


def test_it_listens_on_loopback_and_a_taken_port_is_an_error() -> None:
    with bind_listener(GatewayConfig(port=0)) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        assert page_url(GatewayConfig(), listener) == f"http://127.0.0.1:{port}/"
        listener.listen()
        with (
            pytest.raises(PipelineError, match=f"port {port} .*--port"),
            bind_listener(GatewayConfig(port=port)),
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
        "pipeline.web.server.serve_page", lambda paths, config, *_: served.append(config.port)
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


def test_the_page_says_whether_a_server_answers_yet(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        server.started = True
        await asyncio.sleep(0.05)

    async def answer(link: Link) -> None:
        return None

    monkeypatch.setattr(uvicorn.Server, "serve", start)
    alone = empty.run("web", "--port", "auto").stdout
    assert "no server of handwriting is running: start one with 'pipeline serve --detach'" in alone
    assert "answers" not in alone
    monkeypatch.setattr(Link, "config", answer)
    answered = empty.run("web", "--port", "auto").stdout
    assert "the server of 'pipeline serve' answers with handwriting" in answered


def test_without_its_libraries_the_command_names_the_extra(
    empty: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "pipeline.web.server", raising=False)
    result = empty.run("web")
    assert result.exit_code == 1
    assert "pip install 'handwriting-pipeline[web]'" in error_line(result)
    assert "make .venv" in error_line(result)


def test_the_gateway_loads_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, pipeline.web.server;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'onnxscript')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

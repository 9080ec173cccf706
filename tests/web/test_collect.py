"""Corrected pictures: stored once with --collect, and never without."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.files import sha256
from pipeline.data.folders import import_folder
from pipeline.web import collect
from pipeline.web.limits import RefusedError
from pipeline.web.link import Link
from pipeline.web.settings import GatewayConfig
from tests.conftest import Chain
from tools.gateways import ATTEMPTS, Player, Reply, Served, encoded, picture, player, served


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> type[Player]:
    return player(monkeypatch)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own"


@pytest.fixture
def gateway(triton: type[Player], own: Path) -> Iterator[Served]:
    config = GatewayConfig(port=0, timeout=5.0, collect=str(own))
    with served(Link(lambda: "grpc://127.0.0.1:1", "handwriting", 1.0), config) as running:
        yield running


def store(gateway: Served, label: str, content: bytes) -> Reply:
    return gateway.ask("POST", f"/collect?label={label}", content)


def list_stored(own: Path) -> list[str]:
    return sorted(path.relative_to(own).as_posix() for path in own.glob("*/*"))


def test_a_picture_is_stored_once_and_moved_by_a_second_correction(
    gateway: Served, own: Path
) -> None:
    assert gateway.ask(path="/readyz").record["collects"] is True
    content = picture()
    name = f"{sha256(content)}.png"
    for _ in range(2):
        reply = store(gateway, "7", content)
        assert (reply.status, reply.record["pictures"]) == (200, 1)
        assert reply.record["moved_from"] is None
        assert list_stored(own) == [f"7/{name}"]
    assert (own / "7" / name).read_bytes() == content
    assert store(gateway, "1", content).record["moved_from"] == "7"
    assert list_stored(own) == [f"1/{name}"]
    assert not (own / "7").exists()
    other = store(gateway, "1", picture("JPEG"))
    assert other.record["pictures"] == 2
    assert list_stored(own)[-1].endswith((".png", ".jpeg"))


def test_what_is_stored_is_a_data_set_of_a_folder_and_joins_mnist(
    gateway: Served, own: Path, tmp_path: Path
) -> None:
    for label in "17":
        for side in range(3):
            content = picture(size=(200 + 10 * side, 200 + int(label)))
            assert store(gateway, label, content).status == 200
    for prefix in ("folder:", "mnist+folder:"):
        import_folder(f"{prefix}{own}", tmp_path / prefix.replace(":", ""))


def test_without_the_flag_nothing_is_stored_and_no_one_is_told_how(
    triton: type[Player], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link = Link(lambda: "grpc://127.0.0.1:1", "handwriting", 1.0)
    with served(link, GatewayConfig(port=0)) as gateway:
        assert gateway.ask(path="/readyz").record["collects"] is False
        assert store(gateway, "7", picture()).status == 404
        assert gateway.classify(picture()).status == 200
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_who_comes_from_elsewhere_stores_nothing(gateway: Served, own: Path, attempt: str) -> None:
    headers, status = ATTEMPTS[attempt]
    content = picture()
    length = f"Content-Length: {len(content)}\r\n\r\n".encode()
    reply = gateway.raw(b"POST /collect?label=7 HTTP/1.1\r\n" + headers + length + content)
    assert int(reply.split()[1]) == status
    assert not own.exists()


@pytest.mark.parametrize(
    ("label", "content", "status", "message"),
    [
        ("", picture(), 400, "is not a class: there are 0, 1"),
        ("..", picture(), 400, "is not a class"),
        ("7", b"no picture", 415, "its format is unknown"),
        ("7", encoded(Image.new("L", (60, 60), 255), "PNG"), 422, "no ink"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    gateway: Served, own: Path, label: str, content: bytes, status: int, message: str
) -> None:
    reply = store(gateway, label, content)
    assert reply.status == status
    assert message in reply.record["error"]
    assert not own.exists()


@pytest.mark.parametrize("label", ["..", "T-shirt/top", ".hidden", "/etc"])
def test_a_class_that_is_not_the_name_of_a_folder_is_refused(own: Path, label: str) -> None:
    with pytest.raises(RefusedError, match="cannot be the name of a folder") as caught:
        collect.store_picture(own, label, picture())
    assert caught.value.status == 400
    assert not own.exists()


@pytest.mark.parametrize(("limit", "value"), [("MAX_PICTURES", 1), ("MAX_GIBIBYTES", 1e-7)])
def test_a_full_folder_takes_no_more_but_moves_what_it_has(
    own: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    collect.store_picture(own, "7", picture(size=(60, 60)))
    monkeypatch.setattr(collect, limit, value)
    with pytest.raises(RefusedError, match="collect in another one") as caught:
        collect.store_picture(own, "1", picture(size=(90, 90)))
    assert caught.value.status == 507
    assert collect.store_picture(own, "1", picture(size=(60, 60)))["moved_from"] == "7"
    assert len(list_stored(own)) == 1


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(
    gateway: Served, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> str:
        raise OSError("full")

    monkeypatch.setattr(collect, "write_bytes", fail)
    reply = store(gateway, "7", picture())
    assert reply.status == 507
    assert str(own) not in reply.record["error"]
    assert not [path for path in own.iterdir() if path.is_dir()]


def test_the_next_line_trains_on_what_was_collected(
    made: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(*given: object) -> None:
        given[3]("http://127.0.0.1:1/", "")  # type: ignore[operator]  # reports the address

    monkeypatch.setattr("pipeline.web.server.serve_page", serve)
    option = f"--dataset mnist+folder:{tmp_path}/own"
    command = f"pipeline data fetch {option} && pipeline train --init handwriting {option}"
    assert f"next: {command}" in made.run("web", "--collect", f"{tmp_path}/own").stdout
    assert "next:" not in made.run("web").stdout
    assert made.run("web", "--collect", f"{tmp_path}/my own").exit_code == 2
    (tmp_path / "file").touch()
    assert made.run("web", "--collect", f"{tmp_path}/file").exit_code == 2

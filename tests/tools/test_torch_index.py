"""The choice of the index that torch comes from, with a fake index on loopback."""

import http.server
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tools import torch_index


class FakeIndex(http.server.BaseHTTPRequestHandler):
    """An index with a page about torch at /whl/cpu, and a page that never comes at /slow."""

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            time.sleep(1)
        self.send_response(200 if self.path == "/whl/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, format: str, *values: object) -> None:  # noqa: A002  # its own name
        pass


@pytest.fixture(scope="module")
def index() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeIndex)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def without_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_index, "DRIVER", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")


@pytest.mark.usefixtures("without_driver")
def test_without_a_driver_torch_comes_from_the_cpu_index(index: str) -> None:
    assert torch_index.choose_index(f"{index}/whl/cpu") == f"{index}/whl/cpu"


@pytest.mark.usefixtures("without_driver")
@pytest.mark.parametrize("page", ["/nothing", "/slow", ":closed"])
def test_an_index_that_does_not_answer_in_time_is_left_with_a_note(
    index: str, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://127.0.0.1:1" if page == ":closed" else index + page
    begin = time.monotonic()
    assert torch_index.choose_index(url, seconds=0.2) == ""
    assert time.monotonic() - begin < 0.9
    assert (
        f"note: {url} does not answer: torch comes from pip's own index" in capsys.readouterr().err
    )


@pytest.mark.usefixtures("without_driver")
@pytest.mark.parametrize("sign", ["driver", "nvidia-smi", "macOS"])
def test_with_a_driver_or_without_linux_torch_comes_from_pips_own_index(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    if sign == "driver":
        (tmp_path / "none").mkdir()
    elif sign == "nvidia-smi":
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    else:
        monkeypatch.setattr("sys.platform", "darwin")
    assert torch_index.choose_index(f"{index}/whl/cpu") == ""


@pytest.mark.usefixtures("without_driver")
def test_an_nvidia_smi_that_fails_is_no_driver(index: str, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert torch_index.choose_index(f"{index}/whl/cpu") == f"{index}/whl/cpu"


@pytest.mark.parametrize("given", ["", "TORCH_INDEX=http://127.0.0.1:1/mine", "TORCH_INDEX="])
def test_make_installs_torch_from_the_chosen_index_unless_one_is_given(
    index: str, given: str
) -> None:
    environment = {key: v for key, v in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-nB", ".venv", f"CPU_INDEX={index}/whl/cpu", *given.split()]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, env=environment
    )
    chosen = "" if torch_index.has_driver() else f"{index}/whl/cpu"
    wanted = given.removeprefix("TORCH_INDEX=") if given else chosen
    assert f'index="{wanted}"' in done.stdout

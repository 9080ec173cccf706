import asyncio
import contextlib
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from pipeline.client.async_client import AsyncClient
from pipeline.client.client import Client, Prediction
from pipeline.core.errors import PipelineError, ServerError, SlowError
from pipeline.images.read import Prepared, write_png
from tests.conftest import REPOSITORY
from tests.fakes import (
    DIGEST,
    LARGEST,
    Asked,
    Before,
    Reply,
    as_triton,
    config,
    grpc_server,
    http_server,
)

PROTOCOLS = ["http", "grpc"]
HANG_GUARD = 20.0  # seconds; generous, because machines are shared
FAKES: dict[str, Any] = {"http": http_server, "grpc": grpc_server}
BUSY = Reply(503, b'{"error": "busy"}', grpc.StatusCode.UNAVAILABLE, "busy")


@contextlib.contextmanager
def fake(protocol: str, before: Before = as_triton) -> Iterator[tuple[str, Asked]]:
    with FAKES[protocol](before) as (port, asked):
        yield f"{protocol}://127.0.0.1:{port}", asked


def images(*digits: int) -> np.ndarray:
    """An image (1, 28, 28) for each digit, as the fakes read them."""
    found = np.zeros((len(digits), 1, 28, 28), np.uint8)
    found[:, 0, 0, 0] = digits
    return found


Classify = Callable[..., list[Prediction]]


def sync(url: str, pictures: Any, top: int = 3, **options: Any) -> list[Prediction]:
    with Client(url, **options) as client:
        return client.classify(pictures, top)


def awaited(url: str, pictures: Any, top: int = 3, **options: Any) -> list[Prediction]:
    async def ask() -> list[Prediction]:
        async with AsyncClient(url, **options) as client:
            return await client.classify(pictures, top)

    return asyncio.run(ask())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.client.async_client.FIRST_PAUSE", 0.01)


both = pytest.mark.parametrize("classify", [sync, awaited])
over_both = pytest.mark.parametrize("protocol", PROTOCOLS)


@both
@over_both
def test_a_prediction_has_label_probability_top_version_digest_and_whether_it_is_sure(
    classify: Classify, protocol: str
) -> None:
    with fake(protocol) as (url, _):
        (found,) = classify(url, [images(7)[0]], 2)
    assert (found.label, found.version, found.sha256, found.is_sure) == ("7", "1", DIGEST, True)
    assert found.probability == pytest.approx(0.9)
    assert [label for label, _ in found.top] == ["7", found.top[1][0]]
    assert found.record()["sure"] is True
    assert "is_sure" not in found.record()


@both
@over_both
def test_more_images_than_a_batch_holds_are_split_in_order(
    classify: Classify, protocol: str
) -> None:
    with fake(protocol) as (url, asked):
        found = classify(url, list(images(*range(10))))
    assert [prediction.label for prediction in found] == [str(digit) for digit in range(10)]
    assert asked.sizes == [LARGEST, LARGEST, 2]


@pytest.mark.slow
@both
def test_time_that_went_into_reading_pictures_is_not_the_servers_fault(
    classify: Classify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any, **options: Any) -> Prepared:
        time.sleep(0.3)
        return Prepared(np.zeros((1, 28, 28), np.uint8))

    monkeypatch.setattr("pipeline.client.prediction.prepare_picture", slow)
    message = r"^\d of 9 pictures were ready in 0.7 s: raise the timeout, or ask about fewer"
    with fake("http") as (url, asked), pytest.raises(SlowError, match=message):
        classify(url, [b""] * 9, timeout=0.7)
    assert asked.inferences == 0


@both
def test_no_more_pictures_are_prepared_than_the_next_request_takes(
    classify: Classify, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def read(*arguments: Any, **options: Any) -> Prepared:
        events.append("read")
        return Prepared(np.zeros((1, 28, 28), np.uint8))

    def before(method: str, asked: Asked) -> None:
        events.append(method)

    monkeypatch.setattr("pipeline.client.prediction.prepare_picture", read)
    with fake("http", before) as (url, _):
        assert len(classify(url, [b""] * (LARGEST + 1))) == LARGEST + 1
    assert events == ["ModelConfig", *["read"] * LARGEST, "ModelInfer", "read", "ModelInfer"]


@both
def test_one_picture_or_many_of_any_kind(classify: Classify, tmp_path: Path) -> None:
    path = tmp_path / "digit.png"
    drawn = np.zeros((1, 28, 28), np.uint8)
    drawn[0, 6:22, 13:16] = 255
    write_png(drawn, path)
    with Image.open(path) as opened, fake("http") as (url, _):
        opened.load()
        kinds = [
            path,
            str(path),
            path.read_bytes(),
            opened,
            np.asarray(opened.convert("L").resize((60, 60))),
        ]
        for kind in kinds:
            assert len(classify(url, kind)) == 1
            assert opened.width  # the caller's picture is still open
        assert [found.label for found in classify(url, images(3, 1))] == ["3", "1"]
        assert [found.label for found in classify(url, images(4)[0, 0])] == ["4"]
        assert [found.label for found in classify(url, (one for one in images(5, 6)))] == ["5", "6"]
        assert len(classify(url, [*kinds, *images(1)])) == 6
        assert classify(url, []) == []
        assert classify(url, images()) == []


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (42, "int is not a picture"),
        (None, "NoneType is not a picture"),
        (np.zeros((1, 28, 28), np.float32), r"takes uint8, not float32.*astype"),
        (np.zeros((28, 28), np.int64), r"takes uint8, not int64.*astype"),
        (np.zeros((2, 3, 4, 5), np.uint8), "is not a picture: use gray levels"),
        (np.zeros((0, 7), np.uint8), "is not a picture: use gray levels"),
        (np.array(3, np.uint8), "is not a picture: use gray levels"),
        (np.zeros(784, np.uint8), r"give array.reshape\(-1, 1, 28, 28\)$"),
        (np.zeros((5, 784), np.uint8), r"reshape\(-1, 1, 28, 28\), or Image.fromarray\(array\) if"),
        (np.zeros((5, 28, 28), np.uint8), r"give array.reshape\(-1, 1, 28, 28\)$"),
        (b"no picture", "cannot be read as an image"),
        (Path("nowhere.png"), "nowhere.png is not a file"),
        (Image.new("1", (9000, 9000)), "81000000|9000 x 9000 pixels.*reduce it"),
    ],
)
def test_what_is_no_picture_is_refused_before_it_is_sent(picture: Any, message: str) -> None:
    with fake("http") as (url, asked), pytest.raises(PipelineError, match=message):
        sync(url, [picture])
    assert asked.inferences == 0


def test_infer_refuses_what_the_model_cannot_take() -> None:
    with fake("http") as (url, asked), Client(url) as client:
        of_torch = r"takes uint8, not float64: .* \(255 \* images\).round\(\).astype\(np.uint8\)$"
        with pytest.raises(PipelineError, match=of_torch):
            client.infer(np.full((1, 1, 28, 28), 0.9))
        with pytest.raises(PipelineError, match=r"for ink, images.astype\(np.uint8\)$"):
            client.infer(np.full((1, 1, 28, 28), 254.0))
        with pytest.raises(PipelineError, match=r"shape \[1, 28, 28\], not \[1, 27, 28\]"):
            client.infer(np.zeros((1, 1, 27, 28), np.uint8))
        with pytest.raises(PipelineError, match="images is empty"):
            client.infer(images())
        with pytest.raises(PipelineError, match=r"images are not an array \(.*: give one, \(N"):
            client.infer([[1, 2], [3]])  # type: ignore[arg-type]
    assert asked.inferences == 0


@both
@over_both
@pytest.mark.parametrize("busy", [1, 3])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(
    classify: Classify, protocol: str, busy: int
) -> None:
    def before(method: str, asked: Asked) -> Reply | None:
        return BUSY if method == "ModelInfer" and asked.inferences <= busy else None

    with fake(protocol, before) as (url, asked):
        assert [found.label for found in classify(url, images(8))] == ["8"]
    assert asked.inferences == busy + 1


@both
@over_both
def test_a_server_that_stays_busy_is_asked_a_few_times_and_said_to_be(
    classify: Classify, protocol: str
) -> None:
    with (
        fake(protocol, lambda method, asked: BUSY) as (url, asked),
        pytest.raises(ServerError, match=r"is overloaded \(busy.*, tried 4 times\): try later"),
    ):
        classify(url, images(8))
    assert len(asked.methods) == 4


@over_both
def test_a_client_without_retries_asks_once(protocol: str) -> None:
    with (
        fake(protocol, lambda method, asked: BUSY) as (url, asked),
        pytest.raises(ServerError, match="is overloaded"),
    ):
        sync(url, images(8), retries=0)
    assert len(asked.methods) == 1


@over_both
def test_what_the_server_refuses_is_not_asked_again(protocol: str) -> None:
    refusal = Reply(400, b'{"error": "odd"}', grpc.StatusCode.INVALID_ARGUMENT, "odd")
    with (
        fake(protocol, lambda method, asked: refusal) as (url, asked),
        pytest.raises(PipelineError, match="refuses: odd"),
    ):
        sync(url, images(8))
    assert len(asked.methods) == 1


@both
def test_a_retry_that_would_outlast_the_deadline_is_not_waited_for(classify: Classify) -> None:
    later = Reply(503, b'{"error": "busy"}', headers={"Retry-After": "60"})
    start = time.monotonic()
    with (
        fake("http", lambda method, asked: later) as (url, asked),
        pytest.raises(ServerError, match="is overloaded"),
    ):
        classify(url, images(8), timeout=30)
    assert time.monotonic() - start < HANG_GUARD
    assert len(asked.methods) == 1


@pytest.mark.slow
@both
@over_both
def test_one_deadline_is_for_all_requests_of_a_call(classify: Classify, protocol: str) -> None:
    slow = threading.Event()

    def before(method: str, asked: Asked) -> None:
        slow.wait(0.2)  # less than the deadline, but not five times

    with fake(protocol, before) as (url, asked):
        with pytest.raises(SlowError, match="in 0.7 s"):
            classify(url, images(*[1] * 5 * LARGEST), timeout=0.7)
        slow.set()
    assert 0 < asked.inferences < 5


@over_both
def test_a_connection_that_the_server_closed_meanwhile_is_made_anew(protocol: str) -> None:
    with Client("http://127.0.0.1:1") as client:
        client.close()  # without a connection: nothing to close
    with fake(protocol) as (url, _), Client(url) as client:
        assert client.classify(images(1))[0].label == "1"
        client.close()
        assert client.classify(images(2))[0].label == "2"


@over_both
def test_threads_share_a_client_even_while_one_closes_its_connections(protocol: str) -> None:
    wrong: list[Any] = []

    def ask(client: Client, digit: int) -> None:
        for _ in range(10):
            try:
                found = client.classify(images(digit, digit))
            except PipelineError as error:
                wrong.append(error)
                continue
            wrong.extend(one.label for one in found if one.label != str(digit))

    with fake(protocol) as (url, _), Client(url, timeout=HANG_GUARD) as client:
        threads = [threading.Thread(target=ask, args=(client, digit)) for digit in range(8)]
        for thread in threads:
            thread.start()
        if protocol == "http":
            client.close()
        for thread in threads:
            thread.join(HANG_GUARD)
        assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@over_both
def test_tasks_share_a_client(protocol: str) -> None:
    async def ask(url: str) -> list[str]:
        async with AsyncClient(url) as client:
            found = await asyncio.gather(*(client.classify(images(n % 10)) for n in range(50)))
        return [one.label for (one,) in found]

    with fake(protocol) as (url, _):
        assert asyncio.run(ask(url)) == [str(n % 10) for n in range(50)]


@over_both
def test_a_task_that_is_cancelled_ends_and_the_client_goes_on(protocol: str) -> None:
    waiting = threading.Event()

    def before(method: str, asked: Asked) -> None:
        if asked.inferences == 1:
            waiting.wait(HANG_GUARD)

    async def ask(url: str) -> str:
        async with AsyncClient(url) as client:
            await client.config()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.classify(images(1)), 0.2)
            waiting.set()
            return (await client.classify(images(2)))[0].label

    with fake(protocol, before) as (url, _):
        assert asyncio.run(ask(url)) == "2"


def test_a_client_of_another_event_loop_is_refused() -> None:
    with fake("grpc") as (url, _):
        client = AsyncClient(url)

        async def config() -> None:
            await client.config()

        async def rest() -> None:
            with pytest.raises(PipelineError, match="make a client in each"):
                await client.config()

        asyncio.run(config())
        asyncio.run(rest())


@over_both
def test_infer_has_a_timeout_of_its_own(protocol: str) -> None:
    with fake(protocol) as (url, _), Client(url) as client:
        outputs, version = client.infer(images(1, 2), timeout=5)
        assert (outputs.shape, version) == ((2, 10), "1")
        with pytest.raises(PipelineError, match="timeout must be above 0"):
            client.infer(images(1), timeout=0)
        with pytest.raises(SlowError):
            client.infer(images(1), timeout=1e-9)


def test_a_version_that_the_config_does_not_describe_is_looked_up_once() -> None:
    with fake("grpc") as (url, asked), Client(url) as client:
        stale = config()
        del stale.parameters["sha256.1"]
        client._client._config = stale  # as it was before version 1 was promoted
        assert client.classify(images(1))[0].sha256 == DIGEST
        assert client.classify(images(1))[0].sha256 == DIGEST
    assert asked.methods.count("ModelConfig") == 1


def test_whether_a_prediction_is_sure_is_unknown_without_a_valid_threshold() -> None:
    with fake("grpc") as (url, _), Client(url) as client:
        told = config()
        client._client._config = told
        sure = []
        for threshold in ("0.95", "0.5", "", "often", "nan", "1.01"):
            told.parameters["min_probability"].string_value = threshold
            sure.append(client.classify(images(1))[0].record()["sure"])
    assert sure == [False, True, None, None, None, None]


@pytest.mark.parametrize("module", ["client", "async_client"])
def test_the_client_loads_neither_torch_nor_what_trains_exports_and_serves(module: str) -> None:
    heavy = ("torch", "onnx", "onnxruntime", "onnxscript", "matplotlib", "jinja2", "click", "pooch")
    code = f"import sys, pipeline.client.{module}; print([n for n in {heavy} if n in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True).stdout.strip() == b"[]"


def distributions(names: list[str]) -> set[str]:
    """These distributions and what they need, as this environment has them."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        extras = wanted.extras or {""}
        if name in found and wanted.extras == set():
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    return found


@pytest.mark.slow
def test_the_client_query_lint_and_package_need_only_what_comes_without_an_extra() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"]
    assert not {"torch", "onnxruntime", "onnxruntime-gpu"} & {Requirement(w).name for w in wanted}
    known = distributions(wanted)
    code = (
        "import sys; before = set(sys.modules);"
        "import pipeline.client.client, pipeline.client.async_client, pipeline.client.query;"
        "import pipeline.client.local, pipeline.validation.servers, pipeline.monitoring.drift;"
        "import pipeline.repository.lint.formats, pipeline.repository.package;"
        "import pipeline.cli.main;"
        "print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    homes = metadata.packages_distributions()
    for name in {name.partition(".")[0] for name in loaded} & homes.keys() - {"pipeline"}:
        assert {canonicalize_name(home) for home in homes[name]} & known, f"{name} is imported"


FORK = """
import os, sys
import numpy as np
from pipeline.client.client import Client
from pipeline.core.errors import PipelineError
client = Client(sys.argv[1], timeout=20)
image = np.zeros((1, 28, 28), np.uint8)
client.classify(image)
if os.fork() == 0:
    for each in (client, Client(sys.argv[1], timeout=20)):
        try:
            print(each.classify(image)[0].label, flush=True)
        except PipelineError as error:
            print(error, flush=True)
    os._exit(0)
os.wait()
print(client.classify(image)[0].label)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "second"), [("http", "0"), ("grpc", "a client does")])
def test_a_client_is_refused_in_a_forked_process_and_goes_on_in_its_own(
    protocol: str, second: str
) -> None:
    with fake(protocol) as (url, _):
        command = [sys.executable, "-c", FORK, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    first, new, own = done.stdout.splitlines()
    assert "a client does not work after a fork" in first
    assert "make a new client in this process" in first
    assert new.startswith(second)
    assert own == "0"


LOOKUP = """
import socket, sys, time
from pipeline.client.client import Client
from pipeline.core.errors import SlowError
socket.getaddrinfo = lambda *arguments, **options: time.sleep(60)
try:
    Client("http://a-host:1", timeout=0.2).config()
except SlowError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_hanging_lookup_of_a_name_ends_in_time_and_does_not_hold_up_the_exit() -> None:
    command = [sys.executable, "-c", LOOKUP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_GUARD, check=True)
    assert "no answer from http://a-host:1 in 0.2 s" in done.stdout
    assert done.stderr == ""

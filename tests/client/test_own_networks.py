"""Third-party networks behind every client: arrays of their shape, and pictures by their rule."""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.client.async_client import AsyncClient
from pipeline.client.client import Client
from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.signature import TensorSpec
from pipeline.repository import config_pbtxt
from pipeline.repository.package import _next_version
from pipeline.repository.settings import PackageConfig
from pipeline.scoring.parquet import Columns
from pipeline.scoring.source import cut, read_shard
from pipeline.web.link import Link
from pipeline.web.settings import GatewayConfig
from tests.conftest import Chain, error_line
from tests.images.test_rule import FLOATS, NORMAL, encoded, photo, reference
from tools.gateways import served

URL = "grpc://127.0.0.1:1"
RULE = f"{NORMAL},{FLOATS}"
CLASSES = ("cat", "dog", "owl")


def model(
    pictures: str = "arrays",
    dtype: str = "float32",
    shape: tuple[int, ...] = (3, 32, 32),
    largest: int = 8,
) -> config_pbtxt.ModelConfig:
    """The config of a network that answers three logits."""
    config = config_pbtxt.base_config(
        "mine",
        TensorSpec("images", dtype, shape),
        TensorSpec("logits", "float32", (3,)),
        CLASSES,
        PackageConfig(),
    )
    config.max_batch_size = largest
    config_pbtxt.set_parameter(config, "pictures", pictures)
    config_pbtxt.set_parameter(config, "outputs", "logits")
    return config


class Triton:
    """A connection that keeps what it is sent, and answers owl."""

    config_message = model()
    sent: list[np.ndarray]

    def __init__(self, *arguments: Any) -> None:
        pass

    async def config(self) -> config_pbtxt.ModelConfig:
        return self.config_message

    async def infer(
        self, config: Any, images: np.ndarray, class_count: int
    ) -> tuple[np.ndarray, str]:
        self.sent.append(images)
        return np.tile(np.array([0, 1, 5], np.float32), (len(images), 1)), "1"

    async def close(self) -> None:
        pass


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> type[Triton]:
    monkeypatch.setattr(Triton, "sent", [], raising=False)
    monkeypatch.setattr("pipeline.client.async_client.open_connection", Triton)
    return Triton


def serve(monkeypatch: pytest.MonkeyPatch, config: config_pbtxt.ModelConfig) -> None:
    monkeypatch.setattr(Triton, "config_message", config)


IMAGES = np.random.default_rng(1).normal(size=(4, 3, 32, 32)).astype(np.float32)


def test_classify_takes_a_batch_and_a_single_image_of_the_networks_shape(
    triton: type[Triton],
) -> None:
    with Client(URL, "mine") as client:
        assert [one.label for one in client.classify(IMAGES)] == ["owl"] * 4
        assert len(client.classify(IMAGES[0])) == 1
        assert len(client.classify([IMAGES[:2], IMAGES[2]])) == 3
    for sent, wanted in zip(triton.sent, (IMAGES, IMAGES[:1], IMAGES[:3]), strict=True):
        np.testing.assert_array_equal(sent, wanted)


def test_a_network_without_batches_takes_an_image_and_several(
    triton: type[Triton], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, model(shape=(-1, 3, 32, 32), largest=0))
    with Client(URL, "mine") as client:
        assert len(client.classify(IMAGES)) == 4
        assert len(client.classify(IMAGES[0])) == 1
    assert {sent.shape for sent in triton.sent} == {(1, 3, 32, 32)}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:, :, :31], r"takes images of shape \[3, 32, 32\], not \[4, 3, 31, 32\]: give \["),
        (IMAGES[:, 0], r"shape \[3, 32, 32\], not \[4, 32, 32\]: give \[N, 3, 32, 32\]$"),
        (IMAGES[0].astype(np.uint8), r"takes float32, not uint8: scale them.* / 255$"),
        (np.full((3, 32, 32), 1e300), "takes float32, and larger values are given"),
        (Path("photo.png"), r"takes only arrays: give one of shape \[3, 32, 32\], or .*--picture"),
    ],
)
def test_what_a_network_of_arrays_cannot_take_is_refused_with_what_it_takes(
    triton: type[Triton], images: Any, message: str
) -> None:
    with Client(URL, "mine") as client, pytest.raises(PipelineError, match=message):
        client.classify(images)
    assert not triton.sent


def test_float64_becomes_float32_in_classify_and_infer(triton: type[Triton]) -> None:
    doubles = IMAGES.astype(np.float64)
    doubles[0, 0, 0, 0] = np.nan  # stays what it is
    with Client(URL, "mine") as client:
        client.classify(doubles)
        client.infer(doubles)
    for sent in triton.sent:
        np.testing.assert_array_equal(sent, doubles.astype(np.float32))
        assert sent.dtype == np.float32


@pytest.fixture
def taking_pictures(triton: type[Triton], monkeypatch: pytest.MonkeyPatch) -> type[Triton]:
    serve(monkeypatch, model(RULE))
    return triton


WANTED = reference(photo(), (48, 32))


def test_query_and_the_client_prepare_a_photo_by_the_rule_of_the_config(
    taking_pictures: type[Triton], tmp_path: Path
) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(encoded(photo()))
    query = ["query", "--name", "mine", "--url", URL, str(file)]
    result = CliRunner().invoke(main, ["--json", *query])
    assert json.loads(result.stdout)["label"] == "owl"
    assert [name for name, _ in json.loads(result.stdout)["top"]] == ["owl", "dog", "cat"]
    assert CliRunner().invoke(main, [*query, "--show"]).exit_code == 0
    kinds: list[Any] = [file, file.read_bytes(), photo(), np.asarray(photo())]
    with Client(URL, "mine") as client:
        client.classify(kinds)

    async def ask() -> None:
        async with AsyncClient(URL, "mine") as client:
            await client.classify(file)

    asyncio.run(ask())
    sent = np.concatenate(taking_pictures.sent)
    assert len(sent) == 2 + len(kinds) + 1
    assert all((image == WANTED).all() for image in sent)


def test_standard_input_has_its_colours_too(taking_pictures: type[Triton]) -> None:
    query = ["query", "--name", "mine", "--url", URL, "-"]
    assert CliRunner().invoke(main, query, input=encoded(photo())).exit_code == 0
    np.testing.assert_array_equal(taking_pictures.sent[0][0], WANTED)


def test_a_gray_network_of_floats_takes_bytes_as_a_picture_and_floats_as_they_are(
    triton: type[Triton], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "mean=0.5,std=0.5,shape=1x32x32,dtype=float32"
    serve(monkeypatch, model(rule, shape=(1, 32, 32)))
    levels = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    with Client(URL, "mine") as client:
        client.classify(levels)
        client.classify(IMAGES[0, 0])
    as_floats = (levels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(triton.sent[0][0, 0], as_floats)
    np.testing.assert_array_equal(triton.sent[1][0], IMAGES[0, :1])


def test_the_gateway_prepares_a_photo_by_the_rule_and_shows_what_the_network_saw(
    taking_pictures: type[Triton],
) -> None:
    with served(Link(lambda: URL, "mine", 5.0), GatewayConfig(port=0)) as gateway:
        reply = gateway.classify(encoded(photo()))
    assert (reply.status, reply.record["label"]) == (200, "owl")
    np.testing.assert_array_equal(taking_pictures.sent[0][0], WANTED)
    assert reply.record["seen_shape"] == [3, 32, 32]
    assert len(base64.b64decode(reply.record["seen"])) == 3 * 32 * 32


def test_score_prepares_a_folder_of_photos_by_the_rule(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(photo()))
    (folder / "b.png").write_bytes(b"\x89PNG and no more")
    whole = cut(folder, (3, 32, 32), RULE, 16, tmp_path / "_unpacked", Columns())
    rows = read_shard(whole, whole.shards[0])
    np.testing.assert_array_equal(rows.images[0], WANTED)
    assert rows.images.dtype == np.float32
    assert rows.reasons[0] == ""
    assert "cannot be read" in rows.reasons[1]
    np.save(tmp_path / "arrays.npy", np.zeros((2, 3, 32, 32), np.uint8))
    with pytest.raises(PipelineError, match="holds arrays, but the model takes pictures"):
        cut(tmp_path / "arrays.npy", (3, 32, 32), RULE, 16, tmp_path / "_unpacked", Columns())


@pytest.mark.parametrize("pictures", ["resize=8,shape=3x32x32,dtype=float32", "photos"])
def test_a_config_with_a_bad_rule_is_refused_by_its_name(
    triton: type[Triton], monkeypatch: pytest.MonkeyPatch, pictures: str
) -> None:
    serve(monkeypatch, model(pictures))
    with Client(URL, "mine") as client, pytest.raises(PipelineError, match="config of mine has a"):
        client.classify(photo())
    assert not triton.sent


def test_query_says_before_it_asks_that_a_network_takes_only_arrays(
    triton: type[Triton], tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(photo()))
    result = CliRunner().invoke(
        main, ["query", "--name", "mine", "--url", URL, str(tmp_path / "photo.png")]
    )
    assert result.exit_code == 1
    assert "mine takes only arrays" in error_line(result)
    assert "export it with --picture" in error_line(result)


@pytest.fixture
def packaged(tmp_path: Path) -> Chain:
    """A project with the config of a network of arrays, and no server."""
    chain = Chain(tmp_path)
    config_pbtxt.save(chain.paths.named("mine").packaged / config_pbtxt.CONFIG, model())
    return chain


def test_web_says_before_it_starts_that_a_network_takes_only_arrays(
    packaged: Chain, triton: type[Triton], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uvicorn.Server.serve", lambda *a, **o: pytest.fail("it starts"))
    for arguments in (["--name", "mine"], ["--name", "mine", "--url", URL]):
        result = packaged.run("web", "--port", "auto", *arguments)
        assert result.exit_code == 1
        assert "export it with --picture" in error_line(result)
    assert not triton.sent


def test_a_packaged_networks_rule_may_be_added_but_not_changed(packaged: Chain) -> None:
    folder = packaged.paths.named("mine").packaged
    assert _next_version(folder, model(RULE))[0] == 1
    config_pbtxt.save(folder / config_pbtxt.CONFIG, model(RULE))
    for other in ("arrays", RULE.replace("0.49", "0.5")):
        with pytest.raises(CheckFailedError, match="would change the picture rule of"):
            _next_version(folder, model(other))

"""Every way in refuses the same pictures in the same words."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from pipeline.client.async_client import AsyncClient
from pipeline.client.client import Client
from pipeline.client.query import ask_files
from pipeline.core.errors import PipelineError
from pipeline.core.signature import IMAGES
from pipeline.data.folders import import_folder
from pipeline.images.inputs import Source
from pipeline.images.read import MAX_PIXELS
from pipeline.scoring import source as scoring
from pipeline.scoring.parquet import Columns
from pipeline.web import limits
from pipeline.web.gateway import _read
from tests.fakes import as_triton, http_server
from tests.images.test_read import as_file, png_header, seven


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http_server(as_triton) as (port, _):
        yield f"http://127.0.0.1:{port}"


# Each returns why it refuses the file, and what it calls it.
Ask = Callable[[Path, str], tuple[str, str]]


def query(file: Path, url: str) -> tuple[str, str]:
    (answer,) = ask_files(lambda: Client(url), [Source(str(file))])
    assert answer.prediction is None
    return str(answer.error), str(file)


def client(file: Path, url: str) -> tuple[str, str]:
    with Client(url) as asked, pytest.raises(PipelineError) as caught:
        asked.classify(file)
    return str(caught.value), str(file)


def client_of_bytes(file: Path, url: str) -> tuple[str, str]:
    with Client(url) as asked, pytest.raises(PipelineError) as caught:
        asked.classify(file.read_bytes())
    return str(caught.value), "the image"


def client_that_awaits(file: Path, url: str) -> tuple[str, str]:
    async def ask() -> None:
        async with AsyncClient(url) as asked:
            await asked.classify(file)

    with pytest.raises(PipelineError) as caught:
        asyncio.run(ask())
    return str(caught.value), str(file)


def gateway(file: Path, url: str) -> tuple[str, str]:
    with pytest.raises(limits.RefusedError) as caught:
        _read(file.read_bytes(), "digit")
    hint = " (with curl: --data-binary @FILE, not -F or -d)"
    said = str(caught.value).removesuffix(hint)
    # It takes fewer formats, and not such large pictures.
    said = said.replace("PNG, JPEG or WebP", "PNG, JPEG, WebP, BMP, GIF, TIFF or PNM")
    return said.replace(str(limits.MAX_PIXELS["PNG"]), str(MAX_PIXELS)), "the picture"


def score(file: Path, url: str) -> tuple[str, str]:
    unpacked = file.with_name("unpacked")
    cut = scoring.cut(file.parent, IMAGES.shape, "digit", 10, unpacked, Columns())
    (reason,) = scoring.read_shard(cut, cut.shards[0]).reasons
    return reason, str(file)


def folder_of_pictures(file: Path, url: str) -> tuple[str, str]:
    folder = file.with_name("letters")
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for side in (20, 30, 40):
            (folder / label / f"{side}.png").write_bytes(as_file(seven(side + ord(label), 60)))
    bad = folder / "a" / file.name
    bad.write_bytes(file.read_bytes())
    with pytest.raises(PipelineError) as caught:
        import_folder(f"folder:{folder}", file.with_name("cache"))
    _, problem, *_ = str(caught.value).splitlines()
    return problem.strip(), str(bad)


WAYS = (query, client, client_of_bytes, client_that_awaits, gateway, score, folder_of_pictures)
NO_DIGIT = "shows no ink, or only a dot: send one dark digit on light paper, or a light one on dark"
PICTURES = {
    NO_DIGIT: as_file(Image.new("L", (60, 40), "white")),
    "cannot be read as an image (image file is truncated): use a complete "
    "PNG, JPEG, WebP, BMP, GIF, TIFF or PNM file": as_file(seven())[:400],
    "cannot be read as an image (its format is unknown): use a complete PNG, JPEG, WebP, BMP, GIF, "
    "TIFF or PNM file": b"I am no image.\n",
    "has 10000 x 8000 pixels, 50000000 are allowed: reduce it": png_header(10_000, 8_000),
}


@pytest.mark.parametrize("ask", WAYS)
@pytest.mark.parametrize(
    ("words", "content"), PICTURES.items(), ids=("blank", "cut", "text", "large")
)
def test_a_picture_that_cannot_be_asked_about_is_refused_in_the_same_words(
    tmp_path: Path, url: str, ask: Ask, words: str, content: bytes
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(content)
    said, name = ask(file, url)
    assert said == f"{name} {words}"


@pytest.mark.parametrize("ask", [query, client, gateway, score])
@pytest.mark.parametrize("kind", ["uneven light and noise", "a dot", "a dot of light on dark"])
def test_noisy_paper_and_a_dot_are_refused_in_the_words_of_a_blank_page(
    tmp_path: Path, url: str, ask: Ask, kind: str
) -> None:
    light = np.linspace(150, 230, 400) + np.random.default_rng(0).normal(0, 4, (300, 400))
    picture = Image.fromarray(light.astype(np.uint8))
    if "dot" in kind:  # as of a tap on the page
        picture = Image.new("L", (280, 280), 255)
        ImageDraw.Draw(picture).circle((140, 150), 11, fill=0)
        picture = ImageOps.invert(picture) if "light" in kind else picture
    file = tmp_path / "picture.png"
    file.write_bytes(as_file(picture))
    said, name = ask(file, url)
    assert said == f"{name} {NO_DIGIT}"


def test_an_array_of_the_models_shape_is_no_picture_and_may_be_blank(url: str) -> None:
    with Client(url) as asked:
        assert len(asked.classify(np.zeros((2, *IMAGES.shape), np.uint8))) == 2
        assert len(asked.classify(np.zeros(IMAGES.shape, np.uint8))) == 1

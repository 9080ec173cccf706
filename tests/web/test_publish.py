"""The page as a folder, on a plain file server below a path: no server of ours answers."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from pipeline.core.errors import CorruptError
from pipeline.core.files import write_bytes
from pipeline.core.paths import Paths
from pipeline.data.splits import Split, load_scored_split, load_split
from pipeline.web import publish
from pipeline.web.publish import runtime_folder
from tests.browser import PHONE, chromium, opened, strokes_of
from tests.conftest import FEW, REPOSITORY, Chain, error_line, short_proofs
from tools.fetch_runtime import fetch_runtime

SHOTS = Path(os.environ["SHOTS"]) if "SHOTS" in os.environ else None  # a folder for screenshots
SUBPATH = "digits/here"


class Quiet(SimpleHTTPRequestHandler):
    """What `python -m http.server` answers with, without its log."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def release(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The small chain with an exact release and the page's runtime."""
    if not shutil.which("npm") and not runtime_folder(Paths(REPOSITORY)).exists():
        pytest.skip("npm is not installed, which ONNX Runtime's files for browsers come from")
    runtime = fetch_runtime(Paths(REPOSITORY))
    chain = Chain(tmp_path_factory.mktemp("release") / "chain")
    shutil.copytree(made.root, chain.root, symlinks=True)
    runtime_folder(chain.paths).symlink_to(runtime)
    with short_proofs():
        for command in (["export", "--precision", "fp32,exact"], ["validate"], ["package"]):
            result = chain.run(*command)
            assert result.exit_code == 0, result.output
    return chain


@pytest.fixture(scope="module")
def site(release: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A web host's folder, with the page and the test images that were validated in SUBPATH."""

    def load(*arguments: object) -> Split:
        split = load_scored_split(*arguments)  # type: ignore[arg-type]
        return replace(split, images=split.images[:FEW], labels=split.labels[:FEW])

    root = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "load_scored_split", load)
        for _ in range(2):  # the second time it replaces the folder
            release.record("web", "--static", str(root / SUBPATH), "--test-images")
    return root


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.mark.slow
def test_the_page_answers_and_repeats_the_release_in_the_browser(
    browser: Browser, url: str, release: Chain
) -> None:
    manifest = json.loads(
        (release.paths.repository / "handwriting-exact/1/manifest.json").read_text()
    )
    test = load_split("mnist", release.paths.data("mnist"), "test")
    asked = []
    with opened(browser, f"{url}{SUBPATH}/") as sheet:
        sheet.page.context.on("request", lambda request: asked.append(request.url))
        sheet.draw(strokes_of(test.images[0]))
        sheet.expect_answer("It is 7")
        sheet.page.get_by_role("button", name="Check it here").click()
        expect(sheet.page.locator("#checked")).to_contain_text("Equal", timeout=60_000)
        digests = [item.inner_text() for item in sheet.page.locator("#checks .computed").all()]
        keys = ("exact_golden_sha256", "exact_sha256")
        assert digests == [manifest["files"]["model.onnx"], *(manifest[key] for key in keys)]
        assert sheet.page.locator("#checks .recorded").all_inner_texts() == digests
        assert sheet.page.locator("#checks [data-state=equal]").count() == 3
        sheet.shoot(SHOTS, "static-desktop")
        assert sheet.findings() == []
        ours = sheet.page.evaluate(
            "import('./sha256.js').then((m) => m.digestHere(new Uint8Array(99)))"
        )
        assert (
            ours == hashlib.sha256(bytes(99)).hexdigest()
        )  # where browsers keep theirs from pages
        assert sheet.complaints == []
    assert asked
    assert {address.startswith((f"{url}{SUBPATH}/", "blob:")) for address in asked} == {True}


@pytest.mark.slow
def test_one_changed_byte_of_the_model_is_not_equal(browser: Browser, url: str, site: Path) -> None:
    file = site / SUBPATH / "model.onnx"
    content = file.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    file.write_bytes(changed)
    try:
        with opened(
            browser, f"{url}{SUBPATH}/", "lost", color_scheme="dark", viewport=PHONE
        ) as sheet:
            sheet.expect_answer("This is not the released model")
            sheet.page.get_by_role("button", name="Check it here").click()
            expect(sheet.page.locator("#checked")).to_contain_text("Not equal", timeout=60_000)
            first = sheet.page.locator("#checks li").first
            expect(first.locator("output")).to_have_text("not equal")
            assert first.locator(".computed").inner_text() == hashlib.sha256(changed).hexdigest()
            sheet.shoot(SHOTS, "static-phone-dark")
            assert sheet.findings() == []
            assert sheet.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    finally:
        file.write_bytes(content)


@pytest.mark.slow
def test_the_folder_has_what_the_page_needs_in_less_than_3_mb(site: Path) -> None:
    names = {str(file.relative_to(site / SUBPATH)) for file in (site / SUBPATH).rglob("*.*")}
    assert {"index.html", "model.onnx", "golden.bin", "test.bin", "ort/ort.wasm.min.js"} <= names
    assert "programs.js" not in names
    sizes = [file.stat().st_size for file in (site / SUBPATH).glob("*.*")]
    assert sum(sizes) < 3e6 - 1.6e6  # as much is what all 10,000 test images take more


def test_without_an_exact_release_it_says_how_to_make_one(made: Chain, tmp_path: Path) -> None:
    result = made.run("web", "--static", str(tmp_path / "site"))
    assert result.exit_code == 1
    assert "has no handwriting-exact" in error_line(result)
    assert "pipeline export --precision fp32,exact" in error_line(result)
    assert not (tmp_path / "site").exists()


def test_a_folder_with_other_files_is_left_alone(made: Chain, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    result = made.run("web", "--static", str(tmp_path))
    assert result.exit_code == 1
    assert "has other files" in error_line(result)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_test_images_are_only_for_the_folder(made: Chain) -> None:
    result = made.run("web", "--test-images")
    assert result.exit_code == 2
    assert "--test-images needs --static DIR" in error_line(result)


def test_a_runtime_with_another_digest_is_corrupt(tmp_path: Path) -> None:
    folder = runtime_folder(Paths(tmp_path))
    for name in publish.RUNTIME_FILES:
        write_bytes(folder / name, b"another")
    with pytest.raises(CorruptError, match=r"ort\.wasm\.min\.mjs does not match its digest"):
        fetch_runtime(Paths(tmp_path))

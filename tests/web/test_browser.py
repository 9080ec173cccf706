"""The page as people use it: Chromium, the gateway and a real tritonserver."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Route, expect

from pipeline.client.client import Client
from pipeline.data.splits import load_split
from pipeline.images.read import prepare
from pipeline.repository import config_pbtxt
from pipeline.web.link import Link, find_url
from pipeline.web.settings import GatewayConfig
from tests.browser import PHONE, chromium, opened, strokes_of
from tests.conftest import Chain, link_server_environment
from tools.gateways import Served, encoded, served

pytestmark = [pytest.mark.server, pytest.mark.slow]
SHOTS = Path(os.environ["SHOTS"]) if "SHOTS" in os.environ else None  # a folder for screenshots
Digits = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def shop(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """The small chain on a server that may be stopped and started again."""
    chain = Chain(tmp_path_factory.mktemp("shop") / "chain")
    shutil.copytree(made.root, chain.root, symlinks=True)
    link_server_environment(chain)
    chain.record("serve", "--detach", "--port", "auto")
    yield chain
    chain.run("serve", "stop")


@pytest.fixture(scope="module")
def gateway(shop: Chain) -> Iterator[Served]:
    """The gateway of `pipeline web` before that server, or whichever runs next."""
    config = GatewayConfig(port=0)
    link = Link(lambda: find_url(shop.paths), shop.paths.name, config.timeout)
    with served(link, config) as running:
        yield running


@pytest.fixture(scope="module")
def url(gateway: Served) -> str:
    return f"http://127.0.0.1:{gateway.port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def digits(shop: Chain) -> Digits:
    """The first test digit of each class that the small network is sure about."""
    test = load_split("mnist", shop.paths.data("mnist"), "test")
    found: Digits = {}
    with Client(find_url(shop.paths)) as client:
        predictions = client.classify(list(test.images[:200]))
    for image, label, said in zip(test.images, test.labels, predictions, strict=False):
        if said.label == str(label) and said.probability > 0.95:
            found.setdefault(said.label, image)
    assert len(found) == 10
    return found


def photo(digit: np.ndarray) -> bytes:
    """A digit as a telephone might see it: ink on uneven paper, large, with noise, as JPEG."""
    rng = np.random.default_rng(0)
    ink = np.asarray(Image.fromarray(digit[0]).resize((600, 600), Image.Resampling.BICUBIC))
    paper = np.full((900, 800), 205.0) - np.linspace(0, 40, 800)
    paper[120:720, 90:690] -= 0.55 * ink
    levels = np.clip(paper + rng.normal(0, 3, paper.shape), 0, 255).astype(np.uint8)
    return encoded(Image.fromarray(levels), "JPEG", quality=85)


def test_digits_drawn_with_the_mouse_are_read_while_they_are_drawn(
    browser: Browser, url: str, digits: Digits
) -> None:
    frames = ("#paper", "#label", "#seen")  # of what is drawn, answered and sent
    with opened(browser, url) as sheet:
        sheet.expect_answer("Nothing drawn yet")
        for label, image in sorted(digits.items())[::4]:
            for frame in frames:
                expect(sheet.page.locator(frame)).to_have_css("border-top-style", "dashed")
            sheet.draw(strokes_of(image))
            sheet.expect_answer(f"It is {label}")
            for frame in frames:
                expect(sheet.page.locator(frame)).not_to_have_css("border-top-style", "dashed")
            sheet.page.keyboard.press("Escape")
            sheet.expect_answer("Nothing drawn yet")
        assert sheet.complaints == []


def test_the_page_shows_what_was_answered_and_how(
    browser: Browser, url: str, digits: Digits, shop: Chain
) -> None:
    with opened(browser, url) as sheet:
        sheet.give("drop", encoded(Image.fromarray(digits["3"][0]), "PNG"))
        sheet.expect_answer("It is 3")
        page = sheet.page
        expect(page.locator(".bars li")).to_have_count(10)
        expect(page.locator(".bars li.first b")).to_have_text("3")
        np.testing.assert_array_equal(sheet.seen(), prepare(digits["3"][0]))
        expect(page.locator("#model")).not_to_be_visible()
        page.get_by_text("Times and model").click()
        expect(page.locator("#model")).to_be_visible()
        expect(page.locator("#model")).to_have_text("handwriting, version 1")
        config = config_pbtxt.read(shop.paths.packaged / "config.pbtxt")
        digest = page.locator("#digest").inner_text()
        assert len(digest) == 16
        assert str(config_pbtxt.digest(config, "1")).startswith(digest)
        for name in ("#round-trip", "#server-time"):
            expect(page.locator(name)).to_contain_text(" ms")
        sheet.shoot(SHOTS, "desktop-light")
        assert sheet.findings() == []
        page.evaluate("() => { document.querySelector('.bars b').textContent = 'a long name'; }")
        tracks = [track.bounding_box() for track in page.locator(".bars .track").all()]
        assert len({track["x"] for track in tracks if track}) == 1  # all labels in one column


def test_without_a_threshold_the_page_says_nothing_about_being_sure(
    browser: Browser, url: str, digits: Digits
) -> None:
    def answer(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), "sure": None})

    with opened(browser, url) as sheet:
        sheet.page.route("**/classify", answer)
        sheet.draw(strokes_of(digits["3"]))
        sheet.expect_answer("Read as 3")
        expect(sheet.page.locator("#label")).to_have_text("3")
        assert "sure" not in sheet.page.locator("#answer").inner_text()
        sheet.page.unroute_all(behavior="wait")
        assert sheet.complaints == []


def test_a_photo_can_be_dropped_pasted_or_chosen(
    browser: Browser, url: str, digits: Digits, tmp_path: Path
) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(photo(digits["5"]))
    with opened(browser, url, color_scheme="dark") as sheet:
        sheet.give("drop", photo(digits["2"]), "image/jpeg")
        sheet.expect_answer("It is 2")
        sheet.shoot(SHOTS, "photo-dark")
        sheet.give("paste", photo(digits["7"]), "image/jpeg")
        sheet.expect_answer("It is 7")
        with sheet.page.expect_file_chooser() as chooser:
            sheet.page.get_by_role("button", name="Choose picture").click()
        chooser.value.set_files(file)
        sheet.expect_answer("It is 5")
        sheet.page.get_by_role("button", name="Clear").click()
        sheet.expect_answer("Nothing drawn yet")
        both = np.full((30, 60), 255, np.uint8)
        for left, label in ((1, "7"), (31, "2")):
            both[1:29, left : left + 28] -= digits[label][0]
        with sheet.page.expect_response("**/classify") as response:
            sheet.give("drop", encoded(Image.fromarray(both).resize((600, 300)), "PNG"))
        line = "2 parts found; the one in the solid frame was read."
        expect(sheet.page.locator("#parts")).to_have_text(line)
        parts = response.value.json()["parts"]
        assert len(parts) == 2
        left, top, _, bottom = parts[0]
        scale = 560 / 600  # of the canvas; the picture is in the middle of its height
        place = (scale * left - 6, 140 + scale * (top + bottom) / 2)
        sheet.page.wait_for_timeout(100)  # in which it is painted
        assert sheet.pixel(*place) == [142, 166, 255, 255]  # the accent in dark
        sheet.shoot(SHOTS, "parts-dark")
        sheet.page.get_by_role("button", name="Clear").click()
        expect(sheet.page.locator("#parts")).not_to_be_visible()
        sheet.give("drop", b"no picture", "text/plain")
        sheet.expect_answer("This file is not a PNG, JPEG or WebP")
        sheet.give("drop", b"no picture", "image/png")
        sheet.expect_answer("The picture cannot be read")
        sheet.give("drop", encoded(Image.new("L", (4000, 3000), "white"), "PNG"))
        sheet.expect_answer("No digit found")
        expect(sheet.page.locator("#detail")).to_contain_text("shows no ink, or only a dot: send")
        assert sheet.complaints == []


def test_undo_brings_back_what_a_picture_or_a_stroke_took_the_place_of(
    browser: Browser, url: str, digits: Digits
) -> None:
    with opened(browser, url) as sheet:
        sheet.draw(strokes_of(digits["1"]))
        sheet.give("drop", photo(digits["2"]), "image/jpeg")
        sheet.expect_answer("It is 2")
        sheet.give("drop", photo(digits["5"]), "image/jpeg")
        sheet.expect_answer("It is 5")
        sheet.draw([[(0.1, 0.1)]])
        sheet.page.keyboard.press("Control+z")
        sheet.expect_answer("It is 5")
        sheet.page.keyboard.press("Control+z")
        sheet.expect_answer("It is 2")
        sheet.page.keyboard.press("Control+z")
        sheet.expect_answer("It is 1")
        assert sheet.complaints == []


@pytest.mark.parametrize("paper", ["transparent", "black"])
def test_a_large_picture_keeps_what_is_transparent_and_is_shown_as_it_is_read(
    browser: Browser, url: str, digits: Digits, paper: str
) -> None:
    ink = Image.fromarray(digits["3"][0]).resize((3000, 3000), Image.Resampling.BICUBIC)
    picture = Image.new("RGBA", ink.size, "white" if paper == "black" else "black")
    picture.putalpha(ink)
    with opened(browser, url, color_scheme="dark") as sheet:
        sheet.give("drop", encoded(picture, "PNG", compress_level=1))
        sheet.expect_answer("It is 3")
        sheet.shoot(SHOTS, f"{paper}-dark")
        assert sheet.pixel() == [0, 0, 0, 255] if paper == "black" else [255] * 4
        assert sheet.complaints == []


@pytest.mark.parametrize("newer", ["stroke", "undo", "picture"])
def test_a_picture_that_is_read_slowly_gives_way_to_what_comes_after_it(
    browser: Browser, url: str, digits: Digits, newer: str
) -> None:
    with opened(browser, url) as sheet:
        sheet.draw([*strokes_of(digits["1"]), [(0.05, 0.05)]])
        sheet.read_slowly("image/jpeg")
        sheet.give("drop", photo(digits["5"]), "image/jpeg")
        if newer == "stroke":
            sheet.page.keyboard.press("Escape")
            sheet.draw(strokes_of(digits["1"]))
        elif newer == "undo":
            sheet.page.keyboard.press("Control+z")
        else:
            sheet.give("drop", encoded(Image.fromarray(digits["1"][0]), "PNG"))
        sheet.page.wait_for_function("() => window.slow === 0")
        sheet.page.wait_for_timeout(500)  # in which it would be asked about
        sheet.expect_answer("It is 1")
        assert sheet.complaints == []


@pytest.mark.parametrize("given", ["paste", "right click"])
def test_what_happens_while_the_keyboards_pen_is_down_is_no_error(
    browser: Browser, url: str, digits: Digits, given: str
) -> None:
    with opened(browser, url) as sheet:
        keys = sheet.page.keyboard
        keys.press("Tab")
        keys.press("Space")
        if given == "paste":
            sheet.give("paste", photo(digits["5"]), "image/jpeg")
            sheet.expect_answer("It is 5")
        else:
            sheet.page.get_by_label("Drawing area").click(button="right")
        for _ in range(2):
            keys.press("Shift+ArrowDown")
        if given == "paste":
            sheet.expect_answer("It is 5")
        assert sheet.complaints == []


def test_on_a_phone_a_finger_draws_and_nothing_is_cut_off(
    browser: Browser, url: str, digits: Digits
) -> None:
    options = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with opened(browser, url, viewport=PHONE, **options) as sheet:
        sheet.touch(strokes_of(digits["4"]))
        sheet.expect_answer("It is 4")
        expect(sheet.page.locator("#detail")).to_have_text("Over 99.9 % likely.")
        expect(sheet.page.locator(".bars li.first .share")).to_have_text("> 99.9 %")
        sheet.shoot(SHOTS, "phone")
        width = "() => document.scrollingElement.scrollWidth"
        assert sheet.page.evaluate(width) <= PHONE["width"]
        expect(sheet.page.locator("#verdict")).to_be_in_viewport()
        assert sheet.findings() == []
        code = sheet.page.get_by_label("Example code")
        expect(code).to_have_class("more")  # it fades where the line goes on
        code.evaluate("(element) => { element.scrollLeft = element.scrollWidth; }")
        expect(code).not_to_have_class("more")
        sheet.page.get_by_label("A handwritten 7").tap()
        sheet.expect_answer("It is 7")
        sheet.page.get_by_role("button", name="Undo").tap()
        sheet.expect_answer("It is 4")
        sheet.page.set_viewport_size({"width": 844, "height": 390})
        sheet.page.evaluate("() => scrollTo(0, 0)")
        paper = sheet.page.locator("#paper").bounding_box()
        assert paper
        assert paper["height"] <= 0.8 * 390
        for part in ("#paper", "#verdict", "#samples", ".bars li:last-child"):
            expect(sheet.page.locator(part)).to_be_in_viewport(ratio=1)
        assert sheet.page.evaluate(width) <= 844
        sheet.shoot(SHOTS, "landscape")
        assert sheet.findings() == []
        assert sheet.complaints == []


def test_a_pen_draws_and_strokes_are_taken_back_one_by_one(
    browser: Browser, url: str, digits: Digits
) -> None:
    with opened(browser, url, color_scheme="dark") as sheet:
        strokes = strokes_of(digits["6"])
        sheet.pen(strokes)
        sheet.expect_answer("It is 6")
        sheet.shoot(SHOTS, "desktop-dark")
        assert sheet.findings() == []
        sheet.draw([[(0.05, 0.05), (0.95, 0.95)], [(0.05, 0.95), (0.95, 0.05)]])
        sheet.page.keyboard.press("Control+z")
        sheet.page.get_by_role("button", name="Undo").click()
        sheet.expect_answer("It is 6")
        sheet.page.get_by_role("button", name="Clear").click()
        sheet.expect_answer("Nothing drawn yet")
        assert sheet.complaints == []


def test_the_keyboard_alone_is_enough(browser: Browser, url: str) -> None:
    with opened(browser, url) as sheet:
        keys = sheet.page.keyboard
        keys.press("Tab")
        expect(sheet.page.get_by_label("Drawing area")).to_be_focused()
        for _ in range(3):
            keys.press("Shift+ArrowUp")
        keys.press("Space")
        expect(sheet.page.locator("#spoken")).to_have_text("pen down")
        for _ in range(6):
            keys.press("Shift+ArrowDown")
        keys.press("Space")
        sheet.expect_answer("It is 1")
        expect(sheet.page.locator("#spoken")).to_contain_text("It is 1")
        sheet.shoot(SHOTS, "keyboard")
        names = []
        keys.press("?")
        expect(sheet.page.locator("#help")).to_be_visible()
        keys.press("?")
        expect(sheet.page.locator("#help")).not_to_be_visible()
        for _ in range(8):
            keys.press("Tab")
            names.append(sheet.page.evaluate("() => document.activeElement.textContent"))
            outline = "() => getComputedStyle(document.activeElement).outlineStyle"
            assert sheet.page.evaluate(outline) == "solid"
        buttons = ["Undo", "Clear", "Save", "Choose picture", "?", "", "Times and model", "curl"]
        assert names == buttons  # the sample digits are one stop, without text
        keys.press("ArrowRight")
        expect(sheet.page.locator("#snippet")).to_contain_text("import json")
        keys.press("Escape")
        sheet.expect_answer("Nothing drawn yet")
        assert sheet.complaints == []


def test_a_correction_is_stored_only_where_the_gateway_collects(
    browser: Browser, shop: Chain, url: str, digits: Digits, tmp_path: Path
) -> None:
    with opened(browser, url) as sheet:
        sheet.draw(strokes_of(digits["1"]))
        sheet.expect_answer("It is 1")
        expect(sheet.page.get_by_text("Wrong? It was")).not_to_be_visible()
        expect(sheet.page.locator("#storing")).to_contain_text("Nothing")
    config = GatewayConfig(port=0, collect=str(tmp_path / "own"))
    link = Link(lambda: find_url(shop.paths), shop.paths.name, config.timeout)
    with (
        served(link, config) as running,
        opened(browser, f"http://127.0.0.1:{running.port}/") as sheet,
    ):
        expect(sheet.page.get_by_text("Wrong? It was")).not_to_be_visible()
        sheet.draw(strokes_of(digits["1"]))
        sheet.expect_answer("It is 1")
        button, kept = (
            sheet.page.get_by_role("button", name="Store it"),
            sheet.page.locator("#kept"),
        )
        expect(button).to_be_disabled()
        for label, told in (("7", "Stored as 7: 1 in"), ("2", "Stored as 2, no longer as 7: 1 in")):
            sheet.page.get_by_label("Wrong? It was").select_option(label)
            button.click()
            expect(kept).to_contain_text(told)
        sheet.shoot(SHOTS, "correction")
        assert [path.parent.name for path in (tmp_path / "own").glob("*/*.png")] == ["2"]
        assert sheet.complaints == []


def test_what_the_page_says_to_copy_runs_and_answers(
    browser: Browser, url: str, digits: Digits, tmp_path: Path
) -> None:
    commands: dict[str, tuple[str, ...]] = {
        "curl": ("bash", "-c"),
        "Python": (sys.executable, "-c"),
        "JavaScript": ("node", "--input-type=module", "-e"),
    }
    with opened(browser, url) as sheet:
        sheet.draw(strokes_of(digits["8"]))
        sheet.expect_answer("It is 8")
        with sheet.page.expect_download() as download:
            sheet.page.get_by_role("button", name="Save").click()
        assert download.value.suggested_filename == "digit.png"
        download.value.save_as(tmp_path / "digit.png")
        for name, command in commands.items():
            sheet.page.get_by_role("tab", name=name).click()
            snippet = sheet.page.locator("#snippet").inner_text()
            if not shutil.which(command[0]):
                continue
            done = _run(*command, snippet, folder=tmp_path)
            assert done.startswith(('{"label":"8"', "8 0.")), done
        assert snippet.startswith("// node ask.mjs")
        sheet.give("drop", photo(digits["2"]), "image/jpeg")
        expect(sheet.page.locator("#saved")).to_have_text("digit.jpeg")
        expect(sheet.page.locator("#snippet")).to_contain_text('readFile("digit.jpeg")')
        with sheet.page.expect_download() as download:
            sheet.page.get_by_role("button", name="Save").click()
        assert download.value.suggested_filename == "digit.jpeg"


def _run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_a_server_that_goes_is_missed_and_found_again_and_may_be_less_sure(
    browser: Browser, url: str, digits: Digits, shop: Chain
) -> None:
    with opened(browser, url) as sheet:
        sheet.draw(strokes_of(digits["9"]))
        sheet.expect_answer("It is 9")
        assert shop.run("serve", "stop").exit_code == 0
        sheet.draw([[(0.02, 0.02)]])
        sheet.expect_answer("The server does not answer")
        expect(sheet.page.locator("#detail")).to_contain_text("pipeline serve")
        expect(sheet.page.locator("#state")).to_have_attribute("data-state", "lost")
        sheet.shoot(SHOTS, "server-lost")
        assert sheet.findings() == []
        sheet.page.keyboard.press("Control+z")
        _be_sure_from(shop, 1.0)
        shop.record("serve", "--detach", "--port", "auto")
        sheet.expect_answer("Not sure")
        expect(sheet.page.locator("#detail")).to_contain_text("Perhaps 9")
        expect(sheet.page.locator("#label")).to_have_text("?")
        sheet.shoot(SHOTS, "not-sure")
        assert sheet.findings() == []
        # What the browser itself says of an answer that is an error.
        assert [line for line in sheet.complaints if "503" not in line] == []


def _be_sure_from(chain: Chain, probability: float) -> None:
    for file in config_pbtxt.config_files(chain.paths.packaged):
        config = config_pbtxt.read(file)
        config_pbtxt.set_parameter(config, "min_probability", str(probability))
        file.write_text(config_pbtxt.to_text(config))

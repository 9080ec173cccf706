"""A real browser before the page: it draws, drops, pastes, and is looked at."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

# Nothing but this machine, and no sandbox: in containers one is root.
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
DESKTOP = {"width": 1180, "height": 800}
PHONE = {"width": 390, "height": 844}
WAIT_MS = 20_000
NEAR, LINKED = 1.5, 3.7  # pixels of MNIST: points of a stroke are further apart, and joined up to
Strokes = list[list[tuple[float, float]]]  # each a list of points, 0 to 1 on both axes


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, or a skipped test."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on the PATH: make system")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield browser
        browser.close()


def strokes_of(image: np.ndarray) -> Strokes:
    """A digit, uint8 (1, 28, 28), as strokes along the middle of its lines."""
    levels = image[0].astype(int)
    order = np.argsort(-levels, axis=None, kind="stable")
    points: list[np.ndarray] = []
    for index in order[levels.ravel()[order] > 127]:
        point = np.array(divmod(int(index), 28))
        if all(np.hypot(*(point - other)) > NEAR for other in points):
            points.append(point)
    places = [((column + 0.5) / 28, (row + 0.5) / 28) for row, column in points]
    left = set(range(len(points)))
    strokes = []
    while left:
        walk = [left.pop()]
        while near := _nearest(walk, points, left):
            here, there = near
            back = walk[walk[::-1].index(here) * -1 - 1 :]  # over what is drawn already
            walk += [*back[-2::-1], there]
            left.remove(there)
        strokes.append([places[one] for one in walk])
    return strokes


def _nearest(walk: list[int], points: list[np.ndarray], left: set[int]) -> tuple[int, int] | None:
    """The point of the walk, the latest first, that has another one near, and that one."""
    for reach in (2.3, LINKED):
        for here in walk[::-1]:
            near = [(np.hypot(*(points[here] - points[one])), one) for one in sorted(left)]
            if near and min(near)[0] < reach:
                return here, min(near)[1]
    return None


@dataclass
class Sheet:
    """The page in one browser window."""

    page: Page
    complaints: list[str] = field(default_factory=list)  # of its console

    @property
    def answer(self) -> str:
        return self.page.locator("#verdict").inner_text()

    def expect_answer(self, text: str) -> None:
        expect(self.page.locator("#verdict")).to_have_text(text, timeout=WAIT_MS)

    def draw(self, strokes: Strokes) -> None:
        """With the mouse."""
        mouse = self.page.mouse
        for points in strokes:
            mouse.move(*self.place(points[0]))
            mouse.down()
            for point in points[1:]:
                mouse.move(*self.place(point))
            mouse.up()

    def touch(self, strokes: Strokes) -> None:
        """With a finger."""
        session = self.page.context.new_cdp_session(self.page)

        def send(kind: str, *points: tuple[float, float]) -> None:
            places = [dict(zip("xy", self.place(point), strict=True)) for point in points]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

        for points in strokes:
            send("touchStart", points[0])
            for point in points[1:]:
                send("touchMove", point)
            send("touchEnd")

    def pen(self, strokes: Strokes) -> None:
        """With a pen that is pressed half as hard as it could be."""
        session = self.page.context.new_cdp_session(self.page)

        def send(kind: str, point: tuple[float, float], buttons: int) -> None:
            x, y = self.place(point)
            event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": buttons}
            event |= {"pointerType": "pen", "force": 0.5, "clickCount": 1}
            session.send("Input.dispatchMouseEvent", event)

        for points in strokes:
            send("mousePressed", points[0], 1)
            for point in points[1:]:
                send("mouseMoved", point, 1)
            send("mouseReleased", points[-1], 0)

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """Where a point of the paper is in the window."""
        box = self.page.locator("#canvas").bounding_box()
        assert box
        return box["x"] + point[0] * box["width"], box["y"] + point[1] * box["height"]

    def give(self, event: str, content: bytes, kind: str = "image/png") -> None:
        """Drop or paste a file."""
        self.page.evaluate(
            """([event, content, type]) => {
                const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                const files = new DataTransfer();
                files.items.add(new File([bytes], "picture", { type }));
                const canvas = document.getElementById("canvas");
                const options = { bubbles: true, cancelable: true };
                canvas.dispatchEvent(event === "paste"
                    ? new ClipboardEvent(event, { ...options, clipboardData: files })
                    : new DragEvent(event, { ...options, dataTransfer: files }));
            }""",
            [event, base64.b64encode(content).decode(), kind],
        )

    def read_slowly(self, kind: str) -> None:
        """Hold each picture of this kind back for a while; window.slow counts them."""
        self.page.evaluate(
            """(kind) => {
                const read = window.createImageBitmap;
                window.slow = 0;
                window.createImageBitmap = async (file) => {
                    if (file.type !== kind) return read(file);
                    window.slow += 1;
                    await new Promise((resolve) => setTimeout(resolve, 1500));
                    const bitmap = await read(file);
                    window.slow -= 1;
                    return bitmap;
                };
            }""",
            kind,
        )

    def pixel(self, x: float = 0, y: float = 0) -> list[int]:
        """A pixel of the paper, which has 560 x 560: red, green, blue, alpha."""
        levels: list[int] = self.page.evaluate(
            """([x, y]) => [...document.getElementById("canvas").getContext("2d")
                .getImageData(x, y, 1, 1).data]""",
            [round(x), round(y)],
        )
        return levels

    def seen(self) -> np.ndarray:
        """What the page shows as what the model saw, uint8 (1, 28, 28)."""
        levels = self.page.evaluate(
            """() => [...document.getElementById("seen").getContext("2d")
                .getImageData(0, 0, 28, 28).data].filter((_, index) => index % 4 === 0)"""
        )
        return np.array(levels, np.uint8).reshape(1, 28, 28)

    def findings(self) -> list[str]:
        """What axe-core holds against the page as it is, from serious on."""
        source = files("axe_playwright_python") / "axe.min.js"
        self.page.evaluate(source.read_text(encoding="utf-8"))
        found: dict[str, Any] = self.page.evaluate("() => axe.run()")
        return [
            json.dumps({"id": rule["id"], "nodes": [node["html"] for node in rule["nodes"]]})
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
        ]

    def shoot(self, folder: Path | None, name: str) -> None:
        """Keep a picture of the whole page, where pictures are wanted."""
        if folder:
            self.page.wait_for_timeout(400)  # the bars have come to rest
            self.page.screenshot(path=folder / f"{name}.png", full_page=True)


@contextmanager
def opened(browser: Browser, url: str, state: Any = "ready", **options: Any) -> Iterator[Sheet]:
    """The page in a window of its own, once its model has that state."""
    settings = {"viewport": DESKTOP, "reduced_motion": "reduce", **options}
    context = browser.new_context(**settings)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    sheet = Sheet(page)

    def complain(message: Any) -> None:
        # A stroke begins as a dot, which is refused with 422; Chromium shows every such answer.
        if "status of 422" not in message.text:
            sheet.complaints.append(f"{message.type}: {message.text}")

    page.on("console", complain)
    page.on("pageerror", lambda error: sheet.complaints.append(str(error)))
    page.goto(url)
    page.wait_for_selector(f"#state[data-state={state}]")
    yield sheet
    context.close()

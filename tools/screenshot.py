"""Take the README's picture: the page in a browser, with a drawn digit and the server's answer.

screenshot.py FILE; run in a project that has a packaged model.
"""

import math
import sys
from pathlib import Path

from pipeline.core.paths import Paths
from pipeline.serving import serve, supervise
from pipeline.serving.settings import ServeConfig
from pipeline.web.link import Link, find_url
from pipeline.web.settings import GatewayConfig
from tests.browser import Strokes, chromium, opened
from tools.gateways import served

WINDOW = {"width": 1180, "height": 760}  # pixels


def two() -> Strokes:
    """Return a handwritten 2 as one stroke: an arc, a diagonal and a base line."""
    angles = [math.radians(200 - 5 * step) for step in range(48)]
    arc = [(0.5 + 0.17 * math.cos(a), 0.36 - 0.16 * math.sin(a)) for a in angles]
    base = [(0.34 + 0.04 * step, 0.78 - 0.01 * math.sin(step)) for step in range(10)]
    return [[*arc, (0.52, 0.58), (0.42, 0.69), *base]]


def main(file: Path) -> None:
    """Serve the packaged model, draw a digit on the page, and write the picture to `file`."""
    paths, config = Paths(), GatewayConfig(port=0)
    supervise.detach(paths, serve.with_free_ports(ServeConfig()))
    try:
        link = Link(lambda: find_url(paths), paths.name, config.timeout)
        with (
            served(link, config) as gateway,
            chromium() as browser,
            opened(browser, f"http://127.0.0.1:{gateway.port}/", viewport=WINDOW) as sheet,
        ):
            sheet.draw(two())
            sheet.expect_answer("It is 2")
            file.parent.mkdir(parents=True, exist_ok=True)
            sheet.page.screenshot(path=file)
    finally:
        supervise.stop(paths)
    print(f"wrote {file} ({file.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

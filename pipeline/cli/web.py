"""The web command, which serves a page to draw on."""

from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import Command, Settings, pass_paths
from pipeline.cli.options import log_option, parse_url, settings_options
from pipeline.core.paths import Paths
from pipeline.web.settings import GatewayConfig


@click.command(cls=Command)
@click.option(
    "--url",
    type=parse_url,
    metavar="URL",
    help="Triton server: grpc://HOST:PORT.  [default: that of 'pipeline serve']",
)
@settings_options(GatewayConfig, port=lambda value: 0 if value == "auto" else int(value))
@log_option
@pass_paths
def web_command(
    settings: Settings,
    paths: Paths,
    /,
    url: str | None,
    prediction_log: Path | None,
    **changes: Any,
) -> None:
    """Serve a web page that classifies what you draw, until Ctrl-C.

    Waits for a server that is not running yet, and reconnects to one that restarts.

    The limits are 512 connections, 64 MiB of uploads and --requests concurrent requests. One
    client address gets at most as much of each as it leaves free: half, if it is the only one.
    Behind a reverse proxy all clients have the proxy's address, so limit them there.

    \b
    Example:
      pipeline web
      pipeline web --port 0 --url grpc://127.0.0.1:8001
      pipeline web --prediction-log seen.jsonl
    """
    from pipeline.client.log import open_log
    from pipeline.web.server import serve_page

    def report(address: str) -> None:
        server = url or "our server"
        record = {"url": address, "classify": f"{address}classify", "asks": server}
        text = f"draw at {address}: {server} answers with {paths.name}; Ctrl-C stops the page"
        settings.result(record, text)

    serve_page(paths, GatewayConfig(**changes), url, report, open_log(prediction_log))

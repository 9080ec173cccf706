"""The web command, which serves a page to draw on."""

from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import (
    Command,
    Settings,
    UrlType,
    name_option,
    paths_of,
    prediction_log_option,
    settings_options,
)
from pipeline.core.errors import PipelineError
from pipeline.web.settings import GatewayConfig


class PortType(click.IntRange):
    """The type of a port's number; `auto` means the same as 0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return 0 if value == "auto" else super().convert(value, param, ctx)


@click.command(cls=Command)
@click.option(
    "--url", type=UrlType(), help="grpc://HOST:PORT of a Triton server.  [default: our server]"
)
@name_option
@settings_options(GatewayConfig, port=PortType(0, 65535))
@prediction_log_option
@click.pass_obj
def web_command(
    settings: Settings,
    /,
    url: str | None,
    name: str | None,
    prediction_log: Path | None,
    **changes: Any,
) -> None:
    """Serve a page to draw on, which asks the served model while you draw.

    On loopback, until Ctrl-C. It waits for a server that is not there yet, and finds it again.

    An address may hold as many connections (of 512), bytes of uploads (of 64 MiB) and requests
    under way as it leaves free: half of them when it is alone. All clients of a reverse proxy have
    its address: limit each of them there.

    \b
    Example:
      pipeline web
      pipeline web --port 0 --url grpc://127.0.0.1:8001
      pipeline web --prediction-log seen.jsonl
    """
    from pipeline.client.log import open_log

    try:
        from pipeline.web.server import serve_page
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"the page needs {error.name}: in the project's folder, pip install '.[web]'"
        ) from error
    paths, config = paths_of(settings, name), GatewayConfig(**changes)

    def started(address: str) -> None:
        where = url or "our server"
        record = {"url": address, "classify": f"{address}classify", "asks": where}
        text = f"draw at {address}, which asks {paths.name} of {where}; Ctrl-C stops it"
        settings.result(record, text)

    serve_page(paths, config, url, started, open_log(prediction_log))

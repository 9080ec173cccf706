"""The web command, which serves a page to draw on, or writes it as a folder."""

import shlex
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import Command, Settings, pass_paths
from pipeline.cli.options import folder_type, log_option, parse_url, settings_options
from pipeline.core.paths import FOLDER, JOINED, Paths
from pipeline.core.signature import MNIST_CLASSES
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
@click.option(
    "--static",
    "static",
    type=folder_type,
    metavar="DIR",
    help="Write the page and the exact model as a folder for any web host, and exit.",
)
@click.option(
    "--test-images", is_flag=True, help="With --static: add the test images, for visitors to check."
)
@pass_paths
def web_command(
    settings: Settings,
    paths: Paths,
    /,
    url: str | None,
    prediction_log: Path | None,
    static: Path | None,
    test_images: bool,
    **changes: Any,
) -> None:
    """Serve a web page that classifies what you draw, until Ctrl-C.

    Waits for a server that is not running yet, and reconnects to one that restarts.

    The limits are 512 connections, 64 MiB of uploads and --requests concurrent requests. One
    client address gets at most as much of each as it leaves free: half, if it is the only one.
    Behind a reverse proxy all clients have the proxy's address, so limit them there.

    Nothing that is drawn or sent is stored. With --collect, the page can store a picture with the
    class that you say it is, to train on.

    With --static there is no server: the model runs in the visitor's browser, where a button
    repeats the release's answers and compares their digest.

    \b
    Example:
      pipeline web
      pipeline web --port 0 --url grpc://127.0.0.1:8001
      pipeline web --prediction-log seen.jsonl
      pipeline web --static site --test-images
      pipeline web --collect own
    """
    if test_images and not static:
        raise click.UsageError("--test-images needs --static DIR")
    if static:
        from pipeline.web.publish import publish_page

        record = publish_page(paths, static, test_images)
        text = f"wrote {static}, which runs {record['model']}, version {record['version']}"
        look = f"python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(static))}"
        settings.result({"folder": str(static), **record}, text, look)
        return
    from pipeline.cli.options import parse_dataset
    from pipeline.client.log import open_log
    from pipeline.repository import config_pbtxt
    from pipeline.web.server import serve_page

    then = ""
    if collect := changes["collect"]:
        packaged = paths.packaged / config_pbtxt.CONFIG
        classes = config_pbtxt.classes(config_pbtxt.read(packaged)) if packaged.exists() else None
        prefix = JOINED if classes in (None, MNIST_CLASSES) else FOLDER
        option = f" --dataset {shlex.quote(parse_dataset(f'{prefix}{collect}'))}"
        init = f" --init {paths.name}" if paths.of_run(paths.name).summary.exists() else ""
        then = f"pipeline data fetch{option} && pipeline train{init}{option}"

    def report(address: str, problem: str) -> None:
        server = url or "the server of 'pipeline serve'"
        record = {"url": address, "classify": f"{address}classify", "asks": server}
        state = problem or f"{server} answers with {paths.name}"
        settings.result(record, f"draw at {address} until Ctrl-C; {state}", then)

    serve_page(paths, GatewayConfig(**changes), url, report, open_log(prediction_log))

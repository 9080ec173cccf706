"""The query command, which asks a served model."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from pipeline.cli.command import (
    Command,
    Settings,
    UrlType,
    echo,
    name_option,
    paths_of,
    prediction_log_option,
    seconds_type,
)
from pipeline.core.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.client.client import Client
    from pipeline.client.query import Answer


def _headers(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if not all(equals for _, equals, _ in pairs):
        raise click.BadParameter("write NAME=VALUE")
    return {name: value for name, _, value in pairs}


_FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.argument("images", nargs=-1, required=True, metavar="FILE|FOLDER|-...", type=click.Path())
@click.option(
    "--url", type=UrlType(), help="http://HOST:PORT or grpc://HOST:PORT.  [default: our server]"
)
@name_option
@click.option(
    "--ca",
    type=_FILE,
    help="PEM file of who signed the server's certificate, for https:// and grpcs://.",
)
@click.option("--certificate", type=_FILE, help="PEM file of your own certificate.")
@click.option("--key", type=_FILE, help="PEM file of the key that is its.")
@click.option(
    "--header",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_headers,
    help="Sent with each request, a key for example; may be given again.",
)
@click.option(
    "--timeout", type=seconds_type, default=10.0, show_default=True, help="Seconds for an answer."
)
@click.option("--top", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--min-confidence",
    type=click.FloatRange(0, 1),
    help="Below this probability the answer is 'not sure'.  [default: the model's own]",
)
@click.option("--show", is_flag=True, help="Draw what the model saw.")
@prediction_log_option
@click.pass_obj
def query_command(
    settings: Settings,
    images: tuple[str, ...],
    url: str | None,
    name: str | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    header: dict[str, str],
    timeout: float,
    top: int,
    min_confidence: float | None,
    show: bool,
    prediction_log: Path | None,
) -> None:
    """Ask the served model what pictures show: files, all in a folder, or what comes with '-'.

    '-' is a picture on standard input, or the names of files and folders there, one a line.

    \b
    Example:
      pipeline query digit.png
      pipeline query --json --top 1 digits/
      find digits -name '*.png' | pipeline query --min-confidence 0.9 -
      pipeline query --url grpcs://HOST:8001 --ca ca.crt --header NAME=KEY digit.png
    """
    from pipeline.client.client import Certificates, Client
    from pipeline.client.log import open_log
    from pipeline.client.query import Count, ask_files
    from pipeline.images.inputs import sources
    from pipeline.repository.running import default_url

    if show and settings.json:
        raise click.UsageError("--show draws, --json does not: choose one")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that its encoding lacks
    paths = paths_of(settings, name)
    log, certificates = open_log(prediction_log), Certificates(ca, certificate, key)

    def connect() -> "Client":
        return Client(
            url or default_url(paths),
            paths.name,
            timeout,
            certificates=certificates,
            headers=header,
            prediction_log=log,
        )

    pictures = sources(images, _standard_input() if "-" in images else None)
    count = Count()
    try:
        with contextlib.closing(ask_files(connect, pictures, top, min_confidence)) as answers:
            for answer in answers:
                count.add(answer)
                _echo(settings, answer, show)
    except (PipelineError, KeyboardInterrupt):
        if count.total:
            failed = f", {count.failed} images got no answer" if count.failed else ""
            settings.say(f"{count}{failed}")
        raise
    if count.failed:
        raise PipelineError(f"{count.failed} of {count.total} images got no answer; {count}")
    if log and log.lost:
        lost = f"{log.lost} of {count.total} predictions"
        raise PipelineError(f"{lost} could not be written to {log.path}")
    if count.total > 1:
        settings.say(count)
    if count.empty:
        raise click.exceptions.Exit(PipelineError.exit_code)  # a line above says why


def _echo(settings: Settings, answer: "Answer", show: bool) -> None:
    if answer.error:
        echo(f"Error: {answer.error}", err=True)
        return
    echo(json.dumps(answer.record()) if settings.json else answer)
    if show and answer.image is not None:
        from pipeline.images.inputs import draw_image

        encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
        echo(draw_image(answer.image, encoding.replace("-", "") == "utf8"))


def _standard_input() -> BinaryIO:
    """Open another stream on standard input: Python cannot end while a thread reads sys.stdin."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # a caller replaced sys.stdin by its own stream
        return sys.stdin.buffer
    except (AttributeError, OSError, ValueError) as error:
        raise PipelineError("'-' reads standard input, which is closed") from error

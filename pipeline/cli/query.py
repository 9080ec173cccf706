"""The query command, which asks a served model."""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from pipeline.cli.command import Command, Settings, echo, pass_paths
from pipeline.cli.options import (
    Number,
    connection_options,
    count_type,
    log_option,
    parse_url,
    seconds_type,
)
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Paths

if TYPE_CHECKING:
    from pipeline.client.client import Client
    from pipeline.client.log import PredictionLog
    from pipeline.client.query import Answer, Count


EXPORT = "export"  # the value of --onnx without a file


class _QueryCommand(Command):
    """A command whose --onnx takes the next word only if that is an ONNX file."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for index, (word, value) in enumerate(zip(args, [*args[1:], ""], strict=False)):
            if word == "--onnx" and not value.endswith(".onnx"):
                args[index] = f"--onnx={EXPORT}"
        return super().parse_args(ctx, args)


@click.command(cls=_QueryCommand)
@click.argument("images", nargs=-1, required=True, metavar="FILE|FOLDER|-...", type=click.Path())
@click.option(
    "--url",
    type=parse_url,
    metavar="URL",
    help="Server: http://HOST:PORT or grpc://HOST:PORT.  [default: that of 'pipeline serve']",
)
@click.option(
    "--onnx",
    metavar="[FILE.onnx]",
    help="Ask no server: run this exported file in ONNX Runtime.  [default: the export of --name]",
)
@connection_options
@click.option("--timeout", type=seconds_type, default=10.0, help="Seconds to wait for an answer.")
@click.option("--top", default=3, type=count_type, help="Number of classes in an answer.")
@click.option(
    "--min-confidence",
    type=Number(0, 1),
    help="Probability (0 to 1) below which an answer is 'not sure'.  [default: the model's own]",
)
@click.option("--show", is_flag=True, help="Draw each image as the model received it.")
@log_option
@pass_paths
def query_command(
    settings: Settings,
    paths: Paths,
    /,
    images: tuple[str, ...],
    top: int,
    min_confidence: float | None,
    show: bool,
    prediction_log: Path | None,
    onnx: str | None,
    **connection: Any,
) -> None:
    """Classify pictures with the served model, or with an exported file.

    Each argument is a picture, a folder of pictures, or '-': then standard input is either a
    picture, or the names of files and folders, one per line.

    \b
    Example:
      pipeline query digit.png
      pipeline query --json --top 1 digits/
      find digits -name '*.png' | pipeline query --min-confidence 0.9 -
      pipeline query --onnx digit.png
      pipeline query --url grpcs://HOST:8001 --ca ca.crt --header NAME=KEY digit.png
    """
    from pipeline.client.log import open_log
    from pipeline.client.query import ask_files
    from pipeline.images.inputs import list_sources

    if show and settings.json:
        raise click.UsageError("--show and --json exclude each other")
    if onnx is not None and connection["url"]:
        raise click.UsageError("--onnx and --url exclude each other: --onnx asks no server")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that its encoding lacks
    log = open_log(prediction_log)
    connect = functools.partial(_connect, paths, log, onnx, **connection)
    pictures = list_sources(images, _open_standard_input() if "-" in images else None)
    with contextlib.closing(ask_files(connect, pictures, top, min_confidence)) as answers:
        count = _echo_answers(settings, answers, show)
    if count.failed and count.total > 1:
        raise PipelineError(f"{count.failed} of {count.total} images got no answer; {count}")
    if log and log.lost:
        raise PipelineError(f"{log.path} lacks {log.lost} of {count.total} predictions")
    if count.total > 1:
        settings.say(count)
    if count.empty or count.failed:
        raise click.exceptions.Exit(PipelineError.exit_code)  # a line above says why


def _connect(
    paths: Paths,
    log: "PredictionLog | None",
    onnx: str | None,
    url: str | None,
    timeout: float,
    header: dict[str, str],
    **pem: Path | None,
) -> "Client":
    """Connect to the server at `url`, by default to our own; `pem` has the files for TLS.

    With `onnx`, run that file instead.
    """
    from pipeline.client.client import Certificates, Client
    from pipeline.repository.running import default_url

    if onnx is not None:
        from pipeline.client.local import LocalClient

        return LocalClient(paths.onnx if onnx == EXPORT else onnx, timeout, prediction_log=log)
    return Client(
        url or default_url(paths),
        paths.name,
        timeout,
        certificates=Certificates(**pem),
        headers=header,
        prediction_log=log,
    )


def _echo_answers(settings: Settings, answers: "Iterable[Answer]", show: bool) -> "Count":
    """Print each answer as it comes; return their counts, or print them if it is interrupted."""
    from pipeline.client.query import Count
    from pipeline.images.inputs import draw_image

    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    count = Count()
    try:
        for answer in answers:
            count.add(answer)
            if answer.error:
                echo(f"Error: {answer.error}", err=True)
                continue
            echo(json.dumps(answer.record()) if settings.json else answer)
            if show and answer.image is not None:
                echo(draw_image(answer.image, is_utf8))
    except (PipelineError, KeyboardInterrupt):
        if count.total:
            failed = f", {count.failed} images got no answer" if count.failed else ""
            settings.say(f"{count}{failed}")
        raise
    return count


def _open_standard_input() -> BinaryIO:
    """Open another stream on standard input: Python cannot end while a thread reads sys.stdin."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # a caller replaced sys.stdin by its own stream
        return sys.stdin.buffer
    except (AttributeError, OSError, ValueError) as error:
        raise PipelineError("'-' reads standard input, but standard input is closed") from error

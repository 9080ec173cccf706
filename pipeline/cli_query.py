"""The command that asks a served model."""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from pipeline.command import Command, Settings, name_option, paths_of, prediction_log_option
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.client import Client
    from pipeline.query import Answer


@click.command(cls=Command)
@click.argument("images", nargs=-1, required=True, metavar="FILE|FOLDER|-...", type=click.Path())
@click.option("--url", help="http://HOST:PORT or grpc://HOST:PORT.  [default: our server]")
@name_option
@click.option("--timeout", default=10.0, show_default=True, help="Seconds for an answer.")
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
    """
    from pipeline.client import Client
    from pipeline.inputs import sources
    from pipeline.prediction_log import opened
    from pipeline.query import Count, ask_files
    from pipeline.serve import default_url

    if show and settings.json:
        raise click.UsageError("--show draws, --json does not: choose one")
    paths, count = paths_of(settings, name), Count()
    log = opened(prediction_log)

    def connect() -> "Client":
        return Client(url or default_url(paths), paths.name, timeout, prediction_log=log)

    found = sources(images, _standard_input() if "-" in images else None)
    for answer in ask_files(connect, found, top, min_confidence):
        count.add(answer)
        _echo(settings, answer, show)
    total = count.answered + count.failed
    if count.failed:
        raise PipelineError(f"{count.failed} of {total} images could not be read; {count}")
    if log and log.lost:
        raise PipelineError(f"{log.lost} of {total} predictions could not be written to {log.path}")
    if total > 1:
        settings.say(count)


def _echo(settings: Settings, answer: "Answer", show: bool) -> None:
    if answer.error:
        click.echo(f"Error: {answer.error}", err=True)
        return
    click.echo(json.dumps(answer.record()) if settings.json else str(answer))
    if show and answer.image is not None:
        from pipeline.inputs import drawn

        encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
        click.echo(drawn(answer.image, encoding.replace("-", "") == "utf8"))


def _standard_input() -> BinaryIO:
    """A stream of its own: Python cannot end while a thread waits in the shared one."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # somebody who calls us gave us a stream of his own
        return sys.stdin.buffer
    except (AttributeError, OSError, ValueError) as error:
        raise PipelineError("'-' reads standard input, which is closed") from error

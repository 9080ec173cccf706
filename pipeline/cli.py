"""One thin command for each stage: parse, call, echo."""

import json
import sys
from pathlib import Path

import click

from pipeline import __doc__ as summary
from pipeline.cli_data import data_group
from pipeline.cli_export import export_command, package_command
from pipeline.cli_measure import benchmark_command, gpu_check_command, report_command
from pipeline.cli_repository import lint_command
from pipeline.cli_serve import serve
from pipeline.cli_train import train_command
from pipeline.cli_validate import validate_command
from pipeline.cli_versions import versions_group
from pipeline.command import Group, Settings, name_option, paths_of
from pipeline.errors import PipelineError


@click.group(
    cls=Group,
    help=f"{summary}\n\n\b\nExample:\n  pipeline data fetch && pipeline train && pipeline export",
    context_settings={"auto_envvar_prefix": "HANDWRITING", "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="handwriting-pipeline", prog_name="pipeline")
def main() -> None:
    """Replaced by the text above."""


main.add_command(data_group)
main.add_command(serve)
main.add_command(train_command)
main.add_command(export_command)
main.add_command(validate_command)
main.add_command(package_command)
main.add_command(versions_group)
main.add_command(lint_command)
main.add_command(report_command)
main.add_command(benchmark_command)
main.add_command(gpu_check_command)


@main.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path())
@click.option("--url", help="http://HOST:PORT or grpc://HOST:PORT.  [default: our server]")
@name_option
@click.option("--timeout", default=10.0, show_default=True, help="Seconds for an answer.")
@click.option("--top", default=3, show_default=True, type=click.IntRange(1))
@click.pass_obj
def query_command(
    settings: Settings,
    images: tuple[str, ...],
    url: str | None,
    name: str | None,
    timeout: float,
    top: int,
) -> None:
    """Ask the served model what image files show.

    \b
    Example:
      pipeline query digit.png
      pipeline query --json --top 1 digits/*.png
    """
    from pipeline.client import Client
    from pipeline.query import ask_files
    from pipeline.serve import default_url

    paths = paths_of(settings, name)
    failed = 0

    def connect() -> Client:
        return Client(url or default_url(paths), paths.name, timeout)

    for answer in ask_files(connect, [Path(image) for image in images], top):
        if answer.error:
            failed += 1
            click.echo(f"Error: {answer.error}", err=True)
        else:
            click.echo(json.dumps(answer.record()) if settings.json else str(answer))
    if failed:
        raise PipelineError(f"{failed} of {len(images)} images could not be read")


if __name__ == "__main__":
    sys.exit(main())

"""One thin command for each stage: parse, call, echo."""

import os
import platform
import sys
from importlib import metadata

import click

from pipeline import __doc__ as summary
from pipeline.cli.benchmark import benchmark_command
from pipeline.cli.command import Group, Settings, echo
from pipeline.cli.data import data_group
from pipeline.cli.doctor import doctor_command
from pipeline.cli.export import export_command, package_command, rebuild_command
from pipeline.cli.query import query_command
from pipeline.cli.report import drift_command, report_command
from pipeline.cli.repository import lint_command, versions_group
from pipeline.cli.score import score_command
from pipeline.cli.serve import serve
from pipeline.cli.train import runs_group, train_command
from pipeline.cli.validate import validate_command
from pipeline.cli.web import web_command
from pipeline.core.text import Lines


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version; with -v also those that a report of a bug needs. Imports no library."""
    if not value:
        return
    own = metadata.metadata("handwriting-pipeline")
    lines = [f"pipeline, version {own['Version']}"]
    if context.ensure_object(Settings).verbose:
        names = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "tritonclient", "numpy")
        lines.append(f"Python {platform.python_version()} on {platform.platform()}")
        lines += [f"{d.name} {d.version}" for n in names for d in metadata.distributions(name=n)]
        urls = dict(url.split(", ", 1) for url in own.get_all("Project-URL", ()))
        nowhere = "this package states no address: tell whoever gave it to you"
        lines.append(f"report bugs to: {urls.get('Issues', nowhere)}")
    echo(Lines(*lines))
    context.exit()


@click.group(
    cls=Group,
    help=f"{summary}\n\n\b\nExample:\n  pipeline data fetch && pipeline train && pipeline export",
    context_settings={
        "auto_envvar_prefix": "HANDWRITING",
        "help_option_names": ["-h", "--help"],
        "show_default": True,
    },
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit; with -v, those of the libraries as well.",
)
def main() -> None:
    """Run a command; the help text is in the decorator."""
    # Read by OpenMP when torch is imported. Its threads else wait for each other by spinning, and
    # where another process wants the cores as well, that takes many times as long as the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for command in (
    *(data_group, train_command, runs_group, export_command, validate_command, package_command),
    *(
        rebuild_command,
        versions_group,
        lint_command,
        serve,
        query_command,
        web_command,
        score_command,
    ),
    *(report_command, drift_command, benchmark_command, doctor_command),
):
    main.add_command(command)


if __name__ == "__main__":
    sys.exit(main())

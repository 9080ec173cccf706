"""One thin command for each stage: parse, call, echo."""

import sys

import click

from pipeline import __doc__ as summary
from pipeline.cli.benchmark import benchmark_command
from pipeline.cli.command import Group
from pipeline.cli.data import data_group
from pipeline.cli.doctor import doctor_command
from pipeline.cli.export import export_command, package_command
from pipeline.cli.query import query_command
from pipeline.cli.report import drift_command, report_command
from pipeline.cli.repository import lint_command, versions_group
from pipeline.cli.score import score_command
from pipeline.cli.serve import serve
from pipeline.cli.train import runs_group, train_command
from pipeline.cli.validate import validate_command
from pipeline.cli.web import web_command


@click.group(
    cls=Group,
    help=f"{summary}\n\n\b\nExample:\n  pipeline data fetch && pipeline train && pipeline export",
    context_settings={
        "auto_envvar_prefix": "HANDWRITING",
        "help_option_names": ["-h", "--help"],
        "show_default": True,
    },
)
@click.version_option(package_name="handwriting-pipeline", prog_name="pipeline")
def main() -> None:
    """Run a command; the help text is in the decorator."""


for command in (
    *(data_group, train_command, runs_group, export_command, validate_command, package_command),
    *(versions_group, lint_command, serve, query_command, web_command, score_command),
    *(report_command, drift_command, benchmark_command, doctor_command),
):
    main.add_command(command)


if __name__ == "__main__":
    sys.exit(main())

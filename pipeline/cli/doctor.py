"""The doctor command, which examines the machine."""

import click

from pipeline.cli.command import Command, Settings, next_of_packaged, paths_of
from pipeline.core.paths import format_make


@click.command(cls=Command)
@click.pass_obj
def doctor_command(settings: Settings) -> None:
    """Check whether this machine can train, export and serve, and how to fix problems.

    Starts a temporary server. Exits with 1 if training, exporting or serving would fail.

    \b
    Example:
      pipeline doctor
      pipeline doctor --json
    """
    from pipeline.doctor import packages

    paths = paths_of(settings)
    if packages.is_client_only():
        examination = packages.Examination(tuple(packages.run_quick_checks()))
        next_step = "pipeline query --url grpc://HOST:8001 IMAGE"
    else:
        try:
            from pipeline.doctor.checks import examine
        except Exception as error:  # any error of a library that does not fit other packages
            examination = packages.examine_packages(error)
        else:
            settings.say("checking this machine with a temporary server")
            examination = examine(paths)
        next_step = next_of_packaged(paths) if paths.packaged.exists() else format_make("all")
    then = "" if examination.count("problem") else next_step
    settings.result(examination.record(), examination, then)
    packages.require_no_problem(examination)

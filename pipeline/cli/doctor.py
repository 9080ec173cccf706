"""The doctor command, which examines the machine."""

import click

from pipeline.cli.command import Command, Settings, paths_of


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

    settings.say("checking this machine with a temporary server")
    try:
        from pipeline.doctor.checks import examine
    except Exception as error:  # any error of a library that does not fit other packages
        examination = packages.examine_packages(error)
    else:
        examination = examine(paths_of(settings))
    next_step = "pipeline serve" if paths_of(settings).packaged.exists() else "make all"
    then = "" if examination.count("problem") else next_step
    settings.result(examination.record(), examination, then)
    packages.require_no_problem(examination)

"""The doctor command, which examines the machine."""

import click

from pipeline.cli.command import Command, Settings, paths_of


@click.command(cls=Command)
@click.pass_obj
def doctor_command(settings: Settings) -> None:
    """Say what this machine has and lacks, and how to fix it.

    Starts a server for a moment. Exits with 1 where training, exporting or serving would fail.

    \b
    Example:
      pipeline doctor
      pipeline doctor --json
    """
    from pipeline.doctor import packages

    settings.say("looking; a server is started for a moment")
    try:
        from pipeline.doctor.checks import examine
    except Exception as error:  # whatever a library raises that does not fit other packages
        examination = packages.examine_packages(error)
    else:
        examination = examine(paths_of(settings))
    next_step = "pipeline serve" if paths_of(settings).packaged.exists() else "make all"
    then = "" if examination.count("problem") else next_step
    settings.result(examination.record(), examination, then)
    packages.require_no_problem(examination)

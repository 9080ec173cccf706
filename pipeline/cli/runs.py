"""The commands for the finished runs of a project."""

from dataclasses import asdict

import click

from pipeline.cli.command import Command, Group, Settings, paths_of


@click.group("runs", cls=Group)
def runs_group() -> None:
    """List, show and compare the finished runs.

    \b
    Example:
      pipeline runs list
      pipeline runs compare handwriting other
    """


@runs_group.command("list", cls=Command)
@click.pass_obj
def list_runs_command(settings: Settings, /) -> None:
    """List the finished runs with their test accuracy and its 95 % interval.

    \b
    Example:
      pipeline runs list
    """
    from pipeline.training.runs import list_runs

    listing = list_runs(paths_of(settings))
    settings.result(
        asdict(listing),
        listing,
        "pipeline runs compare A B" if listing.runs[1:] else "pipeline train",
    )


@runs_group.command("show", cls=Command)
@click.argument("run")
@click.pass_obj
def show_run_command(settings: Settings, /, run: str) -> None:
    """Show the results and the settings of a finished run.

    \b
    Example:
      pipeline runs show handwriting
    """
    from pipeline.training.runs import load_run

    finished, _ = load_run(paths_of(settings, run=run))
    settings.result(asdict(finished), finished, f"pipeline report --run {run}")


@runs_group.command("compare", cls=Command)
@click.argument("first")
@click.argument("second")
@click.pass_obj
def compare_runs_command(settings: Settings, /, first: str, second: str) -> None:
    """Compare two finished runs: accuracy, time, settings that differ, and McNemar's p.

    p is the probability that two equally accurate networks differ at least as unevenly on the test
    images; below 0.05 the difference is called clear.

    \b
    Example:
      pipeline runs compare handwriting other
    """
    from pipeline.training.runs import compare_runs

    comparison = compare_runs(paths_of(settings), first, second)
    settings.result(asdict(comparison), comparison, f"pipeline runs show {second}")

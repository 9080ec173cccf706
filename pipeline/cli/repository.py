"""The commands for the versions of a packaged model, and for a whole model repository."""

import shlex
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.cli.command import Command, Group, Settings, name_option, named, paths_of


@click.group("versions", cls=Group)
def versions_group() -> None:
    """List, promote, roll back, prune and compare the versions of a packaged model.

    \b
    Example:
      pipeline versions list
      pipeline versions promote 2
      pipeline versions rollback
    """


@versions_group.command("list")
@name_option
@click.pass_obj
def list_command(settings: Settings, name: str | None) -> None:
    """Show which versions there are, which one is selected, and which one is served.

    \b
    Example:
      pipeline versions list
    """
    from pipeline.repository.versions import list_versions
    from pipeline.serving.swap import find_served_version

    paths = paths_of(settings, name)
    listing = list_versions(paths, find_served_version(paths))
    settings.result(asdict(listing), listing, f"pipeline versions promote N{named(paths)}")


@versions_group.command("promote")
@click.argument("version", type=click.IntRange(1))
@name_option
@click.pass_obj
def promote_command(settings: Settings, version: int, name: str | None) -> None:
    """Select a version. A server that runs answers with it from then on, without a pause.

    The candidate is first loaded beside what is served, and must answer its golden set rightly.

    \b
    Example:
      pipeline versions promote 2
    """
    from pipeline.serving.swap import promote

    paths = paths_of(settings, name)
    change = promote(paths, version, settings.say)
    then = "rollback" if change.before not in (None, version) else "list"
    settings.result(asdict(change), change, f"pipeline versions {then}{named(paths)}")


@versions_group.command("rollback")
@name_option
@click.pass_obj
def rollback_command(settings: Settings, name: str | None) -> None:
    """Go back to the version that was selected before; a second time, forward again.

    \b
    Example:
      pipeline versions rollback
    """
    from pipeline.serving.swap import rollback

    paths = paths_of(settings, name)
    change = rollback(paths, settings.say)
    settings.result(asdict(change), change, f"pipeline versions list{named(paths)}")


@versions_group.command("prune")
@name_option
@click.pass_obj
def prune_command(settings: Settings, name: str | None) -> None:
    """Remove what is older than the selected version, but for the one before it.

    Versions that are newer wait to be promoted, and stay.

    \b
    Example:
      pipeline versions prune
    """
    from pipeline.repository.versions import prune

    paths = paths_of(settings, name)
    gone = prune(paths)
    removed = ", ".join(str(paths.packaged / str(number)) for number in gone)
    text = f"removed {removed}" if gone else "nothing is older than what is kept"
    settings.result(
        {"name": paths.name, "removed": gone}, text, f"pipeline versions list{named(paths)}"
    )


@versions_group.command("diff")
@click.argument("first", type=click.IntRange(1))
@click.argument("second", type=click.IntRange(1))
@name_option
@click.pass_obj
def diff_command(settings: Settings, first: int, second: int, name: str | None) -> None:
    """Show what two versions' records say differently, and how far their answers lie apart.

    \b
    Example:
      pipeline versions diff 1 2
    """
    from pipeline.repository.versions import diff_versions

    paths = paths_of(settings, name)
    difference = diff_versions(paths, first, second)
    settings.result(
        asdict(difference), difference, f"pipeline versions promote {second}{named(paths)}"
    )


@click.command(cls=Command)
@click.argument("repository", required=False, type=click.Path(path_type=Path))
@click.option("--live", is_flag=True, help="Also load each model in a scratch server, and ask it.")
@click.option("--target-triton", metavar="YY.MM", help="The Triton release that is to serve it.")
@click.pass_obj
def lint_command(
    settings: Settings, repository: Path | None, live: bool, target_triton: str | None
) -> None:
    """Say whether Triton would load a model repository, and serve it rightly.

    Of any repository of ONNX models; ours if none is named. Exits with 3 where Triton would not.

    \b
    Example:
      pipeline lint
      pipeline lint path/to/models --live --target-triton 24.10
    """
    from pipeline.export.targets import target
    from pipeline.repository.lint.check import lint_repository, require_clean

    paths = paths_of(settings)
    linted = lint_repository(
        repository or paths.repository, target(target_triton) if target_triton else None
    )
    if live:
        from pipeline.serving.scratch import lint_live

        settings.say("trying each model in a scratch server")
        linted = lint_live(linted, paths)
    is_ours = not repository or repository.resolve() == paths.repository.resolve()
    quoted = shlex.quote(str(repository or paths.repository))
    where = f" {quoted}" if repository else ""
    serve = "pipeline serve" if is_ours else f"tritonserver --model-repository={quoted}"
    then = serve if live else f"pipeline lint{where} --live"
    settings.result(linted.record(), linted, "" if linted.count("error") else then)
    require_clean(linted)

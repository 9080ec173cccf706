"""The commands for the versions of a packaged model, and for a whole model repository."""

import shlex
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.cli.command import (
    Command,
    Group,
    Settings,
    echo,
    next_of_packaged,
    pass_paths,
    paths_of,
)
from pipeline.cli.options import count_type, path_type
from pipeline.core.paths import Paths


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
@pass_paths
def list_command(settings: Settings, paths: Paths, /) -> None:
    """List the versions, and show which one is selected and which one is served.

    \b
    Example:
      pipeline versions list
    """
    from pipeline.repository.versions import list_versions
    from pipeline.serving.swap import find_served_version

    listing = list_versions(paths, find_served_version(paths))
    promote = f"pipeline versions promote N{paths.name_option}"
    then = promote if listing.versions[1:] else next_of_packaged(paths)
    settings.result(asdict(listing), listing, then)


@versions_group.command("promote")
@click.argument("version", type=count_type)
@pass_paths
def promote_command(settings: Settings, paths: Paths, /, version: int) -> None:
    """Select a version, and switch a running server to it without a pause.

    The server first loads it next to the current version, and it must answer its golden set
    correctly.

    \b
    Example:
      pipeline versions promote 2
    """
    from pipeline.serving.swap import promote

    change = promote(paths, version, settings.say)
    then = "rollback" if change.before not in (None, version) else "list"
    settings.result(asdict(change), change, f"pipeline versions {then}{paths.name_option}")


@versions_group.command("rollback")
@pass_paths
def rollback_command(settings: Settings, paths: Paths, /) -> None:
    """Select the version that was selected before; repeat it to undo that.

    \b
    Example:
      pipeline versions rollback
    """
    from pipeline.serving.swap import rollback

    change = rollback(paths, settings.say)
    settings.result(asdict(change), change, f"pipeline versions list{paths.name_option}")


@versions_group.command("prune")
@pass_paths
def prune_command(settings: Settings, paths: Paths, /) -> None:
    """Remove old versions; keep the selected one, the one before it, and newer ones.

    \b
    Example:
      pipeline versions prune
    """
    from pipeline.repository.versions import prune

    removed = prune(paths)
    folders = ", ".join(str(paths.packaged / str(number)) for number in removed)
    text = f"removed {folders}" if removed else "there are no old versions to remove"
    record = {"name": paths.name, "removed": removed}
    settings.result(record, text, f"pipeline versions list{paths.name_option}")


@versions_group.command("diff")
@click.argument("first", type=count_type)
@click.argument("second", type=count_type)
@pass_paths
def diff_command(settings: Settings, paths: Paths, /, first: int, second: int) -> None:
    """Compare the records of two versions, and their answers.

    \b
    Example:
      pipeline versions diff 1 2
    """
    from pipeline.repository.versions import diff_versions

    difference = diff_versions(paths, first, second)
    then = f"pipeline versions promote {second}{paths.name_option}"
    settings.result(asdict(difference), difference, then)


@click.command(cls=Command)
@click.argument("repository", required=False, type=path_type)
@click.option("--live", is_flag=True, help="Also load and query each model in a temporary server.")
@click.option("--target-triton", metavar="YY.MM", help="Triton release that will serve it.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "github", "sarif", "json"]),
    default="text",
    help="Output: text, GitHub's annotations of a pull request, SARIF 2.1.0, or one JSON object.",
)
@click.pass_obj
def lint_command(
    settings: Settings,
    repository: Path | None,
    live: bool,
    target_triton: str | None,
    output_format: str,
) -> None:
    """Check whether Triton would load a model repository and serve it correctly.

    REPOSITORY may be any repository of ONNX models.  [default: exported/model_repository]
    Exits with 3 if Triton would not.

    \b
    Example:
      pipeline lint
      pipeline lint path/to/models --live --target-triton 24.10
      pipeline lint --format sarif > lint.sarif
    """
    from pipeline.export.targets import target
    from pipeline.repository.lint import formats
    from pipeline.repository.lint.check import lint_repository, require_clean

    paths = paths_of(settings)
    linted = lint_repository(
        repository or paths.repository, target(target_triton) if target_triton else None
    )
    if live:
        from pipeline.serving.scratch import lint_live

        settings.say("loading each model in a temporary server")
        linted = lint_live(linted, paths)
    is_ours = not repository or repository.resolve() == paths.repository.resolve()
    quoted = shlex.quote(str(repository or paths.repository))
    where = f" {quoted}" if repository else ""
    serve = next_of_packaged(paths) if is_ours else f"tritonserver --model-repository={quoted}"
    then = serve if live else f"pipeline lint{where} --live"
    if output_format in formats.FORMATS:
        echo(formats.FORMATS[output_format](linted))
    else:
        settings.json = settings.json or output_format == "json"
        settings.result(linted.record(), linted, "" if linted.count("error") else then)
    require_clean(linted)

"""The commands about a model repository as a whole."""

import shlex
from pathlib import Path

import click

from pipeline.cli.command import Command, Settings, paths_of


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

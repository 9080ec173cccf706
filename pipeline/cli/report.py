"""The report of a run, and the check of a prediction log against its model's reference profile."""

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import click

from pipeline.cli.command import Command, Settings, name_of_run, name_option, named, paths_of
from pipeline.core.errors import PipelineError
from pipeline.core.files import read_json
from pipeline.core.paths import Paths
from pipeline.core.text import Lines


@click.command(cls=Command)
@click.option("--run", help="The run to report on.  [default: the one that was exported]")
@name_option
@click.option("--table", is_flag=True, help="Only show how the runtimes agreed, and write no page.")
@click.pass_obj
def report_command(settings: Settings, run: str | None, name: str | None, table: bool) -> None:
    """Write one page about a run, and show how its model's runtimes agreed when last proven.

    \b
    Example:
      pipeline report
      pipeline report --run wide
    """
    from pipeline.validation.agreement import read_agreement

    paths = _reported(paths_of(settings, name, run or name), run, name)
    if table:
        proof = read_agreement(paths)
        settings.result(asdict(proof), Lines(proof, f"read {paths.agreement}"), "pipeline serve")
        return
    if paths.images.exists() and not run:
        raise PipelineError(
            f"{paths.name} was not trained here and has no run to report on: its proof is told in "
            f"{paths.card}"
        )
    from pipeline.report.page import write_page  # imports torch

    page = write_page(paths)
    record, lines = {"run": paths.run, "page": str(paths.page)}, [f"wrote {paths.page}"]
    if paths.agreement.exists():
        proof = read_agreement(paths)
        record |= asdict(proof)
        lines = [str(proof), f"read {paths.agreement}", *lines]
    settings.result(record, Lines(*lines), page.then)


def _reported(paths: Paths, run: str | None, name: str | None) -> Paths:
    """Return the paths with the model's run if only the model is given, or the run's model."""
    if run:
        return paths if name else replace(paths, name=name_of_run(paths))
    if not paths.manifest.exists():
        return paths
    manifest = read_json(paths.manifest, "run 'pipeline export' again")
    return replace(paths, run=str(manifest.get("run", paths.run)))


file_type = click.Path(path_type=Path, dir_okay=False)


class TimeType(click.ParamType):  # type: ignore[type-arg]  # Click 8.2 takes none
    """The type of a time in ISO 8601; UTC unless it names an offset."""

    name = "time"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time: write 2026-11-23 or 2026-11-23T18:30:00Z", param, ctx)
        return time if time.tzinfo else time.replace(tzinfo=UTC)


@click.command(cls=Command)
@click.argument("log", type=file_type)
@name_option
@click.option("--reference", type=file_type, help="Another profile than the selected version's.")
@click.option("--model-version", type=click.IntRange(1), help="[default: the one selected]")
@click.option("--since", type=TimeType(), help="Leave out what is older (UTC).")
@click.option("--last", type=click.IntRange(1), help="Take so many predictions, the newest.")
@click.pass_obj
def drift_command(
    settings: Settings,
    log: Path,
    name: str | None,
    reference: Path | None,
    model_version: int | None,
    since: datetime | None,
    last: int | None,
) -> None:
    """Hold a prediction log against what the model said of the validation split.

    Class rates, confidence, ink and the share of "not sure": exit 3 where one has changed by more
    than is allowed, and not by chance; exit 1 where the log has too few predictions to tell.
    A row says by how much (effect: of rates and shares their change, of confidence and ink the
    part of the images that lies elsewhere), what may change, and the test's statistic and p.

    \b
    Example:
      pipeline query --prediction-log seen.jsonl digits/
      pipeline drift seen.jsonl
      pipeline drift seen.jsonl --since 2026-11-23 --json
    """
    from pipeline.monitoring.drift import require_none, watch_log

    paths = paths_of(settings, name)
    found = watch_log(
        paths, log, reference=reference, version=model_version, since=since, last=last
    )
    settings.result(
        found.record(), Lines(found, f"wrote {paths.drift}"), f"pipeline report{named(paths)}"
    )
    require_none(found)

"""The report of a run, and the check of a prediction log against its model's reference profile."""

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import (
    Command,
    Settings,
    next_of_packaged,
    pass_paths,
    paths_of,
    read_model_name,
)
from pipeline.cli.options import count_type, file_type
from pipeline.core.errors import PipelineError
from pipeline.core.files import read_json
from pipeline.core.paths import PRECISIONS, Paths
from pipeline.core.text import Lines


@click.command(cls=Command)
@click.option("--run", help="Run to report on.  [default: the exported run]")
@click.option("--name", help="Name of the model.  [default: that of the run's data set]")
@click.option("--table", is_flag=True, help="Show how the runtimes agreed; write no page.")
@click.pass_obj
def report_command(settings: Settings, run: str | None, name: str | None, table: bool) -> None:
    """Write an HTML page about a run, and show how its runtimes agreed at the last validation.

    \b
    Example:
      pipeline report
      pipeline report --run wide
    """
    from pipeline.validation.agreement import read_agreement

    paths = paths_of(settings, name, run or name)
    if run and not name:
        paths = replace(paths, name=read_model_name(paths))
    elif not run and paths.manifest.exists():
        manifest = read_json(paths.manifest, "run 'pipeline export' again")
        paths = replace(paths, run=str(manifest.get("run", paths.run)))
    record: dict[str, Any] = {}
    lines, then = list[object](), ""
    if not table:
        if paths.images.exists() and not run:
            raise PipelineError(f"{paths.name} was not trained here: it has only {paths.card}")
        from pipeline.report.page import write_page  # imports torch

        then = write_page(paths).then
        record, lines = {"run": paths.run, "page": str(paths.page)}, [f"wrote {paths.page}"]
    if table or paths.agreement.exists():
        others = [each for each in PRECISIONS[1:] if paths.variant_agreement(each).exists()]
        tables = [read_agreement(paths, each) for each in ("fp32", *others)]
        record |= {**asdict(tables[0]), "variants": [asdict(each) for each in tables]}
        lines = [*tables, f"from {paths.agreement}", *lines]
    settings.result(record, Lines(*lines), then or next_of_packaged(paths))


def _parse_time(value: str) -> datetime:
    """Parse a time in ISO 8601; UTC unless it names an offset."""
    try:
        time = datetime.fromisoformat(value)
    except ValueError as error:
        example = "write 2026-11-23 or 2026-11-23T18:30:00Z"
        raise click.BadParameter(f"{value!r} is not a valid time: {example}") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


@click.command(cls=Command)
@click.argument("log", type=file_type)
@click.option("--reference", type=file_type, help="Reference profile.  [default: the version's]")
@click.option(
    "--model-version", type=count_type, help="Version to compare with.  [default: the selected one]"
)
@click.option(
    "--since", type=_parse_time, metavar="TIME", help="Time of the oldest prediction to use (UTC)."
)
@click.option("--last", type=count_type, help="Number of predictions to use, the newest.")
@pass_paths
def drift_command(
    settings: Settings,
    paths: Paths,
    /,
    log: Path,
    reference: Path | None,
    model_version: int | None,
    since: datetime | None,
    last: int | None,
) -> None:
    """Compare a prediction log with the model's reference profile.

    Compares class rates, confidence, ink and the share of "not sure". Exits with 3 if one changed
    significantly by more than is allowed; with 1 if the log has too few predictions. A row shows
    the effect, the allowed effect, and the test's statistic and p. The effect of a rate or share
    is its change; that of confidence or ink is the largest difference of the two distributions.

    \b
    Example:
      pipeline query --prediction-log seen.jsonl digits/
      pipeline drift seen.jsonl
      pipeline drift seen.jsonl --since 2026-11-23 --json
    """
    from pipeline.monitoring.drift import require_none, watch_log

    drift = watch_log(
        paths, log, reference=reference, version=model_version, since=since, last=last
    )
    text = Lines(drift, f"wrote {paths.drift}")
    settings.result(drift.record(), text, f"pipeline report{paths.name_option}")
    require_none(drift)

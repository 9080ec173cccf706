"""The command that holds a prediction log against the model's reference profile."""

from datetime import UTC, datetime
from pathlib import Path

import click

from pipeline.cli.command import Command, Settings, name_option, named, paths_of
from pipeline.core.text import Lines

file_type = click.Path(path_type=Path, dir_okay=False)


class TimeType(click.ParamType):  # type: ignore[type-arg]  # Click 8.2 takes none
    """A time as ISO 8601 has it; UTC where it does not say."""

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
    from pipeline.monitoring.drift import require_none, watch

    paths = paths_of(settings, name)
    found = watch(paths, log, reference=reference, version=model_version, since=since, last=last)
    settings.result(
        found.record(), Lines(found, f"wrote {paths.drift}"), f"pipeline report{named(paths)}"
    )
    require_none(found)

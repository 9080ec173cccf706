"""The command that measures: recipes, an export in its runtimes, and a served model."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli.command import Command, Settings, name_option, paths_of
from pipeline.core.paths import Paths
from pipeline.core.text import Lines

KINDS = ("train", "infer", "serve", "all")  # all: infer and serve
SPEED = ("infer", "serve", "all")
# Which kinds use an option that not all of them do.
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("name", "short", "csv", "compare"), SPEED),
    "rate": ("serve", "all"),
    **dict.fromkeys(("recipes", "seeds", "resume"), ("train",)),
}
MOST_A_SECOND = 1_000_000  # requests, which are drawn before they are sent


@dataclass(frozen=True)
class _Asked:
    """What is measured of speed, and what becomes of it."""

    kinds: tuple[str, ...]
    short: bool
    rate: float | None
    csv: Path | None
    compare: Path | None


def _finite(
    context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no rate")
    return value


@click.command(cls=Command)
@click.option("--what", type=click.Choice(KINDS), default="train", show_default=True)
@name_option
@click.option("--short", is_flag=True, help="infer, serve: for seconds, not minutes.")
@click.option(
    "--csv", type=click.Path(path_type=Path), help="infer, serve: write the rows here too."
)
@click.option("--compare", type=click.Path(path_type=Path), help="Hold it against such a JSON.")
@click.option(
    "--rate",
    type=click.FloatRange(1, MOST_A_SECOND),
    callback=_finite,
    help="serve: requests a second that arrive in the open loop.  [default: half of what the "
    "closed loop did]",
)
@click.option("--recipes", default="quick,record,standard", show_default=True)
@click.option("--seeds", type=click.IntRange(1, 10), help="[default: 5 for a short recipe, else 3]")
@click.option("--resume", is_flag=True, help="Keep finished trials, and go on with one begun.")
@click.pass_obj
def benchmark_command(
    settings: Settings,
    what: str,
    name: str | None,
    short: bool,
    csv: Path | None,
    compare: Path | None,
    rate: float | None,
    recipes: str,
    seeds: int | None,
    resume: bool,
) -> None:
    """Measure recipes, an export in its runtimes, or a served model.

    The rows of infer and serve: asking is how many ask at once, or how many requests arrive a
    second; formed, how many images the server took together; differ, the images of another class
    than eager PyTorch's; images/s are those of the median round, and of the slowest and fastest.

    With --compare, exits with 3 where something got slower or less accurate beyond the noise; what
    seems slower is measured once more before it is said.

    \b
    Example:
      pipeline benchmark --what train --recipes quick --seeds 3
      pipeline benchmark --what all --short --csv rows.csv
      pipeline benchmark --what infer --compare before.json
      pipeline benchmark --what serve --name quick
    """
    _require_used(what)
    if what == "train":
        _measure_training(settings, recipes, seeds, resume)
    else:
        kinds = ("infer", "serve") if what == "all" else (what,)
        asked = _Asked(kinds, short, rate, csv, compare)
        _measure_speed(settings, paths_of(settings, name), asked)


def _require_used(what: str) -> None:
    """Refuse an option on the command line that this kind of benchmark would leave out."""
    context = click.get_current_context()
    for option, kinds in USED_BY.items():
        is_given = context.get_parameter_source(option) is ParameterSource.COMMANDLINE
        if is_given and what not in kinds:
            raise click.UsageError(
                f"--what {what} has no use for --{option}: that is for --what {', '.join(kinds)}"
            )


def _measure_training(settings: Settings, recipes: str, seeds: int | None, resume: bool) -> None:
    from pipeline.benchmark.training import benchmark_training

    names = [recipe_name.strip() for recipe_name in recipes.split(",")]
    rows = benchmark_training(
        paths_of(settings), names, seeds, resume, settings.say, settings.update
    )
    record = {"what": "train", "rows": [row.record() for row in rows]}
    settings.result(record, Lines(*rows), "pipeline train")


def _measure_speed(settings: Settings, paths: Paths, asked: _Asked) -> None:
    from pipeline.benchmark import compare as comparison
    from pipeline.benchmark.table import csv_of, require_place, table
    from pipeline.core.files import write_bytes

    if asked.csv:
        require_place(asked.csv)
    before = comparison.read(asked.compare, asked.kinds, paths.name) if asked.compare else {}
    found = _speeds(settings, paths, asked)
    compared = {what: comparison.compare(before[what], found[what].record()) for what in before}
    if doubtful := tuple(what for what, one in compared.items() if one.is_doubtful):
        settings.say("something seems slower: measuring it once more, to be sure")
        found |= _speeds(settings, paths, replace(asked, kinds=doubtful))
        for what in doubtful:
            again = comparison.compare(before[what], found[what].record())
            compared[what] = comparison.confirmed(compared[what], again)
    rows = [row for one in found.values() for row in one.rows]
    records = {what: one.record() for what, one in found.items()}
    written = {"infer": paths.inference, "serve": paths.serving}
    lines = [table(rows), *(found["serve"].told_ratios() if "serve" in found else [])]
    lines += [f"wrote {written[what]}" for what in found]
    if asked.csv:
        write_bytes(asked.csv, csv_of(rows).encode())
        lines.append(f"wrote {asked.csv}")
    record = records[asked.kinds[0]]
    if len(asked.kinds) > 1:
        record = {"what": "all", **records, "rows": [row.record() for row in rows]}
    lines += [Lines(f"against {asked.compare}:", one) for one in compared.values()]
    if compared:
        record = {**record, "compared": [one.record() for one in compared.values()]}
    settings.result(record, Lines(*lines), "pipeline serve")
    for one in compared.values():
        comparison.require_no_worse(one)


def _speeds(settings: Settings, paths: Paths, asked: _Asked) -> dict[str, Any]:
    """What was found of each kind that was asked for."""
    found: dict[str, Any] = {}
    if "infer" in asked.kinds:
        from pipeline.benchmark import inference

        found["infer"] = inference.benchmark_inference(
            paths, inference.SHORT if asked.short else inference.InferBenchmark(), settings.say
        )
    if "serve" in asked.kinds:
        from pipeline.benchmark import serving

        found["serve"] = serving.benchmark_serving(
            paths,
            replace(serving.SHORT if asked.short else serving.ServeBenchmark(), rate=asked.rate),
            settings.say,
            reference=getattr(found.get("infer"), "classes", None),
        )
    return found

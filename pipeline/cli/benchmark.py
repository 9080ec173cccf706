"""The benchmark command: recipes, an export in its runtimes, and a served model."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli.command import Command, Settings, name_option, paths_of
from pipeline.core.files import write_bytes
from pipeline.core.paths import Paths
from pipeline.core.text import Lines

KINDS = ("train", "infer", "serve", "all")  # all: infer and serve
SPEED = ("infer", "serve", "all")
# The kinds that use an option, for options that not all kinds use.
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("name", "short", "csv", "compare"), SPEED),
    "rate": ("serve", "all"),
    **dict.fromkeys(("recipes", "seeds", "resume"), ("train",)),
}
MOST_A_SECOND = 1_000_000  # requests; their times are drawn before the first is sent


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

    With --compare, exits with 3 where something got less accurate, or slower: the median of its
    rounds fell by more than 10% and by more than the rounds are spread. What seems slower is
    measured once more before it is said.

    \b
    Example:
      pipeline benchmark --what train --recipes quick --seeds 3
      pipeline benchmark --what all --short --csv rows.csv
      pipeline benchmark --what infer --compare before.json
      pipeline benchmark --what serve --name quick
    """
    _require_used(what)
    if rate is not None and math.isnan(rate):
        raise click.BadParameter("nan is no rate", param_hint="'--rate'")
    if what != "train":
        kinds = ("infer", "serve") if what == "all" else (what,)
        paths = paths_of(settings, name)
        measure = functools.partial(_measure, settings, paths, short=short, rate=rate)
        _measure_speed(settings, paths, kinds, measure, csv, compare)
        return
    from pipeline.benchmark.training import benchmark_training

    names = [recipe.strip() for recipe in recipes.split(",")]
    rows = benchmark_training(
        paths_of(settings), names, seeds, resume, settings.say, settings.update
    )
    record = {"what": "train", "rows": [row.record() for row in rows]}
    settings.result(record, Lines(*rows), "pipeline train")


def _require_used(what: str) -> None:
    """Raise UsageError for an option on the command line that this kind of benchmark ignores."""
    context = click.get_current_context()
    for option, kinds in USED_BY.items():
        is_given = context.get_parameter_source(option) is ParameterSource.COMMANDLINE
        if is_given and what not in kinds:
            raise click.UsageError(
                f"--what {what} has no use for --{option}: that is for --what {', '.join(kinds)}"
            )


def _measure_speed(
    settings: Settings,
    paths: Paths,
    kinds: tuple[str, ...],
    measure: Callable[[tuple[str, ...]], dict[str, Any]],
    csv: Path | None,
    compare: Path | None,
) -> None:
    """Measure each kind and compare it with an earlier measurement; repeat what seems slower."""
    from pipeline.benchmark.compare import (
        compare_records,
        confirmed,
        read_measurements,
        require_no_worse,
    )
    from pipeline.benchmark.table import csv_of, require_place, tables

    if csv:
        require_place(csv)
    before = read_measurements(compare, kinds, paths.name) if compare else {}
    results = measure(kinds)
    compared = {kind: compare_records(before[kind], results[kind].record()) for kind in before}
    if doubtful := tuple(kind for kind, changes in compared.items() if changes.is_doubtful):
        settings.say("something seems slower: measuring it once more, to be sure")
        results |= measure(doubtful)
        for kind in doubtful:
            again = compare_records(before[kind], results[kind].record())
            compared[kind] = confirmed(compared[kind], again)
    rows = [row for result in results.values() for row in result.rows]
    records = {kind: result.record() for kind, result in results.items()}
    record = records[kinds[0]]
    if len(kinds) > 1:
        record = {"what": "all", **records, "rows": [row.record() for row in rows]}
    written = {"infer": paths.inference, "serve": paths.serving}
    lines = [tables(rows), *(results["serve"].ratio_lines() if "serve" in results else [])]
    lines += [f"wrote {written[kind]}" for kind in results]
    if csv:
        write_bytes(csv, csv_of(rows).encode())
        lines.append(f"wrote {csv}")
    if compared:
        record = {**record, "compared": [changes.record() for changes in compared.values()]}
        lines += [Lines(f"against {compare}:", changes) for changes in compared.values()]
    settings.result(record, Lines(*lines), "pipeline serve")
    for changes in compared.values():
        require_no_worse(changes)


def _measure(
    settings: Settings, paths: Paths, kinds: tuple[str, ...], *, short: bool, rate: float | None
) -> dict[str, Any]:
    """Return the result of each kind: infer first, since serve compares with its classes."""
    results: dict[str, Any] = {}
    if "infer" in kinds:
        from pipeline.benchmark import inference

        config = inference.SHORT if short else inference.InferBenchmark()
        results["infer"] = inference.benchmark_inference(paths, config, settings.say)
    if "serve" in kinds:
        from pipeline.benchmark import serving

        results["serve"] = serving.benchmark_serving(
            paths,
            replace(serving.SHORT if short else serving.ServeBenchmark(), rate=rate),
            settings.say,
            reference=getattr(results.get("infer"), "classes", None),
        )
    return results

"""The benchmark command: recipes, an export in its runtimes, a served model, any server."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli.command import Command, Settings, next_of_packaged, pass_paths
from pipeline.cli.options import Number, connection_options, count_type, parse_url, path_type
from pipeline.core.files import write_bytes
from pipeline.core.paths import Paths
from pipeline.core.text import Lines

KINDS = {
    "train": "the recipes: accuracy and time, for some seeds",
    "infer": "an export in its runtimes: PyTorch and ONNX Runtime, without a server",
    "serve": "the packaged model on a temporary server: latency and rate under load",
    "all": "infer, then serve",
}
SPEED = ("infer", "serve", "all")
URL = "url"  # instead of a kind
_TLS = ("ca", "certificate", "key", "header")
OF_URL = ("concurrency", "batch", "duration", "shape", "input_data", "model_version", *_TLS)
# The kinds that use an option, for options that not all kinds use.
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("short", "compare"), SPEED),
    **dict.fromkeys(("name", "csv"), (*SPEED, URL)),
    "rate": ("serve", "all"),
    **dict.fromkeys(("recipes", "seeds", "resume"), ("train",)),
    **dict.fromkeys(OF_URL, (URL,)),
}
MOST_A_SECOND = 1_000_000  # requests; their times are drawn before the first is sent
MOST_CONCURRENT = 1024  # requests; over HTTP, each has a connection and a thread


def _parse_counts(value: str) -> tuple[int, ...]:
    """Parse whole numbers from 1 on, separated by commas."""
    try:
        counts = tuple(int(number) for number in value.split(","))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise click.BadParameter(f"{value!r} is not a list of numbers from 1 on, such as 1,8,32")
    return counts


def _parse_shapes(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    pairs = [value.rpartition(":") for value in values]
    if not all(name for name, _, _ in pairs):
        raise click.BadParameter("the format is INPUT:SIZE,SIZE,..., such as images:3,32,32")
    return {name: _parse_counts(sizes) for name, _, sizes in pairs}


@click.command(cls=Command)
@click.option(
    "--what",
    type=click.Choice(tuple(KINDS)),
    help="What to measure: recipes, the runtimes of an export, a served model, or the last two.",
)
@click.option(
    "--url",
    type=parse_url,
    metavar="URL",
    help="Measure the model --name on a running server, ours or another: http:// or grpc://.",
)
@click.option(
    "--concurrency",
    type=_parse_counts,
    metavar="N,...",
    default="1",
    help="url: numbers of concurrent requests, one row each.",
)
@click.option(
    "--batch",
    type=_parse_counts,
    metavar="N,...",
    default="1",
    help="url: batch sizes, one row each.",
)
@click.option("--duration", type=Number(0.1, 3600), default=10.0, help="url: seconds for each row.")
@click.option(
    "--shape",
    multiple=True,
    metavar="INPUT:SIZE,...",
    callback=_parse_shapes,
    help="url: shape of an input with variable dimensions, without the batch; repeatable.",
)
@click.option(
    "--input-data",
    type=click.Choice(["random", "zero"]),
    default="random",
    help="url: what to send.",
)
@click.option("--model-version", type=count_type, help="url: version.  [default: the server's]")
@connection_options
@click.option("--short", is_flag=True, help="infer, serve: measure for seconds, not minutes.")
@click.option("--csv", type=path_type, help="infer, serve, url: CSV file for the rows.")
@click.option("--compare", type=path_type, help="infer, serve: earlier JSON to compare with.")
@click.option(
    "--rate",
    type=Number(1, MOST_A_SECOND),
    help="serve: requests per second in the open loop.  [default: half of the closed loop's]",
)
@click.option("--recipes", default="quick,record,standard", help="train: recipes to measure.")
@click.option(
    "--seeds",
    type=click.IntRange(1, 10),
    help="train: trials per recipe.  [default: 5 for quick and record, else 3]",
)
@click.option("--resume", is_flag=True, help="train: keep finished trials, continue the last one.")
@pass_paths
def benchmark_command(
    settings: Settings,
    paths: Paths,
    /,
    what: str | None,
    url: str | None,
    short: bool,
    csv: Path | None,
    compare: Path | None,
    rate: float | None,
    recipes: str,
    seeds: int | None,
    resume: bool,
    **of_url: Any,
) -> None:
    """Measure recipes, an export in its runtimes, a served model, or any server.

    With --url, measures any model on any server that speaks KServe's protocol, version 2: with
    made-up data, in closed loops, with perf_analyzer's columns. Failed requests count in no rate;
    if there are any, exits with 3, or with 5 if the server did not answer.

    Columns of infer, serve and url: asking, the concurrency, or the requests per second; formed,
    the server's mean batch size; differ, images whose class is not eager PyTorch's; images/s, the
    median round; least and most, the slowest and the fastest round.

    With --compare, exits with 3 if a row got less accurate or slower: if the median of its rounds
    fell by more than 10% and by more than the spread of the rounds. A row that seems slower is
    first measured again.

    \b
    Example:
      pipeline benchmark --what train --recipes quick --seeds 3
      pipeline benchmark --what all --short --csv rows.csv
      pipeline benchmark --what infer --compare before.json
      pipeline benchmark --what serve --name quick
      pipeline benchmark --url grpc://HOST:8001 --concurrency 1,8,32 --batch 1,64 --csv rows.csv
    """
    if url and what:
        raise click.UsageError("--what and --url exclude each other: --url measures a server")
    what = URL if url else what
    if what is None:
        kinds = (f"  --what {kind:<7} {measured}" for kind, measured in KINDS.items())
        server = "  --url URL       any model on a running server"
        raise click.UsageError(Lines("say what to measure:", *kinds, server))
    source_of = click.get_current_context().get_parameter_source
    for option, users in USED_BY.items():
        if source_of(option) is ParameterSource.COMMANDLINE and what not in users:
            valid = " or ".join(f"--what {kind}" for kind in users)
            message = f"--{option.replace('_', '-')} needs {valid}, not --what {what}"
            raise click.UsageError(message.replace(f"--what {URL}", "--url"))
    if url:
        _measure_url(settings, paths, url, csv, **of_url)
        return
    if what != "train":
        measured = ("infer", "serve") if what == "all" else (what,)
        measure = functools.partial(_measure, settings, paths, short, rate)
        _measure_speed(settings, paths, measured, measure, csv, compare)
        return
    from pipeline.benchmark.training import benchmark_training

    names = [recipe.strip() for recipe in recipes.split(",")]
    rows = benchmark_training(paths, names, seeds, resume, settings.say, settings.update)
    record = {"what": "train", "rows": [row.record() for row in rows]}
    settings.result(record, Lines(*rows), "pipeline train")


def _measure_url(
    settings: Settings,
    paths: Paths,
    url: str,
    csv: Path | None,
    /,
    *,
    concurrency: tuple[int, ...],
    batch: tuple[int, ...],
    duration: float,
    shape: dict[str, tuple[int, ...]],
    input_data: str,
    model_version: int | None,
    header: dict[str, str],
    **pem: Path | None,
) -> None:
    """Measure a model on the server at `url`; `pem` has the files for TLS."""
    from pipeline.benchmark.remote import RemoteBenchmark, benchmark_remote
    from pipeline.benchmark.table import csv_of, format_tables, require_writable
    from pipeline.benchmark.target import LoadTarget
    from pipeline.client.endpoint import Certificates, endpoint

    if max(concurrency) > MOST_CONCURRENT:
        raise click.UsageError(f"--concurrency is at most {MOST_CONCURRENT}")
    if csv:
        require_writable(csv)
    version, certificates = str(model_version or ""), Certificates(**pem)
    config = RemoteBenchmark(
        tuple(dict.fromkeys(concurrency)),
        tuple(dict.fromkeys(batch)),
        duration,
        shape,
        input_data == "zero",
    )
    target = LoadTarget(
        endpoint(url), paths.name, version=version, certificates=certificates, headers=header
    )
    result = benchmark_remote(target, config, settings.update)
    lines = [format_tables(result.rows), *([result.statistics] if result.statistics else [])]
    if csv:
        write_bytes(csv, csv_of(result.rows).encode())
        lines.append(f"wrote {csv}")
    more = min(2 * max(concurrency), MOST_CONCURRENT)
    then = f"pipeline benchmark --url {url}{paths.name_option} --concurrency {more}"
    settings.result(result.record(), Lines(*lines), then)
    result.require_answers()


def _measure_speed(
    settings: Settings,
    paths: Paths,
    kinds: tuple[str, ...],
    measure: Callable[[tuple[str, ...]], dict[str, Any]],
    csv: Path | None,
    compare: Path | None,
) -> None:
    """Measure each kind and compare it with an earlier measurement; repeat what seems slower."""
    from pipeline.benchmark import compare as comparison
    from pipeline.benchmark.table import csv_of, format_tables, require_writable

    if csv:
        require_writable(csv)
    before = comparison.read_measurements(compare, kinds, paths.name) if compare else {}
    results = measure(kinds)

    def compare_with_before(kind: str) -> comparison.Comparison:
        return comparison.compare_records(before[kind], results[kind].record())

    compared = {kind: compare_with_before(kind) for kind in before}
    if doubtful := tuple(kind for kind, changes in compared.items() if changes.is_doubtful):
        settings.say("some rows seem slower: measuring them again")
        results |= measure(doubtful)
        for kind in doubtful:
            compared[kind] = comparison.confirm(compared[kind], compare_with_before(kind))
    rows = [row for result in results.values() for row in result.rows]
    records = {kind: result.record() for kind, result in results.items()}
    record = records[kinds[0]]
    if len(kinds) > 1:
        record = {"what": "all", **records, "rows": [row.record() for row in rows]}
    files = {"infer": paths.inference, "serve": paths.serving}
    lines = [format_tables(rows), *(results["serve"].ratio_lines() if "serve" in results else [])]
    lines += [f"wrote {files[kind]}" for kind in results]
    if csv:
        write_bytes(csv, csv_of(rows).encode())
        lines.append(f"wrote {csv}")
    if compared:
        record = {**record, "compared": [changes.record() for changes in compared.values()]}
        lines += [Lines(f"compared with {compare}:", changes) for changes in compared.values()]
    settings.result(record, Lines(*lines), next_of_packaged(paths))
    for changes in compared.values():
        comparison.require_no_worse(changes)


def _measure(
    settings: Settings, paths: Paths, short: bool, rate: float | None, kinds: tuple[str, ...]
) -> dict[str, Any]:
    """Return the result of each kind: infer first, since serve compares with its classes."""
    results: dict[str, Any] = {}
    if "infer" in kinds:
        from pipeline.benchmark import inference

        config = inference.SHORT if short else inference.InferBenchmark()
        results["infer"] = inference.benchmark_inference(paths, config, settings.say)
    if "serve" in kinds:
        from pipeline.benchmark import serving

        of_serving = replace(serving.SHORT if short else serving.ServeBenchmark(), rate=rate)
        classes = results["infer"].classes if "infer" in results else None
        results["serve"] = serving.benchmark_serving(paths, of_serving, settings.say, classes)
    return results

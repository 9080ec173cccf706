"""The commands that report and measure, and keep what they measured as figures."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from pipeline.command import Command, Settings, name_of_run, name_option, paths_of
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.paths import Paths

KINDS = ("train", "infer", "serve", "photos", "unsure", "all")  # all: infer and serve


@click.command(cls=Command)
@click.option("--run", help="The run to report on.  [default: the one that was exported]")
@name_option
@click.option("--table", is_flag=True, help="Only show how the runtimes agreed, and write no page.")
@click.option("--figures", is_flag=True, help="Keep these results as the README's figures.")
@click.option("--readme", type=click.Path(path_type=Path), default=Path("README.md"), hidden=True)
@click.pass_obj
def report_command(
    settings: Settings,
    run: str | None,
    name: str | None,
    table: bool,
    figures: bool,
    readme: Path,
) -> None:
    """Write one page about a run, and show how its model's runtimes agreed when last proven.

    \b
    Example:
      pipeline report
      pipeline report --run wide
      pipeline report --figures
    """
    from pipeline.report import agreement, render_readme, save_figures

    paths = _reported(paths_of(settings, name, run or name), run, name)
    if table:
        proof = agreement(paths)
        settings.result(asdict(proof), f"{proof}\nread {paths.agreement}", "pipeline serve")
        return
    if paths.images.exists() and not run:
        raise PipelineError(
            f"{paths.name} was not trained here and has no run to report on: its proof is told in "
            f"{paths.card}"
        )
    from pipeline.page import write_page  # imports torch

    page = write_page(paths)
    record, text = {"run": paths.run, "page": str(paths.page)}, f"wrote {paths.page}"
    if paths.agreement.exists():
        proof = agreement(paths)
        record |= asdict(proof)
        text = f"{proof}\nread {paths.agreement}\n{text}"
    if figures:
        text += f"\nwrote {save_figures(paths)}"
        render_readme(paths.root / readme, paths.figures)
    settings.result(record, text, page.then)


def _reported(paths: Paths, run: str | None, name: str | None) -> Paths:
    """The run that goes with the model, where only the model is given, or the other way round."""
    if run:
        return paths if name else replace(paths, name=name_of_run(paths))
    if not paths.manifest.exists():
        return paths
    manifest = read_json(paths.manifest, "run 'pipeline export' again")
    return replace(paths, run=str(manifest.get("run", paths.run)))


@click.command(cls=Command)
@click.option("--what", type=click.Choice(KINDS), default="train", show_default=True)
@name_option
@click.option("--short", is_flag=True, help="All but train: measure for seconds, not minutes.")
@click.option(
    "--csv", type=click.Path(path_type=Path), help="infer, serve: write the rows here too."
)
@click.option("--compare", type=click.Path(path_type=Path), help="Hold it against such a JSON.")
@click.option(
    "--rate",
    type=click.FloatRange(1),
    help="serve: requests a second that arrive in the open loop.  [default: half of what the "
    "closed loop did]",
)
@click.option("--recipes", default="quick,record,standard", show_default=True)
@click.option("--seeds", type=click.IntRange(1, 10), help="[default: 5 for a short recipe, else 3]")
@click.option("--resume", is_flag=True, help="Keep finished trials, and go on with one begun.")
@click.option("--figures", is_flag=True, help="Keep these results as the README's figures.")
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
    figures: bool,
) -> None:
    """Measure recipes, an export in its runtimes, a served model, photos, or what is no digit.

    With --compare, exits with 3 where something got slower or less accurate beyond the noise.

    \b
    Example:
      pipeline benchmark --what train --recipes quick --seeds 3
      pipeline benchmark --what infer --compare before.json
      pipeline benchmark --what serve --name quick
      pipeline benchmark --what photos
      pipeline benchmark --what unsure
    """
    if what == "unsure":
        _measure_unsure(settings, paths_of(settings, name), figures)
        return
    if what == "photos":
        _measure_photos(settings, paths_of(settings, name), short, figures)
        return
    if what != "train":
        asked = ("infer", "serve") if what == "all" else (what,)
        _measure(settings, paths_of(settings, name), asked, short, csv, compare, rate, figures)
        return
    from pipeline.benchmark import benchmark_training
    from pipeline.report import render_readme, save_training

    paths = paths_of(settings)
    names = [recipe_name.strip() for recipe_name in recipes.split(",")]
    rows = benchmark_training(paths, names, seeds, resume, settings.say, settings.update)
    records = [row.record() for row in rows]
    text = "\n".join(map(str, rows))
    if figures:
        text += f"\nwrote {save_training(paths, records)}"
        render_readme(paths.root / "README.md", paths.figures)
    settings.result({"what": what, "rows": records}, text, "pipeline train")


def _measure_unsure(settings: Settings, paths: Paths, figures: bool) -> None:
    from pipeline.report import render_readme, save_unsure
    from pipeline.unsure import measure_unsure

    found = measure_unsure(paths)
    text = f"{found}\nwrote {paths.unsure}"
    if figures:
        text += f"\nwrote {save_unsure(paths, found.record())}"
        render_readme(paths.root / "README.md", paths.figures)
    settings.result(found.record(), text, "pipeline report")


def _measure(
    settings: Settings,
    paths: Paths,
    asked: tuple[str, ...],
    short: bool,
    csv: Path | None,
    compare: Path | None,
    rate: float | None,
    figures: bool,
) -> None:
    from pipeline import comparison
    from pipeline.files import write_bytes
    from pipeline.report import render_readme, save_serving
    from pipeline.speed_table import csv_of, table

    before = comparison.read(compare, asked) if compare else {}
    found: dict[str, Any] = {}
    if "infer" in asked:
        from pipeline import infer

        found["infer"] = infer.benchmark_inference(
            paths, infer.SHORT if short else infer.InferBenchmark(), settings.say
        )
    if "serve" in asked:
        from pipeline import measure

        found["serve"] = measure.benchmark_serving(
            paths,
            replace(measure.SHORT if short else measure.ServeBenchmark(), rate=rate),
            settings.say,
            reference=getattr(found.get("infer"), "classes", None),
        )
    written = {"infer": paths.inference, "serve": paths.serving}
    rows = [row for one in found.values() for row in one.rows]
    lines = [table(rows), *(found["serve"].told_ratios() if "serve" in found else [])]
    lines += [f"wrote {written[what]}" for what in found]
    records = {what: one.record() for what, one in found.items()}
    if figures and "serve" in found:
        lines.append(f"wrote {save_serving(paths, records['serve'])}")
        render_readme(paths.root / "README.md", paths.figures)
    if csv:
        write_bytes(csv, csv_of(rows).encode())
        lines.append(f"wrote {csv}")
    record = (
        records[asked[0]]
        if len(asked) == 1
        else {"what": "all", **records, "rows": [row.record() for row in rows]}
    )
    compared = [comparison.compare(before[what], records[what]) for what in before]
    lines += [f"against {compare}:\n{one}" for one in compared]
    if compared:
        record = {**record, "compared": [one.record() for one in compared]}
    settings.result(record, "\n".join(lines), "pipeline serve")
    for one in compared:
        comparison.require_no_worse(one)


def _measure_photos(settings: Settings, paths: Paths, short: bool, figures: bool) -> None:
    from pipeline.photo_table import SHORT, PhotoBenchmark, benchmark_photos
    from pipeline.report import render_readme, save_photos

    found = benchmark_photos(paths, SHORT if short else PhotoBenchmark(), settings.say)
    text = f"{found}\nwrote {paths.photos}"
    if figures:
        text += f"\nwrote {save_photos(paths, found.record())}"
        render_readme(paths.root / "README.md", paths.figures)
    settings.result(found.record(), text, "pipeline query FILE")


@click.command(cls=Command)
@click.option("--signed-off-by", required=True, help="Who ran it and answers for it.")
@click.pass_obj
def gpu_check_command(settings: Settings, signed_off_by: str) -> None:
    """Verify training, export and validation on a GPU, for the README to say so.

    \b
    Example:
      pipeline gpu-check --signed-off-by "Ada Lovelace"
    """
    from pipeline.gpu import gpu_check
    from pipeline.report import render_readme

    paths = paths_of(settings)
    check = gpu_check(paths, signed_off_by, settings.say)
    render_readme(paths.root / "README.md", paths.figures)
    text = f"{check.device}: {check.tests} tests, {check.test_accuracy:.2%}\nwrote {paths.gpu}"
    settings.result(asdict(check), text, f"git commit {paths.gpu} {paths.root / 'README.md'}")

"""The train command, with an option for every field of a recipe, and the commands for runs."""

from dataclasses import asdict, replace
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli.command import Command, Group, Settings, paths_of
from pipeline.cli.options import dataset_option, settings_options
from pipeline.core.paths import Paths, model_name
from pipeline.core.text import Lines
from pipeline.training.recipes import (
    RECIPES,
    Recipe,
    TrainConfig,
    choose_epochs,
    default_dataset,
    make_recipe,
)


@click.command(cls=Command)
@dataset_option
@click.option("--run", help="Name of this run.  [default: the model's name]")
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=TrainConfig.recipe,
    help="Network and training settings (docs/training.md); the options below change single ones.",
)
@settings_options(TrainConfig)
@click.option(
    "--save-every",
    type=click.IntRange(0),
    default=0,
    help="Steps between checkpoints; 0: only after each epoch.",
)
@click.option(
    "--resume", is_flag=True, help="Continue an interrupted run, with its settings by default."
)
@settings_options(
    Recipe,
    (TrainConfig.recipe, RECIPES[TrainConfig.recipe]),
    channels=lambda value: tuple(map(int, value.split(","))),
)
@click.pass_obj
def train_command(
    settings: Settings,
    /,
    dataset: str,
    run: str | None,
    recipe: str,
    seed: int,
    device: str,
    compiled: bool,
    init: str,
    save_every: int,
    resume: bool,
    **changes: Any,
) -> None:
    """Train a network on a data set.

    On a small folder of pictures it trains for more epochs than the recipe has, until 400 steps are
    done, unless --epochs is given. A finished run of the same name is moved to previous/ in its
    folder and replaces the one there.

    With --init, it starts from another run's weights, with that run's recipe, a quarter of its
    learning rate, and at most 2 epochs.

    \b
    Example:
      pipeline train
      pipeline train --init handwriting --dataset mnist+folder:own
      pipeline train --recipe baseline --run yardstick --resume
    """
    from pipeline.training.checkpoint import load_checkpoint
    from pipeline.training.recipes import tune_recipe
    from pipeline.training.run import format_parts, read_run_config, train_run

    source_of = click.get_current_context().get_parameter_source
    if source_of("dataset") == ParameterSource.DEFAULT:
        dataset = default_dataset(recipe)
    paths = paths_of(settings, run=run or model_name(dataset))
    digest = ""
    if init:
        start = load_checkpoint(paths.of_run(init))
        if source_of("recipe") != ParameterSource.DEFAULT and recipe != start.config.recipe:
            own = f"that of run {init} is {start.config.recipe}"
            raise click.UsageError(f"--init takes its run's recipe, and {own}: leave out --recipe")
        recipe, digest = start.config.recipe, start.summary.weights_sha256
        values = tune_recipe(start.config.settings, dataset, **changes)
    else:
        values = make_recipe(recipe, dataset, **changes)
    if changes["epochs"] is None:
        values = replace(values, epochs=choose_epochs(values, dataset, paths.data(dataset)))
    config = TrainConfig(recipe, values, dataset, seed, device, compiled, init, digest)
    deciding = ("recipe", "seed", "device", "compiled", "init", *changes)
    if resume and all(source_of(name) == ParameterSource.DEFAULT for name in deciding):
        config = read_run_config(paths) or config
    say, update = settings.say, settings.update
    # Hundreds of short epochs do not need one line each.
    on_epoch = say if config.settings.epochs <= 50 else update
    option = "" if paths.run == Paths.run else f" --run {paths.run}"
    try:
        summary = train_run(paths, config, resume, say, on_epoch, update, save_every)
    except KeyboardInterrupt:
        if paths.checkpoint.exists():
            say(f"next: pipeline train{option} --resume")
        raise
    for note in summary.notes:
        say(f"note: {note}")
    text = Lines(
        f"test accuracy {summary.test_accuracy:.2%} after {summary.train_seconds:.1f} s of "
        f"training ({summary.parameters:,} parameters, {summary.device})",
        *format_parts(summary.parts),
        f"wrote {paths.weights}",
    )
    settings.result(asdict(summary), text, f"pipeline export{option}")


@click.group("runs", cls=Group)
def runs_group() -> None:
    """List, show and compare the finished runs.

    \b
    Example:
      pipeline runs list
      pipeline runs compare handwriting other
    """


@runs_group.command("list", cls=Command)
@click.pass_obj
def list_runs_command(settings: Settings, /) -> None:
    """List the finished runs with their test accuracy and its 95 % interval.

    \b
    Example:
      pipeline runs list
    """
    from pipeline.training.runs import list_runs

    listing = list_runs(paths_of(settings))
    settings.result(
        asdict(listing),
        listing,
        "pipeline runs compare A B" if listing.runs[1:] else "pipeline train",
    )


@runs_group.command("show", cls=Command)
@click.argument("run")
@click.pass_obj
def show_run_command(settings: Settings, /, run: str) -> None:
    """Show the results and the settings of a finished run.

    \b
    Example:
      pipeline runs show handwriting
    """
    from pipeline.training.runs import load_run

    finished, _ = load_run(paths_of(settings, run=run))
    settings.result(asdict(finished), finished, f"pipeline report --run {run}")


@runs_group.command("compare", cls=Command)
@click.argument("first")
@click.argument("second")
@click.pass_obj
def compare_runs_command(settings: Settings, /, first: str, second: str) -> None:
    """Compare two finished runs: accuracy, time, settings that differ, and McNemar's p.

    p is the probability that two equally accurate networks differ at least as unevenly on the test
    images; below 0.05 the difference is called clear.

    \b
    Example:
      pipeline runs compare handwriting other
    """
    from pipeline.training.runs import compare_runs

    comparison = compare_runs(paths_of(settings), first, second)
    settings.result(asdict(comparison), comparison, f"pipeline runs show {second}")

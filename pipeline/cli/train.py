"""The train command: a recipe, and an option for every field of it."""

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli.command import Command, Settings, dataset_option, paths_of
from pipeline.core.paths import MODEL_NAMES, model_name
from pipeline.core.text import Lines
from pipeline.training.recipes import DEFAULT_RECIPE, RECIPES, Recipe, TrainConfig, enough_epochs
from pipeline.training.recipes import recipe as recipe_named


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every field of a recipe; the default is the recipe's own value."""
    default = RECIPES[DEFAULT_RECIPE]
    for field in reversed(fields(Recipe)):
        kind = {int: int, float: float, str: str, bool: bool}.get(field.type)
        option = click.option(
            f"--{field.name.replace('_', '-')}",
            type=kind or _channels,
            metavar=None if kind else "N,N,...",
            help=f"[default: the recipe's; {DEFAULT_RECIPE} has {getattr(default, field.name)}]",
        )
        command = option(command)
    return command


def _channels(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split(","))


@click.command(cls=Command)
@dataset_option
@click.option("--run", help="A name for this run.  [default: the model's name]")
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=DEFAULT_RECIPE,
    show_default=True,
)
@click.option("--seed", default=TrainConfig.seed, show_default=True)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default=TrainConfig.device,
    show_default=True,
)
@click.option(
    "--compiled", is_flag=True, help="Through torch.compile; pays on a GPU, in a long run."
)
@click.option(
    "--save-every",
    type=click.IntRange(0),
    default=0,
    help="Steps between two checkpoints, besides the one after each epoch.",
)
@click.option(
    "--resume", is_flag=True, help="Go on exactly where an interrupted run stopped, as it began."
)
@recipe_options
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
    save_every: int,
    resume: bool,
    **changes: Any,
) -> None:
    """Train a network on the cached data set.

    A small folder of pictures gets more epochs than the recipe says, 200 steps in all. A finished
    run of the same name is set aside in its folder's previous/, one only: --run gives another name.

    \b
    Example:
      pipeline train
      pipeline train --recipe baseline --run yardstick --resume
    """
    from pipeline.training.run import recorded_config
    from pipeline.training.run import train_run as train

    paths = paths_of(settings, run=run or model_name(dataset))
    wanted = recipe_named(recipe, dataset, **changes)
    if changes["epochs"] is None:
        wanted = replace(wanted, epochs=enough_epochs(wanted, dataset, paths.data(dataset)))
    config = TrainConfig(recipe, wanted, dataset, seed, device, compiled)
    source_of = click.get_current_context().get_parameter_source
    deciding = ("recipe", "seed", "device", "compiled", *changes)
    if resume and all(source_of(name) == ParameterSource.DEFAULT for name in deciding):
        config = recorded_config(paths) or config
    # Hundreds of short epochs do not need one line each.
    on_epoch = settings.say if config.settings.epochs <= 50 else settings.update
    options = "" if paths.run == MODEL_NAMES["mnist"] else f" --run {paths.run}"
    try:
        done = train(paths, config, resume, settings.say, on_epoch, settings.update, save_every)
    except KeyboardInterrupt:
        if paths.checkpoint.exists():
            settings.say(f"next: pipeline train{options} --resume")
        raise
    text = Lines(
        f"test accuracy {done.test_accuracy:.2%} after {done.train_seconds:.1f} s of training "
        f"({done.parameters:,} parameters, {done.device})",
        f"wrote {paths.weights}",
    )
    settings.result(asdict(done), text, f"pipeline export{options}")

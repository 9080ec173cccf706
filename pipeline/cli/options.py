"""Types of options, and the options and decorators that several commands share."""

import difflib
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pipeline.core.errors import PipelineError
from pipeline.core.paths import FOLDER, NAME_RULE, TAKEN, data_name, is_name
from pipeline.data.catalog import DATASETS, DEFAULT_DATASET

# Types of options and arguments.
path_type = click.Path(path_type=Path)
file_type = click.Path(path_type=Path, dir_okay=False)
folder_type = click.Path(path_type=Path, file_okay=False)
seconds_type = click.FloatRange(min=0, min_open=True)
count_type = click.IntRange(1)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class DatasetType(click.ParamType):  # type: ignore[type-arg]  # Click 8.2 takes none
    """The type of a data set's name: one of the catalog, or `folder:` and a path, made absolute."""

    name = "dataset"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(DATASETS)}|{FOLDER}PATH]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in DATASETS:
            return value
        if not value.startswith(FOLDER):
            close = difflib.get_close_matches(value, DATASETS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            valid = f"{', '.join(map(repr, DATASETS))}, or {FOLDER}PATH for a folder of pictures"
            self.fail(f"{value!r} is not one of {valid}.{hint}", param, ctx)
        path = value.removeprefix(FOLDER)
        if not path:
            self.fail(f"{value!r} has no path: write {FOLDER}PATH", param, ctx)
        # Not resolved: a link gives a folder another name.
        dataset = FOLDER + os.path.abspath(os.path.expanduser(path))
        name = data_name(dataset)
        fix = "rename the folder, or link to it under another name (ln -s)"
        if not is_name(name):
            self.fail(f"the folder's name {name!r} is not valid ({NAME_RULE}): {fix}", param, ctx)
        if name in {*DATASETS, *TAKEN}:
            self.fail(f"the folder's name {name!r} is reserved: {fix}", param, ctx)
        return dataset


class UrlType(click.ParamType):  # type: ignore[type-arg]  # Click 8.2 takes none
    """The type of a server's URL, as a client accepts it."""

    name = "url"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from pipeline.client.endpoint import endpoint

        try:
            endpoint(value)
        except PipelineError as error:
            self.fail(str(error), param, ctx)
        return value


def explain_missing(error: ModuleNotFoundError, extra: str) -> PipelineError:
    """Return the error for a command whose optional packages are not installed."""
    message = f"{error.name} is missing: run pip install '.[{extra}]' in the project's folder"
    return PipelineError(message)


name_option = click.option("--name", help="Name of the model.  [default: handwriting]")
dataset_option = click.option(
    "--dataset",
    type=DatasetType(),
    default=DEFAULT_DATASET,
    help="Data set, or a folder with a folder of pictures for each class.",
)
prediction_log_option = click.option(
    "--prediction-log", type=path_type, help="File to append predictions to, for 'pipeline drift'."
)


def settings_options(settings: type, **types: Any) -> Decorator:
    """Return a decorator that adds an option for each field of a settings class with a help text.

    An option's default and choices are the field's; `types` gives option types, by the field's
    name, that its own type does not tell.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(fields(settings)):
            if "help" not in setting.metadata:
                continue
            choices = setting.metadata.get("choices")
            kinds = {int: count_type, int | None: count_type, float: seconds_type}
            kind = click.Choice(choices) if choices else types.get(setting.name)
            command = click.option(
                f"--{setting.metadata.get('option', setting.name.replace('_', '-'))}",
                setting.name,
                type=kind or kinds.get(setting.type),
                multiple=setting.type == tuple[str, ...],
                default=setting.default,
                show_default=setting.default not in ((), ""),
                metavar=setting.metadata.get("metavar"),
                help=setting.metadata["help"],
            )(command)
        return command

    return add

"""Types of options, and the options and decorators that several commands share."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from pipeline.core.errors import PipelineError
from pipeline.core.paths import FOLDER, JOINED, NAME_RULE, TAKEN, data_name, is_name, list_names
from pipeline.data.catalog import DATASETS, DEFAULT_DATASET

# Types of options and arguments.
path_type = click.Path(path_type=Path)
file_type = click.Path(path_type=Path, dir_okay=False)
folder_type = click.Path(path_type=Path, file_okay=False)
count_type = click.IntRange(1)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Number(click.FloatRange):
    """The type of a number in a range; NaN is in no range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is not a number", param, ctx)
        return number


seconds_type = Number(min=0, min_open=True)


def parse_dataset(value: str) -> str:
    """Parse a data set's name: one of the catalog, or a prefix and a path, made absolute."""
    if value in DATASETS:
        return value
    prefix = JOINED if value.startswith(JOINED) else FOLDER
    path = value.removeprefix(prefix)
    if not path or path == value:
        valid = list_names(value, [*DATASETS, f"{FOLDER}PATH", f"{JOINED}PATH"])
        fix = f"{FOLDER}PATH is a folder of pictures"
        raise click.BadParameter(f"{value!r} is not a data set: {fix}; {valid}")
    # Not resolved: a link gives a folder another name.
    dataset = prefix + os.path.abspath(os.path.expanduser(path))
    name = data_name(dataset)
    fix = "rename the folder, or link to it under another name (ln -s)"
    if not is_name(name):
        raise click.BadParameter(f"the folder's name {name!r} is not valid ({NAME_RULE}): {fix}")
    if name in {*DATASETS, *TAKEN}:
        raise click.BadParameter(f"the folder's name {name!r} is reserved: {fix}")
    return dataset


def parse_url(value: str) -> str:
    """Check a server's URL as a client does."""
    from pipeline.client.endpoint import endpoint

    try:
        endpoint(value)
    except PipelineError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _parse_headers(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if not all(equals for _, equals, _ in pairs):
        raise click.BadParameter("the format is NAME=VALUE")
    return {name: value for name, _, value in pairs}


def connection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a secure connection, and of the headers to send with each request."""
    ca = "PEM file of the authority (CA) that signed the server's certificate."
    key = "PEM file of the client certificate's private key."
    header = "Header to send with each request, such as a key; repeatable."
    for option in (
        click.option(
            "--header", multiple=True, metavar="NAME=VALUE", callback=_parse_headers, help=header
        ),
        click.option("--key", type=path_type, help=key),
        click.option(
            "--certificate", type=path_type, help="PEM file of the client certificate, for TLS."
        ),
        click.option("--ca", type=path_type, help=ca),
    ):
        command = option(command)
    return command


name_option = click.option("--name", help="Name of the model.  [default: handwriting]")
dataset_option = click.option(
    "--dataset",
    type=parse_dataset,
    metavar=f"[{'|'.join(DATASETS)}|{FOLDER}PATH|{JOINED}PATH]",
    default=DEFAULT_DATASET,
    help="Data set, folder with a folder of pictures for each class, or MNIST and such a folder.",
)
log_option = click.option(
    "--prediction-log", type=path_type, help="File to append predictions to, for 'pipeline drift'."
)


def settings_options(
    settings: type, base: tuple[str, Any] | None = None, **types: Any
) -> Decorator:
    """Return a decorator that adds an option for each field of a settings class with a help text.

    An option's default, choices, limits and unit are the field's; `types` gives option types, by
    the field's name, that the field does not tell. With a `base`, settings and their name, no
    option has a default: the help texts show the base's values.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for item in reversed(fields(settings)):
            hints, name = item.metadata, item.name.replace("_", "-")
            if "help" not in hints:
                continue
            text, default, kind = hints["help"], item.default, types.get(item.name)
            if "choices" in hints:
                kind = click.Choice(hints["choices"])
            elif kind is None and "limits" in hints:
                number = Number if item.type is float else click.IntRange
                kind = number(**asdict(hints["limits"]))
            elif hints.get("unit") == "DIR":
                kind = click.Path(file_okay=False)
            if base:
                value = getattr(base[1], item.name)
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                text, default = f"{text}  [{base[0]}: {shown}]", None
            command = click.option(
                f"--{name}/--no-{name}" if item.type is bool else f"--{hints.get('option', name)}",
                item.name,
                type=kind,
                multiple=item.type == tuple[str, ...],
                default=default,
                show_default=default is not False and default not in ((), ""),
                metavar=hints.get("unit"),
                help=text,
            )(command)
        return command

    return add

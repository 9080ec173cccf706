"""The common part of all commands: options, output, and how errors become exit codes."""

import contextlib
import difflib
import errno
import json
import os
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from pipeline.core.errors import LostError, PipelineError
from pipeline.core.files import read_json
from pipeline.core.paths import (
    FOLDER,
    MODEL_NAMES,
    NAME_RULE,
    TAKEN,
    Paths,
    data_name,
    is_name,
    model_name,
    require_printable,
)
from pipeline.core.text import Lines, escape
from pipeline.data.catalog import DATASETS, DEFAULT_DATASET

BUG, INTERRUPTED = 70, 130
# Errors of a path, named by the user, that cannot be used.
UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, or the user's quota on it
TERMINAL_SECONDS, LOG_SECONDS = 0.1, 10.0  # between two updates of a progress line


def echo(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print `text` with unprintable characters escaped; only `Lines` have line breaks."""
    click.echo(escape(text), err=err, nl=nl)


@dataclass
class Settings:
    """The values of the options that all commands accept."""

    root: Path = Path()
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    # Of the processes that torchrun starts, only the first one prints.
    silent: bool = field(default_factory=lambda: os.environ.get("RANK", "0") != "0")
    updated: float = field(default_factory=time.monotonic)  # when progress was last shown

    def say(self, line: object) -> None:
        """Print a line of progress on standard error."""
        if not (self.quiet or self.silent):
            self.clear()
            echo(line, err=True)

    def update(self, line: object) -> None:
        """Print progress that the next line replaces; to a file or a pipe, a line every 10 s."""
        is_terminal, now = sys.stderr.isatty(), time.monotonic()
        pause = TERMINAL_SECONDS if is_terminal else LOG_SECONDS
        if self.quiet or self.silent or now - self.updated < pause:
            return
        self.updated = now
        self.clear()
        echo(line, err=True, nl=not is_terminal)

    def result(self, record: Mapping[str, Any], text: object, then: str = "") -> None:
        """Print the result on standard output: one JSON object, or text and the next command."""
        if self.silent:
            return
        self.clear()
        if self.json:
            echo(json.dumps(record, default=str))
            return
        echo(text)
        if then:
            echo(f"next: {then}")

    def clear(self) -> None:
        """Erase the line of progress that a terminal shows."""
        if sys.stderr.isatty():
            click.echo("\r\x1b[K", err=True, nl=False)


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value and parameter.name:
        setattr(context.ensure_object(Settings), parameter.name, value)


def _load_config(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    """Read defaults from a TOML file: one table per command, with its options as keys."""
    if value is None:
        return
    try:
        tables = tomllib.loads(value.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PipelineError(f"cannot read the settings in {value}: {error}") from error
    _check_tables(tables, context.find_root().command, value)
    for key in context.command_path.split()[1:]:
        tables = tables.get(key, {})
    context.default_map = {**(context.default_map or {}), **tables}


def _check_tables(tables: Mapping[str, Any], command: click.Command, file: Path) -> None:
    """Raise PipelineError for a key that no command or option has, so that no typo is ignored."""
    options = {parameter.name for parameter in command.params}
    commands = command.commands if isinstance(command, click.Group) else {}
    for key, value in tables.items():
        if isinstance(value, dict) and key in commands:
            _check_tables(value, commands[key], file)
        elif key not in options:
            known = ", ".join(sorted({*map(str, options), *commands} - {"config"}))
            raise PipelineError(f"{file} sets {key!r}, which is unknown here; there are: {known}")


def settings_options(
    settings: type, **types: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds an option for each field of a settings class with a help text.

    An option's default and choices are the field's; `types` gives option types, by the field's
    name, that its own type does not tell.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(fields(settings)):
            if "help" not in setting.metadata:
                continue
            choices, is_many = setting.metadata.get("choices"), setting.type == tuple[str, ...]
            kinds = {int: click.IntRange(1), int | None: click.IntRange(1), float: seconds_type}
            kind = click.Choice(choices) if choices else types.get(setting.name)
            command = click.option(
                f"--{setting.metadata.get('option', setting.name.replace('_', '-'))}",
                setting.name,
                type=kind or kinds.get(setting.type),
                multiple=is_many,
                default=() if is_many else setting.default,
                show_default=not is_many and setting.default is not None,
                metavar=setting.metadata.get("metavar"),
                help=setting.metadata["help"] or None,
            )(command)
        return command

    return add


class Command(click.Command):
    """A command that accepts the common options after its name, and no empty values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        def add(*names: str, callback: Any = _store, **settings: Any) -> None:
            option = click.Option(names, expose_value=False, callback=callback, **settings)
            self.params.append(option)

        file = click.Path(path_type=Path, dir_okay=False)
        folder = click.Path(path_type=Path, file_okay=False)
        where = "The project's folder.  [default: the current one]"
        defaults = "Take defaults from a TOML file."
        add("--config", type=file, is_eager=True, callback=_load_config, help=defaults)
        add("--root", type=folder, help=where)
        add("--json", is_flag=True, help="Print the result as JSON.")
        add("-q", "--quiet", is_flag=True, help="No progress on standard error.")
        add("-v", "--verbose", is_flag=True, help="More progress on standard error.")
        add("--debug", is_flag=True, help="Show the traceback of an error as well.")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as Click does, but raise BadParameter for an empty value, as from $UNSET."""
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        for parameter in order:
            value = given.get(str(parameter.name))
            if "" in (value if isinstance(value, list | tuple) else [value]):
                raise click.BadParameter("the value is empty", ctx, parameter)
        return super().parse_args(ctx, args)


class Group(Command, click.Group):
    """A group of commands; the only place where errors become exit codes."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; never returns when Click is in standalone mode."""
        try:
            return super().main(*args, **{"obj": Settings(), **kwargs})
        except Exception as error:
            # Click passes on exceptions that it does not know: any of these is a bug of ours.
            _echo_traceback(error)
            add = "the lines above, the command, and what 'pipeline --version' prints"
            echo(f"This is a bug of ours. Please report it with {add}.", err=True)
            sys.exit(BUG)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Make the context as Click does, with our errors turned into Click's."""
        with _exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command as Click does, with our errors turned into Click's."""
        with _exit_codes(ctx):
            return super().invoke(ctx)


def _echo_traceback(error: BaseException) -> None:
    """Print a traceback, indented, so that no line of a message in it looks like one of ours."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    echo(Lines(*(f"  {line}" for line in lines)), err=True)


@contextlib.contextmanager
def _exit_codes(context: click.Context | None = None) -> Iterator[None]:
    """Turn the user's errors into Click's, with their exit codes and escaped messages."""
    settings = context.ensure_object(Settings) if context else Settings()
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # its message is our help
        raise
    except click.ClickException as error:
        error.message = escape(error.message)  # type: ignore[misc]  # Click prints it
        raise
    except (PipelineError, OSError, ModuleNotFoundError) as error:
        message = _message_of(error)
        if message is None:  # a bug
            raise
        settings.clear()
        is_ours = isinstance(error, PipelineError)
        exit_code = error.exit_code if isinstance(error, PipelineError) else 1
        if settings.silent and is_ours and not isinstance(error, LostError):
            sys.exit(exit_code)  # the first process prints it
        if settings.debug:
            _echo_traceback(error)
        failure = click.ClickException(escape(message))
        failure.exit_code = exit_code  # type: ignore[misc]  # Click reads it per instance
        raise failure from error
    except KeyboardInterrupt:
        echo("interrupted", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


def _message_of(error: PipelineError | OSError | ModuleNotFoundError) -> str | None:
    """Return the message that explains an error to the user; None if it is a bug of ours."""
    if isinstance(error, PipelineError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "pipeline").partition(".")[0] == "pipeline":
            return None
        return (
            f"this needs {error.name}, which is not installed beside {sys.executable}: asking a "
            "server takes less than the rest does. In the project's folder: 'make .venv', then use "
            ".venv/bin/pipeline"
        )
    if error.errno in UNUSABLE:
        problem = f"cannot use {error.filename} ({error.strerror})"
        return f"{problem}: check its rights and what lies there"
    if error.errno not in FULL:
        return None
    try:
        sys.stdout.flush()
    except OSError:  # drop what the disk did not take, or Python tries again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    what = f"cannot write {error.filename}" if error.filename else "cannot write"
    return f"{what} ({error.strerror}): make room, or write elsewhere"


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
            meant = f" Did you mean {close[0]!r}?" if close else ""
            known = f"{', '.join(map(repr, DATASETS))}, or {FOLDER}PATH for a folder of pictures"
            self.fail(f"{value!r} is not one of {known}.{meant}", param, ctx)
        path = value.removeprefix(FOLDER)
        if not path:
            self.fail(f"no path follows {value!r}: write {FOLDER}PATH", param, ctx)
        # Not resolved: a link gives a folder another name.
        dataset = FOLDER + os.path.abspath(os.path.expanduser(path))
        name = data_name(dataset)
        if not is_name(name) or name in {*DATASETS, *TAKEN}:
            why = (
                f"{name!r} is taken"
                if is_name(name)
                else f"{name!r} is not a valid name: use {NAME_RULE}"
            )
            self.fail(
                f"the model is called as the folder, and {why}. Rename the folder, or make a link "
                "to it under another name (ln -s)",
                param,
                ctx,
            )
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


seconds_type = click.FloatRange(min=0, min_open=True)

dataset_option = click.option(
    "--dataset", type=DatasetType(), default=DEFAULT_DATASET, show_default=True
)
name_option = click.option("--name", help="The model's name.  [default: handwriting]")

prediction_log_option = click.option(
    "--prediction-log",
    type=click.Path(path_type=Path),
    help="Append what is answered to this file, for 'pipeline drift': no images, no file names.",
)


def paths_of(settings: Settings, name: str | None = None, run: str | None = None) -> Paths:
    """Return the paths of a model; its run has the same name unless `run` is given."""
    require_printable(settings.root)
    named = MODEL_NAMES["mnist"] if name is None else name
    return Paths(settings.root, name=named, run=run or named)


def name_of_run(paths: Paths) -> str:
    """Return the name of the model of the run's data set."""
    if not paths.run_config.exists():
        return paths.name
    dataset = str(read_json(paths.run_config, "run 'pipeline train' again").get("dataset"))
    return model_name(dataset)


def named(paths: Paths) -> str:
    """Return the --name option that a next command needs for the same model, or nothing."""
    return "" if paths.name == MODEL_NAMES["mnist"] else f" --name {paths.name}"

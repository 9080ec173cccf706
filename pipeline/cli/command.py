"""The common part of all commands: options, output, and how errors become exit codes."""

import contextlib
import errno
import functools
import io
import json
import os
import shutil
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import file_type, folder_type, name_option
from pipeline.core.errors import LostError, PipelineError
from pipeline.core.files import FULL, read_json
from pipeline.core.paths import Paths, format_make, list_names, model_name, require_printable
from pipeline.core.text import Lines, escape

BUG, INTERRUPTED = 70, 130
# The extra of pyproject.toml that brings what a command needs; for all others it is train.
EXTRAS = {"report": "report", "score": "batch", "web": "web"}
OPTIONAL = (  # modules that come with an extra
    *("h11", "jinja2", "markupsafe", "matplotlib", "onnxruntime", "onnxscript", "pooch", "torch"),
    *("prometheus_client", "psutil", "pyarrow", "ray", "safetensors", "starlette", "uvicorn"),
)
# Errors of a path, named by the user, that cannot be used.
UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
# Between two updates of a progress line.
TERMINAL_SECONDS, VERBOSE_SECONDS, LOG_SECONDS = 0.1, 1.0, 10.0


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
        """Print progress that the next line replaces; to a file or a pipe, a line every 10 s.

        With --verbose, each line stays, and there is one every second.
        """
        is_terminal, now = sys.stderr.isatty() and not self.verbose, time.monotonic()
        pause = TERMINAL_SECONDS if is_terminal else LOG_SECONDS
        pause = VERBOSE_SECONDS if self.verbose else pause
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
        program = sys.argv[0]  # as it was typed: it may be in no folder of the PATH
        if Path(program).name == "pipeline" and not shutil.which("pipeline"):
            then = then.replace("pipeline ", f"{program} ")
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
        tables = tomllib.loads(value.read_text("utf-8"))
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
            valid = ", ".join(sorted({*map(str, options), *commands} - {"config"}))
            raise PipelineError(f"{file} sets {key!r}, which is unknown here. Valid keys: {valid}")


class Command(click.Command):
    """A command that accepts the common options after its name, and no empty values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.short_help = self.get_short_help_str(1000)  # Click's default cuts it at 45 characters

        def add(*names: str, callback: Any = _store, **settings: Any) -> None:
            option = click.Option(names, expose_value=False, callback=callback, **settings)
            self.params.append(option)

        config, root = "TOML file with defaults for options.", "Project folder.  [default: .]"
        add("--config", type=file_type, is_eager=True, callback=_load_config, help=config)
        add("--root", type=folder_type, help=root)
        add("--json", is_flag=True, help="Print the result as JSON.")
        add("-q", "--quiet", is_flag=True, help="Print no progress on standard error.")
        add("-v", "--verbose", is_flag=True, help="Keep each line of progress, one a second.")
        add("--debug", is_flag=True, help="Print the traceback of an error, too.")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as Click does, but raise BadParameter for an empty value, as from $UNSET."""
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.ensure_object(Settings).verbose |= "verbose" in given  # --version comes before it
        for parameter in order:
            value = given.get(str(parameter.name))
            if "" in (value if isinstance(value, list | tuple) else [value]):
                raise click.BadParameter("the value is empty", ctx, parameter)
        return super().parse_args(ctx, args)


class Group(Command, click.Group):
    """A group of commands; the only place where errors become exit codes."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of work, in which they were added."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; never returns when Click is in standalone mode."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # on Windows a pipe takes few characters
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **{"obj": Settings(), **kwargs})
        except Exception as error:
            # Click passes on exceptions that it does not know: any of these is a bug of ours.
            _echo_traceback(error)
            report = "the lines above, the command and the output of 'pipeline --version -v'"
            echo(f"This is a bug in pipeline. Please report it with {report}.", err=True)
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
        message = _message_of(error, str(context and context.invoked_subcommand))
        if message is None:  # a bug
            raise
        settings.clear()
        failure = click.ClickException(escape(message))
        if isinstance(error, PipelineError):
            failure.exit_code = error.exit_code  # type: ignore[misc]  # Click reads it per instance
            if settings.silent and not isinstance(error, LostError):
                sys.exit(error.exit_code)  # the first process prints it
        if settings.debug:
            _echo_traceback(error)
        raise failure from error
    except KeyboardInterrupt:
        echo("interrupted", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


def _message_of(error: PipelineError | OSError | ModuleNotFoundError, command: str) -> str | None:
    """Return the message that explains a command's error; None if it is a bug of ours."""
    if isinstance(error, PipelineError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "pipeline").partition(".")[0]
        if module == "pipeline":
            return None
        extra = f"[{EXTRAS.get(command, 'train')}]" if module in OPTIONAL else ""
        line = f"\"pip install 'handwriting-pipeline{extra}'\" (in a clone: {format_make('.venv')})"
        return f"{module} is not installed for {sys.executable}: run {line}"
    if error.errno in UNUSABLE:
        return f"cannot use {error.filename} ({error.strerror}): check its permissions and type"
    if error.errno not in FULL:
        return None
    try:
        sys.stdout.flush()
    except OSError:  # drop what the disk did not take, or Python tries again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    file = f" {error.filename}" if error.filename else ""
    return f"cannot write{file} ({error.strerror}): free some space, or write elsewhere"


def paths_of(settings: Settings, name: str | None = None, run: str | None = None) -> Paths:
    """Return the paths of a model; its run has the same name unless `run` is given."""
    require_printable(settings.root)
    name = Paths.name if name is None else name
    return Paths(settings.root, name=name, run=run or name)


def next_of_packaged(paths: Paths) -> str:
    """Return the next command for a packaged model: it depends on what the server serves now."""
    from pipeline.repository.running import find_running

    server = None
    with contextlib.suppress(PipelineError):  # a damaged record: 'pipeline serve' explains it
        server = find_running(paths)
    if server is None:
        return "pipeline serve --detach"
    asking = f"pipeline query{paths.name_option} IMAGE, pipeline web{paths.name_option}"
    return asking if paths.name in server.models else "pipeline serve restart"


def require_model(paths: Paths) -> None:
    """Raise PipelineError, with the names that exist, unless the model is exported or packaged."""
    names = paths.find_models()
    if paths.name not in names:
        elsewhere = "" if names else ". Go to the project's folder, or name it with --root"
        choices = f"{list_names(paths.name, names)}{elsewhere}"
        raise PipelineError(f"there is no model {paths.name!r} here: {choices}")


def read_model_name(paths: Paths) -> str:
    """Return the name of the model of the run's data set."""
    if not paths.run_config.exists():
        return paths.name
    dataset = str(read_json(paths.run_config, "run 'pipeline train' again").get("dataset"))
    return model_name(dataset)


def pass_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option --name, and call the command with the common options and the model's paths."""

    @name_option
    @click.pass_obj
    @functools.wraps(command)
    def call(settings: Settings, /, name: str | None, **options: Any) -> Any:
        paths = paths_of(settings, name)
        if name and not (options.get("url") or options.get("reference")):
            require_model(paths)
        return command(settings, paths, **options)

    return call

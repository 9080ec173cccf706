"""The commands around a running server."""

import shlex
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.command import Group, Settings, echo, paths_of
from pipeline.core.errors import CheckFailedError, ServerError
from pipeline.core.paths import MODEL_NAMES, Paths
from pipeline.core.text import Lines
from pipeline.serving.settings import ServeConfig

if TYPE_CHECKING:
    from pipeline.serving.serve import Server


def _is_free(context: click.Context, parameter: click.Parameter, value: str | None) -> bool:
    """Whether free ports are to be taken: one number cannot say where three services listen."""
    if value not in (None, "auto", "0"):
        raise click.BadParameter(
            f"{value!r} is one port and a server takes three: choose them with --http-port, "
            "--grpc-port and --metrics-port, or take free ones with --port auto"
        )
    return value is not None


@click.group(cls=Group, invoke_without_command=True)
@click.option("--http-port", type=int, default=ServeConfig.http_port, show_default=True)
@click.option("--grpc-port", type=int, default=ServeConfig.grpc_port, show_default=True)
@click.option("--metrics-port", type=int, default=ServeConfig.metrics_port, show_default=True)
@click.option(
    "--port", metavar="auto", callback=_is_free, help="auto or 0: three ports that are free."
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "path", "wheel", "docker"]),
    default=ServeConfig.runtime,
    show_default=True,
)
@click.option("--profile", default=ServeConfig.profile, help="One of configs/: cpu, latency, ...")
@click.option("--start-seconds", default=ServeConfig.start_seconds, show_default=True)
@click.option("--detach", is_flag=True, help="Return once it is ready, and let it run.")
@click.pass_context
def serve(context: click.Context, /, port: bool, detach: bool, **changes: Any) -> None:
    """Serve the model repository with a real tritonserver.

    On loopback, until Ctrl-C; ready when it answers its golden sets rightly.

    \b
    Example:
      pipeline serve --detach
      pipeline serve --profile throughput
      pipeline serve status
      pipeline serve stop
    """
    if context.invoked_subcommand:
        return
    from pipeline.serving import supervise
    from pipeline.serving.serve import with_free_ports

    settings = context.ensure_object(Settings)
    paths, config = paths_of(settings), ServeConfig(**changes)
    config = with_free_ports(config) if port else config

    if detach:
        echo_server(settings, supervise.detach(paths, config))
    else:
        supervise.serve_repository(paths, config, partial(echo_server, settings), settings.say)


def echo_server(settings: Settings, server: "Server") -> None:
    """Say where a server answers, without its admin key."""
    record = {key: value for key, value in asdict(server).items() if key != "admin_key"}
    models = ", ".join(f"{name} version {n}" for name, n in server.models.items())
    lines = [f"serving {models} at {server.http_url} and {server.grpc_url} (pid {server.pid})"]
    for name in [*server.models][:1]:
        lines += _ways_to_ask(paths_of(settings, name), server)
    settings.result(record, Lines(*lines), "pipeline query IMAGE..., pipeline serve stop")


def _ways_to_ask(paths: Paths, server: "Server") -> list[str]:
    """How to ask for a model: with a digit by curl if it has one, with a picture from Python."""
    from pipeline.repository import config_pbtxt

    ways, config = _by_curl(paths, server), config_pbtxt.profile_file(paths.packaged)
    if not config.exists() or config_pbtxt.pictures(config_pbtxt.read(config)) == "arrays":
        return ways
    name = "" if paths.name == MODEL_NAMES["mnist"] else f", '{paths.name}'"
    return [
        *ways,
        'or: python -c "from pipeline.client import Client; '
        f"print(Client('{server.grpc_url}'{name}).classify('IMAGE'))\"",
    ]


def _by_curl(paths: Paths, server: "Server") -> list[str]:
    """How to ask for a model without anything of ours; nothing where it has no digit."""
    digit, labels = paths.packaged / "warmup" / "digit", paths.packaged / "labels.txt"
    if not (digit.exists() and labels.exists()):
        return []
    size = 4 * len(labels.read_text().splitlines())  # bytes of the answer: a float for each class
    return [
        f"ask it: curl -s --data-binary {shlex.quote(f'@{digit}')} "
        f"-H 'Inference-Header-Content-Length: 0' {server.http_url}/v2/models/{paths.name}/infer "
        f"| tail -c {size} | od -A n -t f4"
    ]


@serve.command("status")
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
@click.pass_obj
def status_command(settings: Settings, watch: bool) -> None:
    """Say whether our server runs and answers rightly, by asking it, and what it has done.

    \b
    Example:
      pipeline serve status
      pipeline serve status --watch
    """
    from pipeline.serving.state import State, status

    paths = paths_of(settings)
    while watch:
        try:
            state: object = status(paths)
        except (ServerError, CheckFailedError) as error:  # it may come again
            state = error
        click.clear()  # of a terminal; else it does nothing
        record = state.record() if isinstance(state, State) else {"error": str(state)}
        settings.result(record, state)
        time.sleep(1.0)
    state = status(paths)
    settings.result(state.record(), state)


@serve.command("logs")
@click.option("--lines", default=50, show_default=True, type=click.IntRange(0))
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.pass_obj
def logs_command(settings: Settings, lines: int, follow: bool) -> None:
    """Show the last lines of the supervisor's log and of tritonserver's.

    \b
    Example:
      pipeline serve logs --follow
    """
    from pipeline.serving import state

    paths = paths_of(settings)
    found = state.logs(paths, lines)
    settings.result({"lines": found}, Lines(*found))
    for line in state.follow(paths) if follow else ():
        echo(line)


@serve.command("restart")
@click.pass_obj
def restart_command(settings: Settings) -> None:
    """Drain our server and start it anew, with what the repository selects now.

    \b
    Example:
      pipeline serve restart
    """
    from pipeline.serving.supervise import restart

    echo_server(settings, restart(paths_of(settings)))


@serve.command("stop")
@click.pass_obj
def stop_command(settings: Settings) -> None:
    """Stop our server, or clear what a killed one left.

    \b
    Example:
      pipeline serve stop
    """
    from pipeline.serving.supervise import stop

    done = stop(paths_of(settings))
    settings.result({"done": done}, done)

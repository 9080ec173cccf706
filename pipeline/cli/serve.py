"""The commands that serve, and that manage a running server."""

import math
import shlex
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.command import Group, Settings, echo, next_of_packaged, paths_of
from pipeline.cli.options import settings_options
from pipeline.core.errors import CheckFailedError, ServerError
from pipeline.core.paths import Paths
from pipeline.core.text import Lines
from pipeline.serving.settings import ServeConfig

if TYPE_CHECKING:
    from pipeline.repository.running import Server


def _parse_port(context: click.Context, parameter: click.Parameter, value: str | None) -> bool:
    """Return whether to take free ports; raise BadParameter for a number: three are needed."""
    if value not in (None, "auto", "0"):
        message = f"{value!r} is not auto or 0: use --http-port, --grpc-port and --metrics-port"
        raise click.BadParameter(message)
    return value is not None


@click.group(cls=Group, invoke_without_command=True)
@settings_options(ServeConfig)
@click.option("--port", metavar="auto", callback=_parse_port, help="auto or 0: three free ports.")
@click.option("--detach", is_flag=True, help="Return when the server is ready; keep it running.")
@click.pass_context
def serve(context: click.Context, /, port: bool, detach: bool, **changes: Any) -> None:
    """Serve the model repository with tritonserver, until Ctrl-C.

    Listens on 127.0.0.1. Ready when it answers the golden set of each model correctly.

    \b
    Example:
      pipeline serve --detach
      pipeline serve --profile throughput
      pipeline serve status
      pipeline serve stop
    """
    from pipeline.serving.tritonserver import require_linux

    require_linux()
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
    """Print a server's addresses, without its admin key, and how to ask its first model."""
    from pipeline.repository import config_pbtxt

    record = {key: value for key, value in asdict(server).items() if key != "admin_key"}
    models = ", ".join(f"{name} version {n}" for name, n in server.models.items())
    lines = [f"serving {models} at {server.http_url} and {server.grpc_url} (pid {server.pid})"]
    for name in [*server.models][:1]:
        packaged = paths_of(settings, name).packaged
        digit, file = packaged / "warmup" / "digit", config_pbtxt.profile_file(packaged)
        config = config_pbtxt.read(file) if file.exists() else None
        if digit.exists() and config:
            size = 4 * math.prod(config.output[0].dims)  # bytes of the answer: float32
            lines.append(
                f"try: curl -s --data-binary {shlex.quote(f'@{digit}')} "
                f"-H 'Inference-Header-Content-Length: 0' {server.http_url}/v2/models/{name}/infer "
                f"| tail -c {size} | od -A n -t f4"
            )
        if config and config_pbtxt.pictures(config) != "arrays":
            argument = "" if name == Paths.name else f", '{name}'"
            lines.append(
                'or: python -c "from pipeline.client import Client; '
                f"print(Client('{server.grpc_url}'{argument}).classify('IMAGE'))\""
            )
    then = next_of_packaged(paths_of(settings, next(iter(server.models))))
    settings.result(record, Lines(*lines), f"{then}, pipeline serve stop")


@serve.command("status")
@click.option("--watch", is_flag=True, help="Repeat every second, until Ctrl-C.")
@click.pass_obj
def status_command(settings: Settings, watch: bool) -> None:
    """Show whether the server runs and answers correctly, and its statistics.

    \b
    Example:
      pipeline serve status
      pipeline serve status --watch
    """
    from pipeline.serving.state import check_status

    paths = paths_of(settings)
    while watch:
        try:
            state = check_status(paths)
            result: tuple[dict[str, Any], object] = state.record(), state
        except (ServerError, CheckFailedError) as error:  # it may come back
            result = {"error": str(error)}, error
        click.clear()  # only a terminal; otherwise this does nothing
        settings.result(*result)
        time.sleep(1.0)
    state = check_status(paths)
    settings.result(state.record(), state)


@serve.command("logs")
@click.option("--lines", default=50, type=click.IntRange(0), help="Lines to show of each log.")
@click.option(
    "--follow", is_flag=True, help="After that, show new lines of tritonserver's log, until Ctrl-C."
)
@click.pass_obj
def logs_command(settings: Settings, lines: int, follow: bool) -> None:
    """Show the last lines of the logs of the supervisor and of tritonserver.

    \b
    Example:
      pipeline serve logs --follow
    """
    from pipeline.serving import state

    paths = paths_of(settings)
    last = state.read_logs(paths, lines)
    settings.result({"lines": last}, Lines(*last))
    for line in state.follow_log(paths) if follow else ():
        echo(line)


@serve.command("restart")
@click.pass_obj
def restart_command(settings: Settings) -> None:
    """Restart the server with the versions that the repository selects now.

    It first answers the requests that it has accepted.

    \b
    Example:
      pipeline serve restart
    """
    from pipeline.serving.supervise import restart

    echo_server(settings, restart(paths_of(settings)))


@serve.command("stop")
@click.pass_obj
def stop_command(settings: Settings) -> None:
    """Stop the server, or remove what a killed server left.

    \b
    Example:
      pipeline serve stop
    """
    from pipeline.serving.supervise import stop

    message = stop(paths_of(settings))
    settings.result({"done": message}, message)

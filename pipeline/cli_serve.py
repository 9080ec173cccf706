"""The commands around a running server."""

from dataclasses import asdict
from typing import Any

import click

from pipeline.command import Group, Settings, paths_of
from pipeline.config import ServeConfig


@click.group(cls=Group, invoke_without_command=True)
@click.option("--http-port", type=int, default=ServeConfig.http_port, show_default=True)
@click.option("--grpc-port", type=int, default=ServeConfig.grpc_port, show_default=True)
@click.option("--metrics-port", type=int, default=ServeConfig.metrics_port, show_default=True)
@click.option("--port", type=click.Choice(["auto"]), help="Take three free ports.")
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
def serve(context: click.Context, /, port: str | None, detach: bool, **changes: Any) -> None:
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
    from pipeline import supervise
    from pipeline.serve import Server, with_free_ports

    settings = context.ensure_object(Settings)
    paths, config = paths_of(settings), ServeConfig(**changes)
    config = with_free_ports(config) if port else config

    def echo(server: Server) -> None:
        record = {key: value for key, value in asdict(server).items() if key != "admin_key"}
        models = ", ".join(f"{name} version {n}" for name, n in server.models.items())
        text = f"serving {models} at {server.http_url} and {server.grpc_url} (pid {server.pid})"
        settings.result(record, text, "pipeline query IMAGE..., pipeline serve stop")

    if detach:
        echo(supervise.detach(paths, config))
    else:
        supervise.serve(paths, config, echo, settings.say)


@serve.command("status")
@click.pass_obj
def status_command(settings: Settings) -> None:
    """Say whether our server runs and answers rightly, by asking it.

    \b
    Example:
      pipeline serve status
    """
    from pipeline.supervise import status

    record = status(paths_of(settings))
    settings.result(record, "\n".join(f"{key}: {value}" for key, value in record.items()))


@serve.command("stop")
@click.pass_obj
def stop_command(settings: Settings) -> None:
    """Stop our server, or clear what a killed one left.

    \b
    Example:
      pipeline serve stop
    """
    from pipeline.supervise import stop

    done = stop(paths_of(settings))
    settings.result({"done": done}, done)

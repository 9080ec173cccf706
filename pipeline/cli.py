"""One thin command for each stage: parse, call, echo."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click

from pipeline import __doc__ as summary
from pipeline.cli_data import data_group
from pipeline.cli_measure import benchmark_command, gpu_check_command, report_command
from pipeline.cli_serve import serve
from pipeline.cli_train import train_command
from pipeline.command import Group, Settings, name_of_run, name_option, paths_of
from pipeline.config import (
    ExportConfig,
    PackageConfig,
)
from pipeline.errors import PipelineError
from pipeline.paths import MODEL_NAMES, Paths


@click.group(
    cls=Group,
    help=f"{summary}\n\n\b\nExample:\n  pipeline data fetch && pipeline train && pipeline export",
    context_settings={"auto_envvar_prefix": "HANDWRITING", "help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="handwriting-pipeline", prog_name="pipeline")
def main() -> None:
    """Replaced by the text above."""


main.add_command(data_group)
main.add_command(serve)
main.add_command(train_command)
main.add_command(report_command)
main.add_command(benchmark_command)
main.add_command(gpu_check_command)


@main.command()
@click.option("--run", help="The run to export.  [default: the name]")
@name_option
@click.option("--opset", default=ExportConfig.opset, show_default=True, hidden=True)
@click.pass_obj
def export_command(settings: Settings, run: str | None, name: str | None, opset: int) -> None:
    """Export a trained network through torch.export to one ONNX file.

    \b
    Example:
      pipeline export
    """
    from pipeline.export import export

    paths = paths_of(settings, name, run or name)
    paths = paths if name else replace(paths, name=name_of_run(paths))
    exported = export(paths, replace(ExportConfig(), opset=opset), settings.say)
    text = (
        f"wrote {exported.path} ({exported.size:,} bytes, opset {exported.opset}, "
        f"IR {exported.ir_version}, sha256 {exported.sha256[:12]})"
    )
    settings.result(asdict(exported), text, f"pipeline validate{_named(paths)}")


def _named(paths: Paths) -> str:
    return "" if paths.name == MODEL_NAMES["mnist"] else f" --name {paths.name}"


@main.command()
@click.argument("targets", nargs=-1, metavar="[FILE | REPOSITORY | URL...]")
@name_option
@click.option(
    "--golden",
    type=click.Path(path_type=Path),
    help="The golden set to put to a URL.  [default: the packaged version's]",
)
@click.option(
    "--timeout", default=60.0, show_default=True, help="Seconds a call to a URL may take."
)
@click.pass_obj
def validate_command(
    settings: Settings,
    targets: tuple[str, ...],
    name: str | None,
    golden: Path | None,
    timeout: float,
) -> None:
    """Prove an export, a model repository, or running servers.

    Without a target: the exported file in ONNX Runtime against eager PyTorch. With a REPOSITORY:
    served for the occasion, all runtimes against each other, each model or just the one of --name.
    With a URL: the golden set replayed, which needs neither torch nor the training data.

    \b
    Example:
      pipeline validate
      pipeline validate exported/model_repository
      pipeline validate http://127.0.0.1:8000 grpc://127.0.0.1:8001
    """
    paths = paths_of(settings, name)
    if not targets:
        _validate_export(settings, paths)
    elif len(targets) == 1 and Path(targets[0]).is_file():
        _validate_export(settings, _paths_of(Path(targets[0])))
    elif all("://" in target for target in targets):
        from pipeline.replay import prove_servers

        table = prove_servers(paths, targets, golden, timeout)
        settings.result(asdict(table), f"{table}\nwrote {paths.replay}")
    elif len(targets) == 1:
        _validate_repository(settings, replace(paths, repository_folder=Path(targets[0])), name)
    else:
        raise click.UsageError("give one repository, or one or more URLs")


def _paths_of(onnx: Path) -> Paths:
    """The paths whose exported file `onnx` is."""
    folder = onnx.resolve().parent
    paths = Paths(folder.parent.parent, name=folder.name, run=folder.name)
    if paths.onnx != onnx.resolve():
        raise PipelineError(f"{onnx} is no export of ours: exports are exported/NAME/model.onnx")
    return paths


def _validate_export(settings: Settings, paths: Paths) -> None:
    from pipeline.prove import prove_export

    proof = prove_export(paths, report=settings.say)
    text = f"ONNX Runtime agrees with eager PyTorch on {proof.agreement}\nwrote {paths.validation}"
    record = {"passed": True, "sha256": proof.sha256, "accuracy": proof.accuracy}
    record |= {"agreement": asdict(proof.agreement)}
    settings.result(record, text, f"pipeline package{_named(paths)}")


def _validate_repository(settings: Settings, paths: Paths, only: str | None) -> None:
    from pipeline.prove import prove_repository

    tables = prove_repository(paths, report=settings.say, only=only)
    written = [str(replace(paths, name=table.name).agreement) for table in tables]
    text = "\n\n".join(map(str, tables)) + f"\nwrote {', '.join(written)}"
    record = asdict(tables[0]) if len(tables) == 1 else {"models": [asdict(t) for t in tables]}
    settings.result(record, text, "pipeline serve")


@main.command()
@name_option
@click.option("--max-batch-size", default=PackageConfig.max_batch_size, show_default=True)
@click.option("--max-queue-delay-us", default=PackageConfig.max_queue_delay_us, show_default=True)
@click.option("--instances", default=PackageConfig.instances, show_default=True)
@click.option("--intra-op-threads", default=PackageConfig.intra_op_threads, show_default=True)
@click.option("--inter-op-threads", default=PackageConfig.inter_op_threads, show_default=True)
@click.pass_obj
def package_command(settings: Settings, /, name: str | None, **changes: int) -> None:
    """Add a validated export to the Triton model repository.

    \b
    Example:
      pipeline package
    """
    from pipeline.package import package

    paths = paths_of(settings, name)
    done = package(paths, PackageConfig(**changes))
    text = f"wrote {done.folder} (version {done.version}, sha256 {done.sha256[:12]})"
    record = {"folder": str(done.folder), "version": done.version, "sha256": done.sha256}
    settings.result(record, text, f"pipeline validate {paths.repository}")


@main.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path())
@click.option("--url", help="http://HOST:PORT or grpc://HOST:PORT.  [default: our server]")
@name_option
@click.option("--timeout", default=10.0, show_default=True, help="Seconds for an answer.")
@click.option("--top", default=3, show_default=True, type=click.IntRange(1))
@click.pass_obj
def query_command(
    settings: Settings,
    images: tuple[str, ...],
    url: str | None,
    name: str | None,
    timeout: float,
    top: int,
) -> None:
    """Ask the served model what image files show.

    \b
    Example:
      pipeline query digit.png
      pipeline query --json --top 1 digits/*.png
    """
    from pipeline.query import Client, ask_files
    from pipeline.serve import default_url

    paths = paths_of(settings, name)
    failed = 0

    def connect() -> Client:
        return Client(url or default_url(paths), paths.name, timeout)

    for answer in ask_files(connect, [Path(image) for image in images], top):
        if answer.error:
            failed += 1
            click.echo(f"Error: {answer.error}", err=True)
        else:
            click.echo(json.dumps(answer.record()) if settings.json else str(answer))
    if failed:
        raise PipelineError(f"{failed} of {len(images)} images could not be read")


if __name__ == "__main__":
    sys.exit(main())

"""The commands that export and package, and the options for a third-party module."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pipeline.cli.command import Command, Settings, name_of_run, name_option, named, paths_of
from pipeline.core.errors import PipelineError
from pipeline.core.paths import PRECISIONS, TAKEN, Paths
from pipeline.core.text import Lines
from pipeline.export.targets import listing, onnx_dialect, records
from pipeline.repository.settings import PackageConfig

if TYPE_CHECKING:
    from pipeline.export.sample import Sample

file_type = click.Path(path_type=Path, dir_okay=False)


def module_options(command: Any) -> Any:
    """Add the options that name a third-party module, and the images to validate it on."""
    for option in (
        click.option("--classes", help="Their names: a,b,c or a file with one a line."),
        click.option("--labels", type=file_type, help="The images' classes (.npy, .npz or text)."),
        click.option("--images", type=file_type, help="Images as the module takes them (.npz)."),
        click.option("--module", help="Anybody's network: package.module:factory."),
    ):
        command = option(command)
    return command


def _precisions(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    wanted = [part.strip() for part in value.split(",")]
    for one in wanted:
        if one not in PRECISIONS:
            raise click.BadParameter(f"no precision {one!r}: there are {', '.join(PRECISIONS)}")
    return wanted


@click.command(cls=Command)
@click.option("--run", help="The run to export.  [default: the name]")
@name_option
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    callback=_precisions,
    help=f"Any of {','.join(PRECISIONS)}.",
)
@click.option("--target-triton", metavar="YY.MM", help="The oldest Triton that has to load it.")
@click.option("--opset", type=int, help="The ONNX opset.  [default: 18, or the target's highest]")
@click.option("--list-targets", is_flag=True, help="Show which Triton loads what, and export none.")
@module_options
@click.option("--calibration", type=file_type, help="Other images, for int8 (.npz, .npy).")
@click.pass_obj
def export_command(
    settings: Settings,
    run: str | None,
    name: str | None,
    precision: list[str],
    target_triton: str | None,
    opset: int | None,
    list_targets: bool,
    module: str | None,
    images: Path | None,
    labels: Path | None,
    classes: str | None,
    calibration: Path | None,
) -> None:
    """Export a trained network, or anybody's module, through torch.export to ONNX.

    \b
    Example:
      pipeline export
      pipeline export --precision fp32,fp16,int8 --target-triton 24.10
      pipeline export --module nets.small:make --images test.npz --name small
    """
    if list_targets:
        settings.result({"targets": records()}, listing())
        return
    config = onnx_dialect(target_triton, opset)
    wanted = ["fp32", *precision]
    from pipeline.export.export import export_module, export_run

    if module:
        from pipeline.export.subject import subject_of_module

        paths = named_paths(settings, name)
        sample = sample_of(images, labels, calibration)
        subject = subject_of_module(module, sample, settings.root, class_names(classes))
        done = export_module(paths, subject, sample, config, wanted, settings.say)
    else:
        if images or labels or classes or calibration:
            raise click.UsageError("--images and what belongs to it go with --module")
        paths = paths_of(settings, name, run or name)
        paths = paths if name else replace(paths, name=name_of_run(paths))
        done = export_run(paths, config, wanted, settings.say)
    wrote = (
        f"wrote {one.path} ({one.size:,} bytes, opset {one.opset}, IR {one.ir_version}, "
        f"sha256 {one.sha256[:12]})"
        for one in done
    )
    record = {**asdict(done[0]), "variants": [asdict(one) for one in done]}
    settings.result(record, Lines(*wrote), f"pipeline validate{named(paths)}")


def named_paths(settings: Settings, name: str | None) -> Paths:
    """Return the paths for a third-party module's export; raise UsageError without a name."""
    if not name:
        raise click.UsageError("--module needs a --name for what it exports")
    if name in TAKEN:
        raise PipelineError(f"the name {name!r} is taken: choose another")
    return paths_of(settings, name)


def sample_of(images: Path | None, labels: Path | None, calibration: Path | None) -> "Sample":
    """Read the user's images, with their labels and the calibration images if given."""
    from pipeline.export.sample import read_sample

    if not images:
        raise click.UsageError(
            "--module needs --images to take its signature from, and to prove it"
        )
    return read_sample(images, labels, calibration)


def class_names(classes: str | None) -> Sequence[str]:
    """Return the class names from the command line or a file; empty if none are given."""
    if not classes:
        return ()
    if Path(classes).is_file():
        return [line.strip() for line in Path(classes).read_text().splitlines() if line.strip()]
    return [part.strip() for part in classes.split(",")]


@click.command(cls=Command)
@name_option
@click.option("--max-batch-size", default=PackageConfig.max_batch_size, show_default=True)
@click.option("--max-queue-delay-us", type=int, help="For every profile, as the next three.")
@click.option("--instances", type=int)
@click.option("--intra-op-threads", type=int)
@click.option("--inter-op-threads", type=int)
@click.option("--cores", type=int, help="Of the machine that will serve.  [default: this one's]")
@click.option(
    "--explain",
    is_flag=False,
    flag_value="all",
    metavar="[PROFILE]",
    help="Say what a profile's config would be, and why; package nothing.",
)
@click.option(
    "--archive",
    is_flag=False,
    flag_value="",
    type=click.Path(dir_okay=False),
    metavar="[PATH]",
    help="Write the version as a tar too.  [without a path: exported/NAME-VERSION.tar]",
)
@click.option(
    "--deploy",
    type=click.Choice(["compose", "kubernetes"]),
    help="Write the files that run what is packaged already, and package nothing.",
)
@click.option("--target-triton", metavar="YY.MM", help="The Triton that --deploy is for.")
@click.pass_obj
def package_command(
    settings: Settings,
    /,
    name: str | None,
    explain: str | None,
    archive: str | None,
    deploy: str | None,
    target_triton: str | None,
    **changes: int | None,
) -> None:
    """Add a validated export to the Triton model repository, each precision as a model.

    \b
    Example:
      pipeline package
      pipeline package --explain latency
      pipeline package --archive release.tar
      pipeline package --deploy compose
    """
    paths = paths_of(settings, name)
    if deploy or target_triton:
        others = {"explain": explain, "archive": archive, **changes}
        _deploy(settings, paths, deploy, target_triton, others)
        return
    from pipeline.repository import package

    config = PackageConfig(**changes)  # type: ignore[arg-type]
    if explain:
        from pipeline.repository.profiles import format_profiles

        found = package.explain_package(paths, config, explain)
        fields = {name: [asdict(choice) for choice in choices] for name, choices in found.items()}
        settings.result(
            {"profiles": fields}, format_profiles(found), f"pipeline package{named(paths)}"
        )
        return
    lines, variants, promote = [], [], []
    for one in package.package_model(paths, config):
        lines.append(str(one))
        variants.append({**asdict(one), "folder": str(one.folder)})
        if not one.is_selected:
            of_model = named(paths.named(one.name))
            promote.append(f"pipeline versions promote {one.version}{of_model}")
        if archive is not None:
            path, digest = package.archive(paths, one, Path(archive) if archive else None)
            lines.append(f"wrote {path} (sha256 {digest})")
            variants[-1] |= {"archive": str(path), "archive_sha256": digest}
    then = ", ".join(promote) or f"pipeline validate {shlex.quote(str(paths.repository))}"
    settings.result({**variants[0], "variants": variants}, Lines(*lines), then)


def _deploy(
    settings: Settings, paths: Paths, kind: str | None, release: str | None, others: Iterable[str]
) -> None:
    """Write the deployment of the packaged model; raise UsageError for options of packaging."""
    if not kind:
        raise click.UsageError("--target-triton goes with --deploy (and with 'pipeline export')")
    source = click.get_current_context().get_parameter_source
    given = [name for name in others if source(name) is ParameterSource.COMMANDLINE]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"--deploy packages nothing: leave out {options}")
    from pipeline.serving.deploy import write_deployment

    done = write_deployment(paths, kind, release)
    settings.result(asdict(done), done, done.then)

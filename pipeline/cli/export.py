"""The commands that export and package, and the options for a third-party module."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pipeline.cli.command import Command, Settings, pass_paths, paths_of, read_model_name
from pipeline.cli.options import file_type, path_type, settings_options
from pipeline.core.errors import PipelineError
from pipeline.core.paths import PRECISIONS, TAKEN, Paths
from pipeline.core.text import Lines
from pipeline.export.targets import format_targets, onnx_dialect, records
from pipeline.repository.settings import PackageConfig

SLACK = 0.01  # of the range of values, by which --images may leave that of --picture

if TYPE_CHECKING:
    from pipeline.export.sample import Sample
    from pipeline.export.subject import Subject


def module_options(command: Any) -> Any:
    """Add the options that name a third-party module, and the images to validate it on."""
    for option in (
        click.option("--picture", metavar="RULE", help="Rule that makes --images of pictures."),
        click.option("--classes", help="Class names: a,b,c, or a file with one name per line."),
        click.option("--labels", type=file_type, help="Classes of --images (.npy, .npz or text)."),
        click.option("--images", type=file_type, help="Test images for --module (.npz or .npy)."),
        click.option("--module", help="Third-party network: package.module:factory."),
    ):
        command = option(command)
    return command


def _parse_precisions(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    precisions = [part.strip() for part in value.split(",")]
    for precision in precisions:
        if precision not in PRECISIONS:
            raise click.BadParameter(f"{precision!r} is not one of {', '.join(PRECISIONS)}")
    return precisions


@click.command(cls=Command)
@click.option("--run", help="Run to export.  [default: the value of --name]")
@click.option("--name", help="Name of the model.  [default: that of the run's data set]")
@click.option(
    "--precision",
    default="fp32",
    callback=_parse_precisions,
    help=f"Precisions, separated by commas: {', '.join(PRECISIONS)}.",
)
@click.option("--target-triton", metavar="YY.MM", help="Oldest Triton that must load the model.")
@click.option(
    "--opset", type=int, help="ONNX opset.  [default: 18, or the highest of --target-triton]"
)
@click.option("--list-targets", is_flag=True, help="List what each Triton release loads, and exit.")
@module_options
@click.option(
    "--calibration",
    type=file_type,
    help="Images to calibrate int8 and exact of a --module (.npz or .npy).  [default: --images]",
)
@click.pass_obj
def export_command(
    settings: Settings,
    /,
    run: str | None,
    name: str | None,
    precision: list[str],
    target_triton: str | None,
    opset: int | None,
    list_targets: bool,
    module: str | None,
    **given: Any,
) -> None:
    """Export a trained network or a third-party module to ONNX.

    With --picture, clients take pictures for a third-party module, too. Its RULE is KEY=VALUE,...
    with any of resize (pixels of the shorter side, or HEIGHTxWIDTH), color (rgb, bgr or gray), mean
    and std (of pixels from 0 to 1: one for all channels, or one for each, as in 0.5:0.4:0.4).

    \b
    Example:
      pipeline export
      pipeline export --precision fp32,fp16,int8,exact --target-triton 24.10
      pipeline export --module nets.small:make --images test.npz --name small
      pipeline export --module nets:make --images test.npz --name mine --picture mean=0.5,std=0.2
    """
    if list_targets:
        settings.result({"targets": records()}, format_targets())
        return
    config, precisions = onnx_dialect(target_triton, opset), ["fp32", *precision]
    from pipeline.export.export import export_module, export_run

    if module:
        paths = paths_of_module(settings, name)
        sample, subject = load_module(settings, module, given)
        exported = export_module(paths, subject, sample, config, precisions, settings.say)
    else:
        if any(given.values()):
            options = ", ".join(f"--{name}" for name in given)
            raise click.UsageError(f"{options} need --module")
        paths = paths_of(settings, name, run or name)
        paths = paths if name else replace(paths, name=read_model_name(paths))
        exported = export_run(paths, config, precisions, settings.say)
    lines = (
        f"wrote {file.path} ({file.size:,} bytes, opset {file.opset}, IR {file.ir_version}, "
        f"sha256 {file.sha256[:12]})"
        for file in exported
    )
    record = {**asdict(exported[0]), "variants": [asdict(file) for file in exported]}
    settings.result(record, Lines(*lines), f"pipeline validate{paths.name_option}")


def paths_of_module(settings: Settings, name: str | None) -> Paths:
    """Return the paths for a third-party module's export; raise UsageError without a name."""
    if not name:
        raise click.UsageError("--module needs --name, the name of the exported model")
    if name in TAKEN:
        raise PipelineError(f"the name {name!r} is reserved: choose another --name")
    return paths_of(settings, name)


def load_module(
    settings: Settings, module: str, given: Mapping[str, Any]
) -> tuple["Sample", "Subject"]:
    """Read the user's images and load the module that takes them, as the options `given` say."""
    from pipeline.export.sample import read_sample
    from pipeline.export.subject import subject_of_module
    from pipeline.images.rule import PictureRule

    if not given["images"]:
        raise click.UsageError("--module needs --images, which give its signature and validate it")
    sample = read_sample(given["images"], given["labels"], given.get("calibration"))
    if sample.is_narrowed:
        settings.say(f"note: the float64 of {given['images']} becomes float32")
    rule = "arrays"
    if given["picture"]:
        shape = "x".join(map(str, sample.images.shape[1:]))
        rule = f"{given['picture']},shape={shape},dtype={sample.images.dtype}"
        try:
            low, high = PictureRule.parse(rule).limits
        except PipelineError as error:
            raise click.BadParameter(str(error), param_hint="'--picture'") from error
        least, most = float(sample.images.min()), float(sample.images.max())
        if max(low - least, most - high) > SLACK * (high - low):
            raise click.BadParameter(
                f"--picture makes {low:.3g} to {high:.3g} of pictures, --images has {least:.3g} "
                f"to {most:.3g}: state the mean and std that made them"
            )
    names = given["classes"].split(",") if given["classes"] else []
    if names and Path(given["classes"]).is_file():  # one name per line
        lines = Path(given["classes"]).read_text("utf-8").splitlines()
        names = [line for line in lines if line.strip()]
    classes = [name.strip() for name in names]
    return sample, subject_of_module(module, sample, settings.root, classes, rule)


@click.command(cls=Command)
@click.argument("release", type=path_type)
@click.pass_obj
def rebuild_command(settings: Settings, /, release: Path) -> None:
    """Train and export again from a release's manifest, and compare the bytes.

    RELEASE is the folder of a version or an export, or its manifest.json. Takes the recorded
    recipe, seed and thread count, and changes nothing here. Exits with 3 if the ONNX file gets
    other bytes, and lists which recorded facts differ: torch, threads, the processor's
    instructions, the data.

    \b
    Example:
      pipeline rebuild exported/model_repository/handwriting/1
      pipeline rebuild manifest.json
    """
    from pipeline.export.rebuild import rebuild_release

    rebuild = rebuild_release(paths_of(settings), release, settings.say, settings.update)
    settings.result({**asdict(rebuild), "equal": rebuild.is_equal}, rebuild)
    rebuild.require_equal()


@click.command(cls=Command)
@settings_options(PackageConfig)
@click.option(
    "--explain",
    is_flag=False,
    flag_value="all",
    metavar="[PROFILE]",
    help="Explain the settings of a Triton config profile; package nothing.  [PROFILE: all]",
)
@click.option(
    "--archive",
    is_flag=False,
    flag_value="",
    type=click.Path(dir_okay=False),
    metavar="[PATH]",
    help="Also write the version as a tar archive.  [PATH: exported/NAME-VERSION.tar]",
)
@click.option(
    "--deploy",
    type=click.Choice(["compose", "kubernetes"]),
    help="Write files to run the selected version with Compose or Kubernetes; package nothing.",
)
@click.option("--target-triton", metavar="YY.MM", help="Triton release for --deploy.")
@pass_paths
def package_command(
    settings: Settings,
    paths: Paths,
    /,
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
    if deploy or target_triton:
        _deploy(settings, paths, deploy, target_triton, ("explain", "archive", *changes))
        return
    from pipeline.repository import package

    config = PackageConfig(**changes)  # type: ignore[arg-type]
    if explain:
        from pipeline.repository.profiles import format_profiles

        profiles = package.explain_package(paths, config, explain)
        record = {name: list(map(asdict, choices)) for name, choices in profiles.items()}
        then = f"pipeline package{paths.name_option}"
        settings.result({"profiles": record}, format_profiles(profiles), then)
        return
    lines, variants, promote = [], [], []
    for packaged in package.package_model(paths, config):
        lines.append(str(packaged))
        variants.append({**asdict(packaged), "folder": str(packaged.folder)})
        if not packaged.is_selected:
            option = paths.named(packaged.name).name_option
            promote.append(f"pipeline versions promote {packaged.version}{option}")
        if archive is not None:
            path, digest = package.archive(paths, packaged, Path(archive) if archive else None)
            lines.append(f"wrote {path} (sha256 {digest})")
            variants[-1] |= {"archive": str(path), "archive_sha256": digest}
    then = ", ".join(promote) or f"pipeline validate {shlex.quote(str(paths.repository))}"
    settings.result({**variants[0], "variants": variants}, Lines(*lines), then)


def _deploy(
    settings: Settings, paths: Paths, kind: str | None, release: str | None, others: Iterable[str]
) -> None:
    """Write the deployment of the packaged model; raise UsageError for options of packaging."""
    if not kind:
        raise click.UsageError("--target-triton needs --deploy; 'pipeline export' takes it as well")
    source = click.get_current_context().get_parameter_source
    given = [name for name in others if source(name) is ParameterSource.COMMANDLINE]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"--deploy does not package: leave out {options}")
    from pipeline.serving.deploy import write_deployment

    deployment = write_deployment(paths, kind, release)
    settings.result(asdict(deployment), deployment, deployment.then)

"""The validate command: an export, a third-party ONNX file, a repository, running servers."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.command import Command, Settings, next_of_packaged, paths_of, require_model
from pipeline.cli.export import load_module, module_options, paths_of_module
from pipeline.cli.options import file_type, path_type, seconds_type
from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.paths import PRECISIONS, Paths
from pipeline.core.text import Lines

FEW = 100  # images

if TYPE_CHECKING:
    from pipeline.validation.compare import Verdict
    from pipeline.validation.export import ExportValidation


@click.command(cls=Command)
@click.argument("targets", nargs=-1, metavar="[FILE | REPOSITORY | URL...]")
@click.option("--name", help="Name of the model.  [default: handwriting, or --onnx's name]")
@click.option("--onnx", type=file_type, help="ONNX file from another tool; needs --module.")
@click.option("--scrub", is_flag=True, help="Validate a copy without source paths, in one file.")
@module_options
@click.option(
    "--replay", type=file_type, help="Compare only the images in this file; write nothing."
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    help="Device on which ONNX Runtime must run every node.",
)
@click.option("--golden", type=path_type, help="Golden set for a URL.  [default: the packaged one]")
@click.option(
    "--evidence",
    type=file_type,
    help="File for the answers of a URL.  [default: exported/NAME/replay.json]",
)
@click.option(
    "--timeout", type=seconds_type, default=60.0, help="Seconds to wait for each answer of a URL."
)
@click.pass_obj
def validate_command(
    settings: Settings,
    /,
    targets: tuple[str, ...],
    name: str | None,
    golden: Path | None,
    evidence: Path | None,
    timeout: float,
    provider: str,
    onnx: Path | None,
    scrub: bool,
    replay: Path | None,
    **module: Any,
) -> None:
    """Validate an export, an ONNX file, a model repository, or running servers.

    Without a target, or with the FILE of an export, runs the exported files in ONNX Runtime and
    compares them with their module in float64; with --onnx, compares a file from another tool with
    its --module. A file of torch.onnx.export needs --scrub here, and at its export dynamic_shapes,
    such as {"images": {0: torch.export.Dim("batch")}}, for batches of any size. With a
    REPOSITORY, serves it temporarily and compares all runtimes, for each model or only for --name.
    With URLs, replays the golden set on running servers, one image at a time, in batches and
    concurrently; this needs neither torch nor data. Exits with 3 if an answer is wrong; with URLs,
    the evidence file names it.

    \b
    Example:
      pipeline validate
      pipeline validate --onnx theirs.onnx --module nets.small:make --images test.npz
      pipeline validate exported/model_repository
      pipeline validate http://127.0.0.1:8000 grpc://127.0.0.1:8001
      pipeline validate grpc://host:8001 --golden golden.npz --evidence evidence.json
    """
    paths = paths_of(settings, name)
    is_remote = bool(targets) and all("://" in target for target in targets)
    if (golden or evidence) and not is_remote:
        raise click.UsageError("--golden and --evidence need one or more URLs")
    if onnx:
        _validate_onnx(settings, name, onnx, scrub, provider, replay, module)
    elif any(module.values()):
        raise click.UsageError("--module, --images, --labels, --classes, --picture need --onnx")
    elif replay and targets:
        raise click.UsageError("--replay compares the exported files: give no target with it")
    elif not targets or (len(targets) == 1 and Path(targets[0]).is_file()):
        _validate_export(settings, paths, targets, provider, replay)
    elif is_remote:
        from pipeline.validation.servers import require_passed, validate_servers

        replayed = validate_servers(paths, targets, golden, timeout, evidence, settings.say)
        lines = Lines(replayed, f"wrote {evidence or paths.replay}")
        settings.result(replayed.record(), lines)
        require_passed(replayed)
    elif len(targets) == 1:
        _validate_repository(settings, replace(paths, repository_folder=Path(targets[0])), name)
    else:
        raise click.UsageError("give one repository, or one or more URLs")


def _validate_repository(settings: Settings, paths: Paths, only: str | None) -> None:
    from pipeline.validation.repository import validate_repository

    tables = validate_repository(paths, report=settings.say, only=only)
    record = asdict(tables[0]) if len(tables) == 1 else {"models": list(map(asdict, tables))}
    wrote = f"wrote agreement.json next to each export in {paths.exported}"
    text = Lines(*(Lines(table, "") for table in tables), wrote)
    settings.result(record, text, next_of_packaged(paths))


def _validate_export(
    settings: Settings, paths: Paths, targets: Sequence[str], provider: str, replay: Path | None
) -> None:
    """Validate the export at `paths`, or that of a file, or compare only the images of `replay`."""
    from pipeline.export.sample import read_sample
    from pipeline.validation.export import replay_export, validate_export

    if replay:
        _echo_replay(settings, replay_export(paths, read_sample(replay), provider=provider))
        return
    for onnx in map(Path, targets):  # at most one
        folder = onnx.resolve().parent
        paths = Paths(folder.parent.parent, name=folder.name, run=folder.name)
        if onnx.resolve() not in map(paths.variant, PRECISIONS):
            raise PipelineError(
                f"{onnx} is not exported/NAME/model.onnx: use --onnx and --module for other files"
            )
    require_model(paths)
    _echo_proof(settings, paths, validate_export(paths, provider, settings.update))


def _validate_onnx(
    settings: Settings,
    name: str | None,
    onnx: Path,
    scrub: bool,
    provider: str,
    replay: Path | None,
    given: dict[str, Any],
) -> None:
    from pipeline.export.export import read_third_party_onnx
    from pipeline.validation import export

    module = given["module"]
    if not module:
        raise click.UsageError("--onnx needs --module, the module that it was exported from")
    paths = paths_of_module(settings, name or onnx.stem)
    content = read_third_party_onnx(onnx, scrub)
    images = replay or given["images"]
    sample, subject = load_module(settings, module, {**given, "images": images})
    if replay:
        verdicts = export.replay(subject, {"fp32": content}, sample, provider=provider)
        _echo_replay(settings, verdicts)
        return
    options = f" --onnx {onnx} --module {module}{' --scrub' if scrub else ''}"
    proof = export.validate_onnx(
        paths, content, subject, sample, provider=provider, report=settings.update, options=options
    )
    _echo_proof(settings, paths, proof)


def _echo_proof(settings: Settings, paths: Paths, proof: "ExportValidation") -> None:
    first = proof.verdicts[0]
    source = "" if proof.is_labelled else " (no labels were given: its classes count as correct)"
    runs = (
        f"{first.images:,} images and {first.probes} probes at batch sizes "
        f"{', '.join(map(str, first.batch_sizes))} with {' and '.join(map(str, first.threads))} "
        f"threads, a batch of every other size to {first.largest_batch}, compared with the module "
        f"in float64{source}"
    )
    if first.images < FEW:
        settings.say(f"note: {first.images} images are few: the result is valid only for these")
    for note in proof.notes:
        settings.say(f"note: {note}")
    record = {
        "passed": True,
        "sha256": proof.sha256,
        "accuracy": proof.accuracy,
        "variants": [asdict(verdict) for verdict in proof.verdicts],
        "notes": proof.notes,
    }
    text = Lines(*proof.verdicts, runs, f"wrote {paths.validation} and {paths.card.name}")
    settings.result(record, text, f"pipeline package{paths.name_option}")


def _echo_replay(settings: Settings, verdicts: Sequence["Verdict"]) -> None:
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    record = {"passed": not problems, "variants": [asdict(verdict) for verdict in verdicts]}
    settings.result(record, Lines(*verdicts))
    if problems:
        listed = (f"  {problem}" for problem in problems[:10])
        raise CheckFailedError(Lines("these images fail:", *listed))

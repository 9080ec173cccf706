"""The validate command: an export, a third-party ONNX file, a repository, running servers."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.command import Command, Settings, name_option, named, paths_of, seconds_type
from pipeline.cli.export import class_names, file_type, module_options, named_paths, sample_of
from pipeline.core.errors import CheckFailedError, PipelineError
from pipeline.core.paths import PRECISIONS, Paths
from pipeline.core.text import Lines

FEW = 100  # images

if TYPE_CHECKING:
    from pipeline.validation.compare import Verdict
    from pipeline.validation.export import Proof


@click.command(cls=Command)
@click.argument("targets", nargs=-1, metavar="[FILE | REPOSITORY | URL...]")
@name_option
@click.option("--onnx", type=file_type, help="An ONNX file that something else exported.")
@click.option("--scrub", is_flag=True, help="Prove a copy of it without source paths, in one file.")
@module_options
@click.option(
    "--replay", type=file_type, help="Only ask about the images in a file; write nothing."
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where ONNX Runtime has to run every node.",
)
@click.option(
    "--golden",
    type=click.Path(path_type=Path),
    help="The golden set to put to a URL.  [default: the packaged version's]",
)
@click.option(
    "--evidence",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write what a URL answered.  [default: exported/NAME/replay.json]",
)
@click.option(
    "--timeout",
    type=seconds_type,
    default=60.0,
    show_default=True,
    help="Seconds a call to a URL may take.",
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
    **given: Any,
) -> None:
    """Prove an export, an ONNX file, a model repository, or running servers.

    Without a target: the exported files in ONNX Runtime against their module in float64. With
    --onnx: a file that something else exported, against its --module. With a REPOSITORY: served
    for the occasion, all runtimes against each other, each model or just the one of --name. With
    a URL: the golden set replayed one by one, in batches and by many at once, which needs neither
    torch nor data. Exit 3 when an answer is wrong; the evidence says which.

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
        raise click.UsageError("--golden and --evidence go with one or more URLs")
    if onnx:
        _validate_onnx(settings, name, onnx, scrub, provider, replay, given)
    elif any(given.values()):
        raise click.UsageError("--module and what belongs to it go with --onnx, or with export")
    elif replay:
        from pipeline.export.sample import read_sample
        from pipeline.validation.export import replay_export

        _replayed(settings, replay_export(paths, read_sample(replay), provider=provider))
    elif not targets or (len(targets) == 1 and Path(targets[0]).is_file()):
        from pipeline.validation.export import validate_export

        paths = _paths_of(Path(targets[0])) if targets else paths
        _said(settings, paths, validate_export(paths, provider=provider, report=settings.update))
    elif is_remote:
        from pipeline.validation.servers import require_passed, validate_servers

        found = validate_servers(paths, targets, golden, timeout, evidence, report=settings.say)
        wrote = f"wrote {evidence or paths.replay}"
        settings.result(found.record(), Lines(found, wrote))
        require_passed(found)
    elif len(targets) == 1:
        from pipeline.validation.repository import validate_repository

        paths = replace(paths, repository_folder=Path(targets[0]))
        tables = validate_repository(paths, report=settings.say, only=name)
        wrote = f"wrote the tables beside the exports in {paths.exported}"
        record = asdict(tables[0]) if len(tables) == 1 else {"models": [asdict(t) for t in tables]}
        text = Lines(*(Lines(table, "") for table in tables), wrote)
        settings.result(record, text, "pipeline serve")
    else:
        raise click.UsageError("give one repository, or one or more URLs")


def _paths_of(onnx: Path) -> Paths:
    """Return the paths that the exported file `onnx` belongs to, or raise PipelineError."""
    folder = onnx.resolve().parent
    paths = Paths(folder.parent.parent, name=folder.name, run=folder.name)
    if onnx.resolve() not in [paths.variant(precision) for precision in PRECISIONS]:
        raise PipelineError(
            f"{onnx} is no export of ours: exports are exported/NAME/model.onnx. Prove it against "
            f"its module: pipeline validate --onnx {onnx} --module package.module:factory --images "
            "FILE.npz"
        )
    return paths


def _validate_onnx(
    settings: Settings,
    name: str | None,
    onnx: Path,
    scrub: bool,
    provider: str,
    replay: Path | None,
    given: dict[str, Any],
) -> None:
    from pipeline.export.export import handed_in
    from pipeline.export.subject import subject_of_module
    from pipeline.validation import export

    if not given["module"]:
        raise click.UsageError("--onnx needs the --module that it was exported from")
    paths = named_paths(settings, name or onnx.stem)
    content = handed_in(onnx, scrub)
    sample = sample_of(replay or given["images"], given["labels"], None)
    classes = class_names(given["classes"])
    subject = subject_of_module(given["module"], sample, settings.root, classes)
    if replay:
        verdicts = export.replay(subject, {"fp32": content}, sample, provider=provider)
        _replayed(settings, verdicts)
        return
    options = f"--onnx {onnx} --module {given['module']}{' --scrub' if scrub else ''}"
    done = export.validate_onnx(
        paths, content, subject, sample, provider=provider, report=settings.update, options=options
    )
    _said(settings, paths, done)


def _said(settings: Settings, paths: Paths, proof: "Proof") -> None:
    first = proof.verdicts[0]
    whose = "" if proof.is_labelled else " (against the module's own classes: no labels were given)"
    runs = (
        f"{first.images:,} images and {first.probes} probes at batch sizes "
        f"{', '.join(map(str, first.batch_sizes))} with {' and '.join(map(str, first.threads))} "
        f"threads, a batch of every other size to {first.largest_batch}, held against the module "
        f"in float64{whose}"
    )
    if first.images < FEW:
        settings.say(f"note: {first.images} images are few, and a proof says no more than they do")
    text = Lines(*proof.verdicts, runs, f"wrote {paths.validation} and {paths.card.name}")
    record = {
        "passed": True,
        "sha256": proof.sha256,
        "accuracy": proof.accuracy,
        "variants": [asdict(verdict) for verdict in proof.verdicts],
    }
    settings.result(record, text, f"pipeline package{named(paths)}")


def _replayed(settings: Settings, verdicts: Sequence["Verdict"]) -> None:
    wrong = [problem for verdict in verdicts for problem in verdict.problems]
    record = {"passed": not wrong, "variants": [asdict(verdict) for verdict in verdicts]}
    settings.result(record, Lines(*verdicts))
    if wrong:
        raise CheckFailedError(Lines("on these images:", *(f"  {one}" for one in wrong[:10])))

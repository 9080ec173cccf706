"""The report of a run: one self-contained page with all results of the run and its export."""

# Shape letters: N images, K classes.

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.core.files import check_manifest, read_json, write_bytes
from pipeline.core.paths import FOLDER, Paths
from pipeline.core.signature import pictures_of
from pipeline.core.text import load_template
from pipeline.data.splits import Split, load_split
from pipeline.report import figures
from pipeline.report.answers import Answers, collect_answers, draw_picture
from pipeline.report.drift import DriftSection, read_drift
from pipeline.report.evidence import EvidenceSection, read_evidence
from pipeline.report.speeds import MEASURE, Speeds, read_speeds
from pipeline.training.augment import draw_examples
from pipeline.training.recipes import RECIPES, TrainConfig
from pipeline.training.run import read_run_config
from pipeline.training.runs import Predictions, load_predictions
from pipeline.validation.agreement import Table, read_agreement
from pipeline.validation.card import percent

DIGITS, DRAWS = 8, 6  # rows and columns of the distorted digits
Record = Mapping[str, Any]
# A class, a training image of it, and random distortions of that by the recipe, as data: URLs.
Distorted = tuple[str, str, tuple[str, ...]]


@dataclass(frozen=True)
class Note:
    """A section's replacement: what is missing, and the command that makes it."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Page:
    """The template's content. A part that is missing is a Note with the command that makes it."""

    run: str
    name: str
    summary: Record
    curves: tuple[Markup, ...] | Note
    answers: Answers | Note
    pictures: Note | None  # why mistakes have no pictures
    distorted: tuple[Distorted, ...] | Note
    evidence: EvidenceSection | Note
    agreement: Table | Note
    drift: DriftSection | Note
    speeds: Speeds | Note
    settings: tuple[tuple[str, str, str], ...]  # name, value, the recipe's value if it differs
    digests: tuple[tuple[str, str], ...]  # SHA-256, path under the project's root
    export: Note | None  # why the export's digests are missing
    then: str  # the next command to prove the model; empty if all of it is done


def write_page(paths: Paths) -> Page:
    """Write the report of a finished run to `runs/<run>/report.html`; return its content.

    Raises PipelineError if there is no finished run, and CorruptError if a file of the run or of
    its export does not match its record.
    """
    page = collect(paths)
    write_bytes(paths.page, render(page).encode())
    return page


def render(page: Page) -> str:
    """Render the page as HTML; equal pages give equal text."""
    return load_template("report", "report.html", percent=percent).render(
        page=page,
        is_note=lambda part: isinstance(part, Note),
        has_ink=pictures_of(str(page.summary["dataset"])) != "whole",
    )


def collect(paths: Paths) -> Page:
    """Collect the page's content from the run, its export and the cached data set."""
    train_command = f"pipeline train --run {paths.run}"
    if not paths.run_folder.exists():
        raise PipelineError(f"there is no run {paths.run!r} here: {paths.explain_runs()}")
    unfinished = f"the run is not finished; finish it with '{train_command} --resume'"
    summary = read_json(paths.summary, unfinished)
    config = read_run_config(paths) or TrainConfig()
    predictions: Predictions | None = None
    if digest := summary.get("predictions_sha256"):
        predictions = load_predictions(paths, str(digest))
    train, test = (_load_split(paths, config, name) for name in ("train", "test"))
    labels = test.labels if isinstance(test, Split) else None
    if predictions and labels is not None and not np.array_equal(labels, predictions.labels):
        test = Note("Pictures are left out: the cached test split is not the one that was scored")
    pictured = test if isinstance(test, Split) else None
    manifest = _read_manifest(paths, summary)
    evidence, agreement, drift, speeds = (
        (manifest,) * 4 if isinstance(manifest, Note) else _read_export(paths, manifest, pictured)
    )
    own = asdict(RECIPES.get(config.recipe, config.settings))
    return Page(
        run=paths.run,
        name=paths.name,
        summary=summary,
        curves=_draw_curves(paths, train_command),
        answers=collect_answers(predictions, summary, pictured)
        if predictions
        else Note("This run was made before runs kept their predictions", train_command),
        pictures=test if isinstance(test, Note) else None,
        distorted=_distort(train, config) if isinstance(train, Split) else train,
        evidence=evidence,
        agreement=agreement,
        drift=drift,
        speeds=speeds,
        settings=tuple(
            (name, _format_setting(value), "" if own[name] == value else _format_setting(own[name]))
            for name, value in asdict(config.settings).items()
        ),
        digests=_list_digests(paths, config, summary, manifest),
        export=manifest if isinstance(manifest, Note) else None,
        then=manifest.command if isinstance(manifest, Note) else _find_next_command(paths),
    )


def _format_setting(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _load_split(paths: Paths, config: TrainConfig, name: str) -> Split | Note:
    """Load the split, or return a Note why it is missing; CorruptError if a cached file changed."""
    try:
        return load_split(config.dataset, paths.data(config.dataset), name)
    except CorruptError:
        raise
    except PipelineError as error:
        return Note(f"Pictures are left out: {error}")


def _read_manifest(paths: Paths, summary: Record) -> dict[str, Any] | Note:
    """Read the manifest of this run's export, or return a Note if there is none."""
    again = f"pipeline export --run {paths.run}"
    again += "" if paths.name == paths.run else f" --name {paths.name}"
    if not paths.manifest.exists():
        return Note("This run has not been exported yet", again)
    manifest = check_manifest(paths.export, f"run '{again}' again")
    if manifest.get("weights_sha256") != summary["weights_sha256"]:
        return Note(f"exported/{paths.name} is an export of other weights", again)
    return manifest


def _find_next_command(paths: Paths) -> str:
    """Return the next command after the export, by the files still missing; "" without any."""
    if not paths.validation.exists():
        return f"pipeline validate{paths.name_option}"
    if not paths.packaged.exists():
        return f"pipeline package{paths.name_option}"
    if not paths.agreement.exists():
        return f"pipeline validate {shlex.quote(str(paths.repository))}"
    return ""


def _read_export(
    paths: Paths, manifest: Record, test: Split | None
) -> tuple[EvidenceSection | Note, Table | Note, DriftSection | Note, Speeds | Note]:
    """Read the export's evidence, agreement, drift and speeds, or a Note for each missing one."""
    option, model = paths.name_option, manifest["files"].get(paths.onnx.name)
    agreement: Table | Note = Note(
        "This model has not been validated on a server yet", _find_next_command(paths)
    )
    if paths.agreement.exists():
        agreement = read_agreement(paths)
        if agreement.sha256 != model:
            agreement = Note(
                f"The last validation was of another model.onnx (version {agreement.version})",
                "pipeline package && pipeline validate exported/model_repository",
            )
    drift, reason = read_drift(paths), "No prediction log has been compared with this model yet"
    if drift and drift.drift.sha256 != model:
        drift, reason = None, "The last prediction log was of another model.onnx"
    return (
        read_evidence(paths, manifest, test)
        or Note("The exported files have not been validated yet", f"pipeline validate{option}"),
        agreement,
        drift or Note(reason, f"pipeline drift LOG{option}"),
        read_speeds(paths, str(model))
        or Note("Its speed has not been measured yet", f"{MEASURE}{option}"),
    )


def _draw_curves(paths: Paths, train_command: str) -> tuple[Markup, ...] | Note:
    if not paths.metrics.exists():
        return Note(f"runs/{paths.run}/{paths.metrics.name} is missing", train_command)
    try:
        lines = [json.loads(line) for line in paths.metrics.read_text("utf-8").splitlines()]
        return Markup(figures.draw_losses(lines)), Markup(figures.draw_accuracies(lines))
    except (ValueError, LookupError, TypeError) as error:
        message = f"{paths.metrics} is damaged: run '{train_command}' again"
        raise CorruptError(message) from error


def _distort(train: Split, config: TrainConfig) -> tuple[Distorted, ...] | Note:
    """Distort the first image of up to DIGITS classes as in training."""
    if not config.settings.distorts:
        return Note("This recipe does not distort the training images")
    present = np.unique(train.labels)[:DIGITS]
    chosen = [int(np.flatnonzero(train.labels == label)[0]) for label in present]
    images = train.images[chosen]
    is_folder = config.dataset.startswith(FOLDER)
    examples = draw_examples(images, config.settings, DRAWS, is_folder)
    rows = zip(present, images, examples, strict=True)
    return tuple(
        (train.classes[label], draw_picture(image), tuple(map(draw_picture, draws)))
        for label, image, draws in rows
    )


def _list_digests(
    paths: Paths, config: TrainConfig, summary: Record, manifest: Record | Note
) -> tuple[tuple[str, str], ...]:
    files = {
        paths.weights: summary["weights_sha256"],
        paths.predictions: summary.get("predictions_sha256"),
        **{paths.data(config.dataset) / name: d for name, d in summary["data_sha256"].items()},
    }
    if not isinstance(manifest, Note):
        files |= {paths.export / name: digest for name, digest in manifest["files"].items()}
    return tuple(
        (str(digest), path.relative_to(paths.root).as_posix())
        for path, digest in files.items()
        if digest
    )

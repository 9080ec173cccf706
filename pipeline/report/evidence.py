"""The report's section on the export's validation: each file's verdict and its worst images."""

# Shape letters: N rows (images, then probes), M images.

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.core.errors import CorruptError
from pipeline.core.files import check_digest, read_json
from pipeline.core.paths import Paths
from pipeline.data.splits import Split
from pipeline.report import figures
from pipeline.report.answers import draw_picture
from pipeline.validation.card import format_variants

WORST = 8  # most images shown for each variant
VALIDATE = "run 'pipeline validate' again"


@dataclass(frozen=True)
class EvidenceSection:
    """Contents of the section on the validation."""

    record: Mapping[str, Any]  # validation.json
    rows: list[dict[str, Any]]  # one per file, as in the model card
    figure: Markup
    worst: tuple[tuple[str, tuple[dict[str, Any], ...]], ...]  # images, by precision


def read_evidence(
    paths: Paths, manifest: Mapping[str, Any], test: Split | None
) -> EvidenceSection | None:
    """Read the section on an export's validation, or return None if it is not validated yet.

    Includes pictures if `test` is the split that the export was validated on. Raises CorruptError
    if the validation cannot be read, or is of other files than those in the manifest.
    """
    if paths.validation.name not in manifest["files"]:
        return None
    validation = read_json(paths.validation, VALIDATE)
    content = check_digest(paths.evidence, manifest["files"].get(paths.evidence.name), VALIDATE)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{paths.evidence} is not an evidence file: {VALIDATE}") from error
    try:
        validated = {variant["file"]: variant["sha256"] for variant in validation["variants"]}
        exported = [paths.variant(precision).name for precision in manifest["precisions"]]
        if validated != {name: manifest["files"][name] for name in exported}:
            raise CorruptError(f"{paths.validation} is of other files: {VALIDATE}")
        labels, margins = arrays["labels"], arrays["margins"]
        rows = (len(labels), len(margins) - len(labels))
        if rows != (validation["images"], validation["probes"]):
            raise ValueError("the evidence is of other rows")
        pictured = test if test and np.array_equal(test.labels, labels) else None
        errors = {variant["precision"]: variant["max_error"] for variant in validation["variants"]}
        largest = {name: error for name, error in errors.items() if error}
        return EvidenceSection(
            record=validation,
            rows=format_variants(validation),
            figure=Markup(figures.draw_margins(margins[: len(labels)].tolist(), largest)),
            worst=tuple(
                (name, _worst_images(name, arrays, validation["classes"], pictured))
                for name in errors
            ),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        message = f"{paths.validation} and {paths.evidence.name} do not belong together"
        raise CorruptError(f"{message}: {VALIDATE}") from error


def _worst_images(
    precision: str, arrays: Mapping[str, np.ndarray], classes: Sequence[str], test: Split | None
) -> tuple[dict[str, Any], ...]:
    """Return the images with the largest ratio of error to margin, the worst first."""
    labels = arrays["labels"]
    margins = arrays["margins"][: len(labels)]

    def name(answer: Any) -> str:
        return str(answer) if labels.dtype.kind == "U" else classes[answer]

    errors = arrays[f"errors_{precision}"][: len(labels)].astype(np.float64)  # (M,)
    shares = errors / np.maximum(margins, np.finfo(np.float64).tiny)  # a margin may be 0
    return tuple(
        {
            "index": int(row),  # in the test split
            "truth": name(labels[row]),
            "reference": name(arrays["reference"][row]),  # the reference's answer
            "predicted": name(arrays[f"said_{precision}"][row]),
            "margin": float(margins[row]),  # of the reference, nats
            "error": float(errors[row]),
            "picture": draw_picture(test.images[row]) if test else None,  # a data: URL
        }
        for row in np.argsort(-shares, kind="stable")[:WORST]
    )

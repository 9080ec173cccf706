"""What the proof of a run's export shows: each file's verdict, and the images it is hardest on."""

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
from pipeline.report.answers import picture
from pipeline.validation.card import VariantRow, variant_rows

WORST = 8  # images shown of each variant, at most
VALIDATE = "run 'pipeline validate' again"


@dataclass(frozen=True)
class Worst:
    """A test image on which a file's error is large for the margin that there is."""

    index: int  # in the test split
    truth: str
    reference: str  # what the module says of it in float64
    said: str
    margin: float  # in float64, nats
    error: float
    picture: str | None  # a data: URL

    @property
    def is_mistake(self) -> bool:
        return self.reference != self.truth

    @property
    def is_flip(self) -> bool:
        return self.said != self.reference


@dataclass(frozen=True)
class Evidence:
    """What the proof shows."""

    images: int
    probes: int
    threads: tuple[int, ...]  # of the speeds in `rows`
    rows: tuple[VariantRow, ...]
    figure: Markup
    worst: tuple[tuple[str, tuple[Worst, ...]], ...]  # by precision


def evidence(paths: Paths, manifest: Mapping[str, Any], test: Split | None) -> Evidence | None:
    """What the proof of an export shows, or None where there is none yet.

    With pictures where `test` is the split that it was proven on. Raises CorruptError when the
    proof is about other bytes than the manifest, or cannot be read.
    """
    if paths.validation.name not in manifest["files"]:
        return None
    validation = read_json(paths.validation, VALIDATE)
    arrays = _arrays(paths, manifest)
    try:
        _require_same_bytes(paths, manifest, validation)
        return _evidence(validation, arrays, test)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(
            f"{paths.validation} and {paths.evidence.name} do not belong together: {VALIDATE}"
        ) from error


def _arrays(paths: Paths, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    content = check_digest(paths.evidence, manifest["files"].get(paths.evidence.name), VALIDATE)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{paths.evidence} holds no evidence: {VALIDATE}") from error


def _require_same_bytes(
    paths: Paths, manifest: Mapping[str, Any], validation: Mapping[str, Any]
) -> None:
    proven = {found["file"]: found["sha256"] for found in validation["variants"]}
    exported = [paths.variant(precision).name for precision in manifest["precisions"]]
    if proven != {name: manifest["files"][name] for name in exported}:
        raise CorruptError(f"{paths.validation} is the proof of other files: {VALIDATE}")


def _evidence(
    validation: Mapping[str, Any], arrays: Mapping[str, np.ndarray], test: Split | None
) -> Evidence:
    labels, margins = arrays["labels"], arrays["margins"]
    variants = validation["variants"]
    if (len(labels), len(margins) - len(labels)) != (validation["images"], validation["probes"]):
        raise ValueError("the evidence is of other rows")
    pictured = test if test and np.array_equal(test.labels, labels) else None
    errors = {found["precision"]: found["max_error"] for found in variants}
    return Evidence(
        images=validation["images"],
        probes=validation["probes"],
        threads=tuple(validation["criterion"]["threads"]),
        rows=variant_rows(validation),
        figure=Markup(
            figures.margin_histogram(
                margins[: len(labels)].tolist(), {name: e for name, e in errors.items() if e}
            )
        ),
        worst=tuple(
            (name, _worst(name, arrays, validation["classes"], pictured)) for name in errors
        ),
    )


def _worst(
    precision: str,
    arrays: Mapping[str, np.ndarray],
    classes: Sequence[str],
    test: Split | None,
) -> tuple[Worst, ...]:
    """The images whose error is the largest for their margin, the worst first."""
    labels = arrays["labels"]
    errors = arrays[f"errors_{precision}"][: len(labels)].astype(np.float64)  # (M,)
    # A margin of nothing is no division by nothing.
    shares = errors / np.maximum(arrays["margins"][: len(labels)], np.finfo(np.float64).tiny)
    return tuple(
        Worst(
            index=int(row),
            truth=classes[labels[row]],
            reference=classes[arrays["reference"][row]],
            said=classes[arrays[f"said_{precision}"][row]],
            margin=float(arrays["margins"][row]),
            error=float(errors[row]),
            picture=picture(test.images[row]) if test else None,
        )
        for row in np.argsort(-shares, kind="stable")[:WORST]
    )
